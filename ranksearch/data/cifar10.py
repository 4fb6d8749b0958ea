"""CIFAR-10: 60,000 colour images of 32x32 pixels in ten classes (Krizhevsky 2009)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ranksearch.data.images import Images
from ranksearch.data.splits import Splits
from ranksearch.errors import DataError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of each channel over the training images."""
VALIDATION = 0.1
"""Share of the training images that is set aside."""
SPLIT_SEED = 0
"""Which ones is part of the data set, not of a study's randomness."""


def cifar10(*, root: str = "data", train: int | None = None, augment: bool = True, download: bool = False) -> Splits:
    """45,000 / 5,000 / 10,000 images for training / validation / test; every part has the same number from each class.

    Reads what torchvision downloads (`cifar-10-batches-py`), or a folder of pictures `cifar10/{train,test}/<class>/*`.

    Args:
        root: the folder that holds either, relative to where the command runs.
        train: take so many of the training images only.
        augment: flip and shift training images at random.
        download: fetch the data by torchvision, into `root`, where it is not there.

    Raises:
        DataError: the data is not there, a picture cannot be used, or `train` is not between 10 and 45,000.
    """
    # Here, since they take seconds to import, in every worker, whatever data the study has.
    from sklearn.model_selection import train_test_split
    from torchvision.datasets import CIFAR10

    folder = Path(root)
    if (folder / CIFAR10.base_folder).is_dir() or download:
        parts = [_torchvision(CIFAR10(root, train=train, download=download)) for train in (True, False)]
        kind = "CIFAR-10"
    elif (folder / "cifar10" / "train").is_dir():
        parts, jpeg = _pictures(folder / "cifar10")
        kind = "CIFAR-10 (a copy in JPEG, which is lossy)" if jpeg else "CIFAR-10"
    else:
        raise DataError(
            f"CIFAR-10 must be in {folder}, but neither {folder / CIFAR10.base_folder} nor {folder / 'cifar10' / 'train'} is "
            "there; put it there, or let torchvision fetch it with task.data_args.download=true."
        )
    (pixels, labels), (test_pixels, test_labels) = parts
    rest, validation = train_test_split(range(len(labels)), test_size=VALIDATION, stratify=labels, random_state=SPLIT_SEED)
    if train is not None and train != len(rest):
        if not 10 <= train < len(rest):
            raise DataError(f"cifar10 has {len(rest)} training images in ten classes, but train={train}; choose in between.")
        rest, _ = train_test_split(rest, train_size=train, stratify=labels[rest], random_state=SPLIT_SEED)
    treated = "flipped and shifted" if augment else "as they are"
    counts = f"{len(rest):,} / {len(validation):,} / {len(test_labels):,}"
    return Splits(
        train=Images(pixels[rest], labels[rest], mean=MEAN, std=STD, augment=augment),
        validation=Images(pixels[validation], labels[validation], mean=MEAN, std=STD),
        test=Images(test_pixels, test_labels, mean=MEAN, std=STD),
        classes=10,
        about=f"{kind}, {counts} images for training / validation / test, {treated}",
    )


def _torchvision(found: object) -> tuple[Tensor, Tensor]:
    pixels, labels = np.asarray(found.data), found.targets  # type: ignore[attr-defined]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _pictures(folder: Path) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """The parts train and test, decoded, and whether any picture is a JPEG."""
    from torchvision.datasets import ImageFolder

    parts, jpeg = [], False
    for name in ("train", "test"):
        found = ImageFolder(str(folder / name))
        pixels = torch.empty((len(found), 3, 32, 32), dtype=torch.uint8)
        for place, (picture, _) in enumerate(found):
            if picture.size != (32, 32):
                path = found.samples[place][0]
                raise DataError(f"CIFAR-10's pictures must have 32x32 pixels, but {path} has {picture.width}x{picture.height}.")
            pixels[place] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        parts.append((pixels, torch.tensor(found.targets)))
        jpeg |= any(Path(path).suffix.lower() in (".jpg", ".jpeg") for path, _ in found.samples)
    return parts, jpeg
