"""Pictures as one uint8 tensor in memory; flipped, shifted and normalised a batch at a time, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

SHIFT = 4
"""Pixels that an image is moved by at most, each way, where it is augmented: the usual figure for 32x32 (He et al. 2016)."""


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels.

    Args:
        pixels: (images, channels, height, width), uint8.
        labels: (images,), class numbers.
        mean, std: of each channel, of values in 0..1; inputs are (value - mean) / std.
        augment: flip every image left to right at random, and move it by up to `SHIFT` pixels, with black behind it. What
            is drawn follows torch's random state on the CPU, whatever the device.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, mean: Sequence[float], std: Sequence[float], augment: bool = False
    ) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment
        self._mean, self._std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([index]), torch.device("cpu"))
        return inputs[0], targets[0]

    def subset(self, chosen: Tensor) -> Images:
        """The images at some places, treated alike."""
        parts = self.pixels[chosen], self.labels[chosen]
        return Images(*parts, mean=self._mean, std=self._std, augment=self.augment)

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(inputs, targets) at some places, on a device."""
        pixels = self.pixels[chosen].to(device)
        if self.augment:
            pixels = _augmented(pixels)
        mean, std = (torch.tensor(of, device=device).view(1, -1, 1, 1) for of in (self._mean, self._std))
        return (pixels.float() / 255 - mean) / std, self.labels[chosen].to(device)


def _augmented(pixels: Tensor) -> Tensor:
    count, channels, height, width = pixels.shape
    flipped = torch.rand(count).to(pixels.device) < 0.5
    down, right = torch.randint(2 * SHIFT + 1, (2, count)).to(pixels.device)
    rows = down[:, None] + torch.arange(height, device=pixels.device)
    columns = right[:, None] + torch.arange(width, device=pixels.device)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    places = torch.arange(count, device=pixels.device)[:, None, None, None]
    planes = torch.arange(channels, device=pixels.device)[None, :, None, None]
    return F.pad(pixels, (SHIFT,) * 4)[places, planes, rows[:, None, :, None], columns[:, None, None, :]]
