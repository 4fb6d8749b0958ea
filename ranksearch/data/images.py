"""Labelled images as one uint8 tensor in memory, augmented and normalised one batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.data.batched import Batched
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError

SPLIT_SEED = 0
"""The seed of splits. It is fixed, so that studies with different seeds are compared on the same images."""


@dataclass(frozen=True, eq=False)
class Images(Batched):
    """Images (count, channels, height, width) as uint8, with class numbers; a batch is float32, normalised by channel.

    `flip` mirrors each image of a batch with a chance of 1/2. `shift` moves each by up to that many pixels along both axes; the
    exposed border is black.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    flip: bool = False
    shift: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        pixels, labels = self.pixels[chosen].to(device), self.labels[chosen].to(device)
        if self.flip or self.shift:
            pixels = self._moved(pixels)
        mean, std = (values.to(device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std, labels

    def only(self, chosen: Tensor) -> Images:
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])

    def _moved(self, pixels: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        # Drawn on the CPU, so that a seed gives the same batch on every device.
        down, right = torch.randint(2 * self.shift + 1, (2, count, 1))
        mirrored = torch.rand(count, 1) < 0.5 if self.flip else torch.zeros(count, 1, dtype=torch.bool)
        rows = torch.arange(height) + down
        columns = torch.arange(width)
        columns = torch.where(mirrored, columns.flip(0), columns) + right
        padded = F.pad(pixels, [self.shift] * 4)
        index = torch.arange(count)[:, None, None]
        # Index with channels last, so that they keep their place, then move them back.
        return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images (count, channels, height, width), scaled to 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(pixels.shape[1])]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    return mean.float(), (shares @ values**2 - mean**2).sqrt().clamp_min(1 / 255).float()


def split_images(
    pixels: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], *, classes: int, about: str, train: int | None,
    validation: int | tuple[Tensor, Tensor], flip: bool, shift: int, normalisation: tuple[Tensor, Tensor] | None = None,
) -> Splits:  # fmt: skip
    """Make splits from labelled images.

    Samples are stratified by class and the same in every run. Validation and test images are never augmented.

    Args:
        pixels: training and test images as uint8 (count, channels, height, width).
        labels: class numbers of the training and test images.
        classes: the number of classes.
        about: one phrase that describes the data.
        train: how many of the remaining training images to use; None for all.
        validation: how many training images to hold out for validation, or validation images and their labels.
        flip: as in `Images`, for training only.
        shift: as in `Images`, for training only.
        normalisation: mean and standard deviation of each channel; by default those of all training images, held out or not.

    Raises:
        DataError: a count does not fit the number of images or classes, or `shift` is larger than the images.
    """
    mean, std = normalisation or moments(pixels[0])
    training = Images(pixels[0], labels[0], mean, std)
    if isinstance(validation, int):
        held_out, training = _held_out(training, validation)
    else:
        held_out = Images(*validation, mean, std)
    if train is not None:
        training = _taken(training, train)
    if shift < 0 or shift > min(pixels[0].shape[2:]):
        raise DataError(f"shift must lie in 0..{min(pixels[0].shape[2:])}, the size of the images, but got {shift}.")
    return Splits(
        train=replace(training, flip=flip, shift=shift),
        validation=held_out,
        test=Images(pixels[1], labels[1], mean, std),
        classes=classes,
        about=f"{about}, {len(training):,} / {len(held_out):,} / {len(labels[1]):,} images for training / validation / test",
    )


def _held_out(images: Images, validation: int) -> tuple[Images, Images]:
    """`validation` of the images, and the rest."""
    count, classes = len(images), len(images.labels.unique())
    if not classes <= validation <= count - classes:
        raise DataError(
            f"validation must lie in {classes}..{count - classes} for {count:,} training images, so that both parts can hold "
            f"an image of each class, but got {validation}."
        )
    held_out, rest = _stratified("validation", images.labels, validation)
    return images.only(held_out), images.only(rest)


def _taken(images: Images, train: int) -> Images:
    available, classes = len(images), len(images.labels.unique())
    if not classes <= train <= available - classes and train != available:
        raise DataError(
            f"train must lie in {classes}..{available - classes:,}, or be {available:,} for all images that are not held out, "
            f"but got {train:,}."
        )
    return images.only(_stratified("train", images.labels, train)[0])


def _stratified(part: str, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sorted indices of `count` inputs, stratified by class, and the sorted indices of the rest."""
    if count == len(labels):
        return torch.arange(count), torch.arange(0)
    if rare := (torch.bincount(labels) == 1).nonzero().flatten().tolist():
        raise DataError(
            f"Each class must have at least two images to be split, but class {rare[0]} has one; add some, or remove the class."
        )
    # Imported here: it takes over a second, which workers of studies with other data should not spend.
    from sklearn.model_selection import train_test_split

    parts = train_test_split(range(len(labels)), train_size=count, stratify=labels, random_state=SPLIT_SEED)
    taken, rest = (torch.tensor(sorted(numbers)) for numbers in parts)
    if missing := set(labels.tolist()) - set(labels[taken].tolist()):
        raise DataError(
            f"{part} must include an image of each class, but {count:,} of {len(labels):,} include none of class "
            f"{min(missing)}; raise {part}."
        )
    return taken, rest
