"""A user's pictures, in one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ranksearch.data.folders import class_names, read_pictures
from ranksearch.data.images import split_images
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError

VALIDATION_NAMES = ("val", "valid", "validation")
"""The names by which a validation folder is recognised."""


def image_folder(
    *, root: str, size: int = 64, gray: bool = False, train_folder: str = "train", test_folder: str = "test",
    validation_folder: str | None = None, train: int | None = None, validation: int | None = None,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, flip: bool = True, shift: int = 0,
) -> Splits:  # fmt: skip
    """Pictures in torchvision's ImageFolder layout, `root/{train,val,test}/<class>/<any name>.jpg`; decoded once, then cached.

    Without a validation folder, some training pictures are held out. Hidden files and folders are ignored.

    Args:
        root: the folder with the folders below; a relative path starts at the folder the command runs in.
        size: side in pixels; pictures are scaled so that their shorter side is `size`, and cropped to the central square.
        gray: one channel instead of three.
        train_folder: the folder with the training pictures.
        test_folder: the folder with the test pictures.
        validation_folder: the folder with the validation pictures; by default the one named `val`, `valid` or `validation`, if
            there is one. Give the `train_folder` to hold out training pictures even so.
        train: how many pictures to train on, stratified by class; by default all that are not held out.
        validation: how many training pictures to hold out; by default a tenth.
        mean: mean of each channel in 0..1, for normalisation; by default that of the training pictures.
        std: standard deviation of each channel, likewise.
        flip: mirror each training picture with a chance of 1/2, drawn anew for each batch.
        shift: move each training picture by up to this many pixels along both axes; the exposed border is black.

    Raises:
        DataError: pictures are missing, unreadable or too few; the folders have different classes; `validation` is given
            although there is a validation folder; or `mean` or `std` does not have one number per channel.
    """
    if size < 1:
        raise DataError(f"size must be at least 1, but got {size}.")
    channels = 1 if gray else 3
    if (mean is None) != (std is None) or any(len(values) != channels for values in (mean, std) if values is not None):
        raise DataError(f"mean and std must both be given, {channels} numbers each, or neither, but got {mean} and {std}.")
    if std is not None and min(std) <= 0:
        raise DataError(f"std must be above 0, but got {std}.")
    validation_name = _validation_folder(Path(root), train_folder, test_folder, validation_folder)
    if validation_name is not None and validation is not None:
        raise DataError(
            f"validation = {validation} would hold out pictures of {train_folder}, but {root} has a validation folder, "
            f"{validation_name}; leave out validation, or give validation_folder = {train_folder!r} to ignore that folder."
        )
    names = [train_folder, test_folder, *([validation_name] if validation_name is not None else [])]
    classes = _classes(Path(root), names)
    training, tested, *held = (read_pictures(Path(root) / name, size=size, mode="L" if gray else "RGB") for name in names)
    normalisation = (torch.tensor(mean), torch.tensor(std)) if mean is not None and std is not None else None
    if held:
        held_out: int | tuple[Tensor, Tensor] = (held[0].pixels, held[0].labels)
    else:
        held_out = max(len(classes), len(training.labels) // 10) if validation is None else validation
    return split_images(
        (training.pixels, tested.pixels), (training.labels, tested.labels), classes=len(classes),
        about=_about(root, size, validation_name, [path for each in (training, tested, *held) for path in each.left_out]),
        train=train, validation=held_out, flip=flip, shift=shift, normalisation=normalisation,
    )  # fmt: skip


def _validation_folder(root: Path, train: str, test: str, requested: str | None) -> str | None:
    """The folder with the validation pictures; None if training pictures are held out instead."""
    if Path(test) in (Path(train), Path(requested or train)):
        raise DataError(
            f"The test folder must not be the training or validation folder too, but test_folder = {test!r} is; name another."
        )
    if requested is not None:
        return None if Path(requested) == Path(train) else requested
    existing = [name for name in VALIDATION_NAMES if (root / name).is_dir() and Path(name) not in (Path(train), Path(test))]
    if len(existing) > 1:
        raise DataError(
            f"{root} must have only one validation folder, but has {' and '.join(existing)}; name one of them with "
            "validation_folder."
        )
    if existing and not (root / test).is_dir():
        raise DataError(
            f"Test pictures must lie in {root / test}, but there is no such folder; to test on {existing[0]} and hold out "
            f"pictures of {train} for validation, give test_folder = {existing[0]!r}."
        )
    return existing[0] if existing else None


def _classes(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes, which must be the same in all folders."""
    first, *others = names
    classes = class_names(root / first)
    for other in others:
        theirs = class_names(root / other)
        sides = ((first, set(classes) - set(theirs)), (other, set(theirs) - set(classes)))
        if odd := " and ".join(f"{min(only)!r} is only in {name}" for name, only in sides if only):
            raise DataError(
                f"{first} and {other} in {root} must hold the same classes, but {odd}; rename or delete the folder."
            )
    if len(classes) < 2:
        raise DataError(f"There must be two classes or more, but {root / first} holds one folder, {classes[0]!r}.")
    return classes


def _about(root: str, size: int, validation_name: str | None, left_out: Sequence[Path]) -> str:
    about = f"pictures of {root} at {size}x{size}"
    if left_out:
        files = "1 file that is not a picture" if len(left_out) == 1 else f"{len(left_out):,} files that are not pictures"
        about += f" (ignored: {files}, for example {left_out[0]})"
    return about if validation_name is None else f"{about}, those in {validation_name} for validation"
