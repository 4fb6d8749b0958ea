"""CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32x32 pixels in ten classes, 10,000 of them test images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ranksearch.data.folders import read_pictures
from ranksearch.data.images import split_images
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError, first_line

SIDE = 32
PICKLES = "cifar-10-batches-py"
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


def cifar10(
    *, root: str = "data", train: int | None = None, validation: int = 5000, flip: bool = True, shift: int = 4,
    download: bool = False,
) -> Splits:  # fmt: skip
    """CIFAR-10 from `root`: images of three channels, 32x32 pixels, normalised by channel.

    Args:
        root: a folder with torchvision's `cifar-10-batches-py`, or with pictures as `cifar10/{train,test}/<class>/*.jpg`; a
            relative path starts at the folder the command runs in.
        train: how many images to train on, stratified by class; by default all that are not held out.
        validation: how many training images to hold out for validation.
        flip: mirror each training image with a chance of 1/2, drawn anew for each batch.
        shift: move each training image by up to this many pixels along both axes; the exposed border is black.
        download: fetch and verify the archive (163 MiB) if it is missing.

    Raises:
        DataError: the images are missing or damaged, or `train` or `validation` is too large or too small.
    """
    folder = Path(root)
    if download or (folder / PICKLES).is_dir():
        about = "CIFAR-10"
        pixels, labels = zip(*(_pickled(folder, is_train, download) for is_train in (True, False)), strict=True)
    elif (folder / "cifar10" / "train").is_dir():
        about = "CIFAR-10 (JPEG copy)"
        parts = [read_pictures(folder / "cifar10" / name, size=SIDE) for name in ("train", "test")]
        if parts[0].classes != parts[1].classes:
            raise DataError(f"train and test in {folder / 'cifar10'} must hold the same classes, but do not.")
        pixels, labels = (parts[0].pixels, parts[1].pixels), (parts[0].labels, parts[1].labels)
    else:
        raise DataError(
            f"CIFAR-10 must lie in {folder}, but it holds neither {PICKLES} nor cifar10/train; add "
            f"`--set task.data_args.download=true`, or unpack {ARCHIVE} there."
        )
    return split_images(pixels, labels, classes=10, about=about, train=train, validation=validation, flip=flip, shift=shift)


def _pickled(folder: Path, is_train: bool, download: bool) -> tuple[Tensor, Tensor]:
    # Imported here: it takes seconds, which workers of studies with other data should not spend.
    from torchvision.datasets import CIFAR10

    try:
        data_set = CIFAR10(str(folder), train=is_train, download=download)
    except (RuntimeError, OSError) as error:
        first = first_line(error)
        raise DataError(f"CIFAR-10 must be readable in {folder}, but: {first} Unpack {ARCHIVE} there again.") from error
    return torch.from_numpy(data_set.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data_set.targets)
