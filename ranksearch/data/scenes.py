"""Rectified stereo pairs with ground truth, in the folder layouts of KITTI and Middlebury."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ranksearch.errors import DataError

KITTI_FOLDERS = (
    ("image_2", "image_3", "disp_noc_0"),
    ("image_0", "image_1", "disp_noc"),
    ("colored_0", "colored_1", "disp_noc"),
)
"""The folders of left images, right images and ground truth in KITTI 2015, KITTI 2012 in gray, and KITTI 2012 in colour."""
SCENE_FILES = (
    ("left.png", "right.png", "disp_gt.pfm"),
    ("left.png", "right.png", "disp_gt.png"),
    ("im0.png", "im1.png", "disp0.pfm"),
    ("im0.png", "im1.png", "disp0GT.pfm"),
    ("view1.png", "view5.png", "disp1.png"),
    ("im2.png", "im6.png", "disp2.png"),
)
"""The left image, right image and ground truth in a scene's own folder: two plain layouts, then Middlebury 2014, Middlebury's
benchmark, Middlebury 2005 and 2006, and Middlebury 2003."""
KITTI_UNITS = 256.0
"""The value of one pixel of disparity in 16-bit ground truth."""


@dataclass(frozen=True)
class Scene:
    """One stereo pair; `units` is the value of one pixel of disparity in the truth's file, None if nothing states it."""

    name: str
    left: Path
    right: Path
    truth: Path
    units: float | None = None

    def images(self, mode: str = "L") -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Both images in gray (height, width), or as `RGB` (height, width, 3)."""
        left, right = (np.array(Image.open(path).convert(mode)) for path in (self.left, self.right))
        if left.shape != right.shape:
            raise DataError(f"The two images of a pair must have the same size, but those in {self.left.parent} do not.")
        return left, right

    def disparities(self, units: float | None = None) -> NDArray[np.float32]:
        """The true disparities of the left image's pixels (height, width), NaN where not known.

        Raises:
            DataError: neither the file nor the caller states the unit.
        """
        if self.truth.suffix == ".pfm":
            raw, units = _read_pfm(self.truth), 1.0
        else:
            with Image.open(self.truth) as opened:
                sixteen, raw = opened.mode.startswith("I"), np.array(opened).astype(np.float32)
            units = self.units or (KITTI_UNITS if sixteen else units)
        if units is None:
            raise DataError(
                f"The unit of the true disparities must be known, but 8-bit {self.truth} does not state it; give "
                "units = 1, 2 or 3 for Middlebury 2005 and 2006 in full, half or third size, 4 for 2003 in quarter size."
            )
        known = np.isfinite(raw) & (raw > 0)
        return np.where(known, raw / np.float32(units), np.float32("nan"))

    def known_disparities(self, shape: tuple[int, ...], units: float | None = None) -> NDArray[np.float32]:
        """The true disparities, as `disparities`, of an image of this shape (height, width).

        Raises:
            DataError: they are of another size, or none is known.
        """
        truth = self.disparities(units)
        if truth.shape != shape:
            raise DataError(f"{self.truth} must have the size of its image, {shape}, but has {truth.shape}.")
        if np.isnan(truth).all():
            raise DataError(f"Ground truth must have known pixels, but {self.truth} has none; leave the scene out.")
        return truth


def find_scenes(folder: Path) -> list[Scene]:
    """The scenes under `folder`, sorted by name.

    Raises:
        DataError: there are no scenes in a known layout.
    """
    for base in (folder, folder / "training"):
        for left, right, truth in KITTI_FOLDERS:
            if (base / left).is_dir() and (base / truth).is_dir():
                names = sorted(path.name for path in (base / truth).glob("*_10.png"))
                return [Scene(n.removesuffix("_10.png"), base / left / n, base / right / n, base / truth / n) for n in names]
    stated_units = _manifest(folder)
    scenes = []
    for inside in sorted(path for path in folder.glob("*") if path.is_dir()):
        for pair in SCENE_FILES:
            left_image, right_image, truth_file = (inside / name for name in pair)
            if left_image.exists() and right_image.exists() and truth_file.exists():
                scenes.append(Scene(inside.name, left_image, right_image, truth_file, stated_units.get(inside.name)))
                break
    if not scenes:
        raise DataError(
            f"Stereo pairs with ground truth must lie in {folder}, but there are none; unpack data_scene_flow.zip "
            "(https://www.cvlibs.net/datasets/kitti) or scenes of https://vision.middlebury.edu/stereo/data there."
        )
    return scenes


def split_scenes(wanted: Mapping[str, tuple[Path, Sequence[int]]]) -> dict[str, list[Scene]]:
    """The scenes of each split, by its name: from a folder, the scenes from the first to the last, counted from 1.

    Raises:
        DataError: a folder has no scenes, or fewer than asked for; or a scene is in two splits.
    """
    found, owners = dict[str, list[Scene]](), dict[Path, str]()
    for name, (folder, span) in wanted.items():
        found[name] = _block(find_scenes(folder), span, f"{name}_scenes")
        for scene in found[name]:
            if (other := owners.setdefault(scene.truth, name)) != name:
                raise DataError(
                    f"No scene may be in two splits, but {scene.name} is in {other} and {name}; change {name}_scenes."
                )
    return found


def _block(scenes: list[Scene], span: Sequence[int], key: str) -> list[Scene]:
    if len(span) != 2 or not 1 <= span[0] <= span[1] <= len(scenes):
        raise DataError(f"{key} must be the first and the last of {len(scenes)} scenes, counted from 1, but got {list(span)}.")
    return scenes[span[0] - 1 : span[1]]


def _manifest(folder: Path) -> dict[str, float]:
    """By scene, the unit from the column `gt_div` of a `manifest.csv` next to the folder; empty without such a file."""
    path = folder.parent / "manifest.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["scene"]: float(row["gt_div"]) for row in csv.DictReader(file) if row["dataset"] == folder.name}


def _read_pfm(path: Path) -> NDArray[np.float32]:
    """A gray portable float map (height, width); its rows are stored from the bottom up."""
    head = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?[\d.]+)\s", data := path.read_bytes())
    if not head:
        raise DataError(f"{path} must be a gray portable float map, but does not start like one; download it again.")
    width, height = int(head[1]), int(head[2])
    kind = np.dtype(np.float32).newbyteorder("<" if float(head[3]) < 0 else ">")
    return np.frombuffer(data, kind, width * height, head.end()).reshape(height, width)[::-1].astype(np.float32)
