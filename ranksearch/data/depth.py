"""Pictures with true disparities, for nets that predict depth from one picture; the loss may also see the right picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ranksearch.data.batched import Batched
from ranksearch.data.scenes import Scene, split_scenes
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError


@dataclass(frozen=True, eq=False)
class StereoPairs(Batched):
    """Stereo pairs of one size. Inputs are the left pictures (batch, 3, height, width), in 0..1.

    Targets are a dict: `disparity` (batch, 1, height, width) is the true one of the left picture's pixels, as a share of the
    width, NaN where not known; `width` (batch,) is the width in pixels at which it was measured. If `self_supervised`, `left`
    and `right` are both pictures, as inputs.

    `flip` mirrors each input with a chance of 1/2, and its truth with it. If `self_supervised`, the mirrored right picture
    takes the place of the left one, without a known truth, and the left one that of the right; otherwise the pair would be one
    of cameras in the wrong order. `jitter` raises both pictures of a pair to a power from 1 - jitter to 1 + jitter, then
    multiplies each channel by a factor from the same range. `zoom` enlarges each input by a factor from 1 to 1 + zoom, around
    the middle row and any column, and its disparities with it. That is what a longer lens sees: a thing twice as large is half
    as far, and the rows of the ground keep their disparities.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor
    width: Tensor
    self_supervised: bool = False
    flip: bool = False
    jitter: float = 0.0
    zoom: float = 0.0

    def __len__(self) -> int:
        return len(self.left)

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = (pixels[chosen].to(device).float() / 255 for pixels in (self.left, self.right))
        disparity = self.disparity[chosen].to(device)
        if self.flip:
            left, right, disparity = self._mirrored(left, right, disparity)
        if self.zoom:
            left, right, disparity = self._enlarged(left, right, disparity)
        if self.jitter:
            # Drawn on the CPU, so that a seed gives the same batch on every device.
            factors = 1 + self.jitter * (2 * torch.rand(len(chosen), 4, 1, 1) - 1).to(device)
            left, right = ((picture ** factors[:, :1] * factors[:, 1:]).clamp(0, 1) for picture in (left, right))
        targets = {"disparity": disparity, "width": self.width[chosen].to(device)}
        return left, targets | ({"left": left, "right": right} if self.self_supervised else {})

    def only(self, chosen: Tensor) -> StereoPairs:
        parts: dict[str, Any] = {name: getattr(self, name)[chosen] for name in ("left", "right", "disparity", "width")}
        return replace(self, **parts)

    def _enlarged(self, left: Tensor, right: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor, across = 1 + self.zoom * torch.rand(len(left)), 2 * torch.rand(len(left)) - 1
        # From the coordinates of the enlarged picture, which run from -1 to 1, to those of the whole one.
        onto = torch.zeros(len(left), 2, 3)
        onto[:, 0, 0] = onto[:, 1, 1] = 1 / factor
        onto[:, 0, 2] = across * (1 - 1 / factor)
        places = F.affine_grid(onto, list(left.shape), align_corners=False).to(left.device)
        left, right = (F.grid_sample(picture, places, padding_mode="border", align_corners=False) for picture in (left, right))
        nearest = F.grid_sample(disparity, places, mode="nearest", padding_mode="border", align_corners=False)
        return left, right, nearest * factor[:, None, None, None].to(left.device)

    def _mirrored(self, left: Tensor, right: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mirrored = (torch.rand(len(left), 1, 1, 1) < 0.5).to(left.device)
        if self.self_supervised:
            twins = right.flip(3), left.flip(3), torch.full_like(disparity, torch.nan)
        else:
            twins = left.flip(3), right.flip(3), disparity.flip(3)
        left, right, disparity = (
            torch.where(mirrored, twin, plain) for twin, plain in zip(twins, (left, right, disparity), strict=True)
        )
        return left, right, disparity


def depth(
    *, root: str = "data/stereo", train: str = "kitti2015", test: str = "kitti2015", size: Sequence[int] = (128, 384),
    train_scenes: Sequence[int] = (1, 14), validation_scenes: Sequence[int] = (15, 20), test_scenes: Sequence[int] = (21, 40),
    self_supervised: bool = False, flip: bool = True, jitter: float = 0.2, zoom: float = 0.5, units: float | None = None,
) -> Splits:  # fmt: skip
    """Pictures and the true disparities of some of their pixels, from stereo pairs; gray pictures have three equal channels.

    Args:
        root: the folder with the folders of pairs; a relative path starts at the folder the command runs in.
        train: the folder with the pairs for training and validation, in KITTI's or Middlebury's layout.
        test: the folder with the pairs for test.
        size: height and width of the inputs. Pictures are scaled to it; of the truth the pixel in the middle of each pixel of
            an input is taken, so that no disparity is mixed from two.
        train_scenes: the first and last scene for training, counted from 1 in the order of names. The splits are blocks, since
            neighbouring scenes of KITTI show the same street.
        validation_scenes: the first and last scene for validation.
        test_scenes: the first and last scene for test.
        self_supervised: let the targets hold both pictures, which `ranksearch.data.disparity:self_supervised` compares.
        flip: mirror each training input with a chance of 1/2, drawn anew for each batch.
        jitter: how far the gamma and the brightness of each channel of training inputs may be from 1.
        zoom: by how much training inputs are enlarged at most: 0.5 is up to 1.5 times.
        units: the value of one pixel of disparity in 8-bit ground truth without a known unit.

    Raises:
        DataError: pairs are missing or fewer than asked for, a scene is in two splits, or the unit of the truth is not known;
            `size` is not two numbers above 0, `jitter` does not lie in 0..1, or `zoom` is negative.
    """
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"size must be the height and the width of the inputs, but got {list(size)}.")
    if not 0 <= jitter < 1:
        raise DataError(f"jitter must be at least 0 and below 1, but got {jitter}.")
    if not zoom >= 0:
        raise DataError(f"zoom must be at least 0, but got {zoom}.")
    folders = {"train": (train, train_scenes), "validation": (train, validation_scenes), "test": (test, test_scenes)}
    scenes = split_scenes({name: (Path(root) / folder, span) for name, (folder, span) in folders.items()})
    parts = {name: _pairs(found, size, units, self_supervised) for name, found in scenes.items()}
    held, tested = parts["validation"], parts["test"]
    return Splits(
        train=replace(parts["train"], flip=flip, jitter=jitter, zoom=zoom), validation=held, test=tested, classes=None,
        about=f"pictures of {size[0]} x {size[1]} pixels with true disparities, {len(parts['train'])} of {train} for training, "
        f"{len(held)} of {train} / {len(tested)} of {test} for validation / test",
    )  # fmt: skip


def _pairs(scenes: list[Scene], size: Sequence[int], units: float | None, self_supervised: bool) -> StereoPairs:
    left, right, disparity, width = zip(*(_sized(scene, size, units) for scene in scenes), strict=True)
    stacked = torch.stack(left), torch.stack(right), torch.stack(disparity), torch.stack(width)
    return StereoPairs(*stacked, self_supervised=self_supervised)


def _sized(scene: Scene, size: Sequence[int], units: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A scene's pictures (3, height, width), its disparities (1, height, width) and its width."""
    pictures, (height, width) = scene.images("RGB"), size
    truth = scene.known_disparities(pictures[0].shape[:2], units)
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, truth.shape, strict=True))
    scaled = (Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR) for picture in pictures)
    left, right = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() for picture in scaled)
    disparity = torch.from_numpy(truth[rows[:, None], columns] / np.float32(truth.shape[1]))[None]
    return left, right, disparity, torch.tensor(float(truth.shape[1]))
