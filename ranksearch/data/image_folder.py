"""Anyone's pictures, one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ranksearch.data.folders import read_pictures
from ranksearch.data.images import split_images
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError


def image_folder(
    *, root: str, size: int = 64, gray: bool = False, train_folder: str = "train", test_folder: str = "test",
    train: int | None = None, validation: int | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, flip: bool = True, shift: int = 0,
) -> Splits:  # fmt: skip
    """Pictures as `root/{train,test}/<class>/<any name>.jpg`, torchvision's ImageFolder layout; decoded once.

    Args:
        root: holds the folders; relative to the folder the command runs in.
        size: pixels of a side; pictures are scaled to it by their shorter side and cut to the square in the middle.
        gray: one channel instead of three.
        train_folder: what holds the pictures for training and validation.
        test_folder: what holds those for test.
        train: how many to train on, stratified by class; all but those for validation by default.
        validation: how many of the training pictures are held out; a tenth by default.
        mean: of each channel in 0..1, for normalisation; that of the training pictures by default.
        std: the standard deviation of each channel, likewise.
        flip: mirror half of the training pictures, anew in each batch.
        shift: move each training picture by up to so many pixels both ways; what moves in is black.

    Raises:
        DataError: the pictures are not there, or cannot be read, or are too few; or `mean` or `std` is not one a channel.
    """
    if size < 1:
        raise DataError(f"size must be at least 1, but got {size}.")
    channels = 1 if gray else 3
    if (mean is None) != (std is None) or any(len(given) != channels for given in (mean, std) if given is not None):
        raise DataError(f"mean and std must both be given, {channels} numbers each, or neither, but got {mean} and {std}.")
    if std is not None and min(std) <= 0:
        raise DataError(f"std must be above 0, but got {std}.")
    known, tested = (read_pictures(Path(root) / name, size=size, mode="L" if gray else "RGB")
                     for name in (train_folder, test_folder))  # fmt: skip
    if known.classes != tested.classes:
        odd = sorted(set(known.classes) ^ set(tested.classes))
        raise DataError(f"{train_folder} and {test_folder} in {root} must hold the same classes, but {odd[0]!r} is in one.")
    given = (torch.tensor(mean), torch.tensor(std)) if mean is not None and std is not None else None
    return split_images(
        (known.pixels, tested.pixels), (known.labels, tested.labels), classes=len(known.classes),
        about=f"pictures of {root} at {size}x{size}", train=train,
        validation=max(len(known.classes), len(known.labels) // 10) if validation is None else validation,
        flip=flip, shift=shift, normalisation=given,
    )  # fmt: skip
