"""The task of CCNN (Poggi and Mattoccia 2016): predict which disparities of a stereo map are right."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ranksearch.data.batched import Batched
from ranksearch.data.census import disparity_map
from ranksearch.data.confidence import optimal_auc
from ranksearch.data.scenes import Scene, split_scenes
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError
from ranksearch.support.files import write_whole

PATCH_SIZE = 9
MARGIN = PATCH_SIZE // 2
UNKNOWN = 255
PIXEL_SEED = 0
"""The seed of the sample of training pixels. It is fixed, so that studies with different seeds use the same pixels."""


@dataclass(frozen=True, eq=False)
class Maps(Batched):
    """Whole disparity maps, each with a margin of 4 pixels for the patches of its outermost pixels, and their targets.

    Inputs are (batch, 1, height + 8, width + 8), targets (batch, 1, height, width): 1 right, 0 wrong, NaN not known.
    """

    at_once: ClassVar[int | None] = 1
    disparities: Tensor
    right: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.right)

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        right = self.right[chosen].to(device)[:, None]
        targets = right.float().masked_fill(right == UNKNOWN, torch.nan)
        return self.disparities[chosen].to(device)[:, None].float() * self.scale, targets

    def only(self, chosen: Tensor) -> Maps:
        return replace(self, disparities=self.disparities[chosen], right=self.right[chosen])

    def optimum(self) -> float:
        """The lowest AUC that any confidence can have, averaged over the maps."""
        areas = [optimal_auc(float((known == 0).double().mean())) for right in self.right if len(known := right[right < 2])]
        return sum(areas) / len(areas)


@dataclass(frozen=True, eq=False)
class Patches(Batched):
    """9x9 patches around pixels of `Maps`: inputs (batch, 1, 9, 9), targets (batch, 1, 1, 1).

    `places` (patches, 3) holds the index of the map, the row and the column of each pixel.
    """

    maps: Maps
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        number, row, column = self.places[chosen].long().T
        window = torch.arange(PATCH_SIZE)
        rows, columns = row[:, None, None] + window[:, None], column[:, None, None] + window
        patches = self.maps.disparities[number[:, None, None], rows, columns].to(device)[:, None]
        right = self.maps.right[number, row, column].to(device)
        return patches.float() * self.maps.scale, right.float()[:, None, None, None]

    def only(self, chosen: Tensor) -> Patches:
        return replace(self, places=self.places[chosen])


def stereo(
    *, root: str = "data/stereo", train: str = "kitti2015", test: str = "kitti2015", train_scenes: Sequence[int] = (1, 14),
    validation_scenes: Sequence[int] = (15, 20), test_scenes: Sequence[int] = (21, 40), patches: int = 200_000,
    scaled: bool = True, threshold: float = 3.0, test_threshold: float | None = None, disparities: int = 229,
    units: float | None = None,
) -> Splits:  # fmt: skip
    """Disparity maps of stereo pairs with targets (right or wrong): patches for training, whole maps for validation and test.

    The maps are made by matching census transforms, and cached in `root`. Each is cropped to the region with known truth.

    Args:
        root: the folder with the folders of pairs; a relative path starts at the folder the command runs in.
        train: the folder with the pairs for training and validation, in KITTI's or Middlebury's layout.
        test: the folder with the pairs for test.
        train_scenes: the first and last scene for training, counted from 1 in the order of names. The splits are blocks, since
            neighbouring scenes of KITTI show the same street.
        validation_scenes: the first and last scene for validation.
        test_scenes: the first and last scene for test.
        patches: how many pixels to train on, a random sample of those with known truth.
        scaled: scale disparities to 0..1 for the model; otherwise they are in pixels.
        threshold: a disparity is right if its error is at most this many pixels; usually 3 for KITTI, 1 for Middlebury.
        test_threshold: the threshold for test; by default `threshold`.
        disparities: how many disparities to search, from 0 on.
        units: the value of one pixel of disparity in 8-bit ground truth without a known unit.

    Raises:
        DataError: pairs are missing or fewer than asked for, a scene is in two splits, or the unit of the truth is not known.
    """
    if not 1 <= disparities <= UNKNOWN:
        raise DataError(f"disparities must lie in 1..{UNKNOWN}, but got {disparities}.")
    if patches < 1:
        raise DataError(f"patches must be at least 1, but got {patches}.")
    scale = 1 / max(1, disparities - 1) if scaled else 1.0
    folders = {"train": (train, train_scenes), "validation": (train, validation_scenes), "test": (test, test_scenes)}
    thresholds = {"test": threshold if test_threshold is None else test_threshold}
    scenes = split_scenes({name: (Path(root) / folder, span) for name, (folder, span) in folders.items()})
    parts = {
        name: _maps(
            scenes[name], Path(root) / f"census-{disparities}" / folder, disparities=disparities,
            threshold=thresholds.get(name, threshold), units=units, scale=scale,
        )
        for name, (folder, _) in folders.items()
    }  # fmt: skip
    pixels = (parts["train"].right != UNKNOWN).nonzero().int()
    drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(PIXEL_SEED))[:patches].sort().values
    held, tested = parts["validation"], parts["test"]
    return Splits(
        train=Patches(parts["train"], pixels[drawn]), validation=held, test=tested, classes=None,
        about=f"census disparity maps, {len(drawn):,} pixels of {len(parts['train'])} maps of {train} for training, "
        f"{len(held)} of {train} / {len(tested)} of {test} for validation / test; the best possible score is "
        f"{1 - held.optimum():.4f} / {1 - tested.optimum():.4f}",
    )  # fmt: skip


def _maps(scenes: list[Scene], cache: Path, *, disparities: int, threshold: float, units: float | None, scale: float) -> Maps:
    cropped = [_cropped(scene, cache, disparities, threshold, units) for scene in scenes]
    height, width = (max(right.shape[axis] for _, right in cropped) for axis in (0, 1))

    def stacked(tensors: list[Tensor], margin: int, fill: int) -> Tensor:
        room = ((0, width + margin - t.shape[1], 0, height + margin - t.shape[0]) for t in tensors)
        return torch.stack([F.pad(t, size, value=fill) for t, size in zip(tensors, room, strict=True)])

    maps, rights = zip(*cropped, strict=True)
    return Maps(stacked(list(maps), 2 * MARGIN, 0), stacked(list(rights), 0, UNKNOWN), scale)


def _cropped(scene: Scene, cache: Path, disparities: int, threshold: float, units: float | None) -> tuple[Tensor, Tensor]:
    """A scene's disparities (height + 8, width + 8) and targets (height, width), cropped to the region with known truth."""
    disparity = _disparities(scene, cache, disparities)
    truth = scene.known_disparities(disparity.shape, units)
    known = ~np.isnan(truth)
    right = np.where(known, np.abs(disparity - truth) <= threshold, UNKNOWN).astype(np.uint8)
    rows, columns = (slice(indices.min(), indices.max() + 1) for indices in known.nonzero())
    # Beyond the image's edge disparities count as 0, as in the published network.
    padded = np.pad(disparity, MARGIN)[rows.start : rows.stop + 2 * MARGIN, columns.start : columns.stop + 2 * MARGIN]
    return torch.from_numpy(padded.copy()), torch.from_numpy(right[rows, columns].copy())


def _disparities(scene: Scene, cache: Path, disparities: int) -> NDArray[np.uint8]:
    """A scene's disparity map, cached by the content of its two images."""
    left, right = scene.images()
    digest = hashlib.sha256(left.tobytes() + right.tobytes()).hexdigest()[:16]
    path = cache / f"{scene.name}-{digest}.png"
    if path.exists():
        return np.array(Image.open(path))
    disparity = disparity_map(left, right, disparities=disparities)
    content = io.BytesIO()
    Image.fromarray(disparity).save(content, "png")
    # If the folder is read-only, go on: the maps are then made in each run.
    with suppress(OSError):
        write_whole(path, content.getvalue())
    return disparity
