"""The handwritten digits that come with scikit-learn: 1,797 real images of 8x8 pixels (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from ranksearch.data.splits import Splits

SPLIT_SEED = 0
"""The seed of the split. It is fixed, so that studies with different seeds are compared on the same images."""


def digits(*, size: int = 32) -> Splits:
    """Digits resized to `size` x `size`, one channel, values about -1..1; 60 % train, 20 % validation, 20 % test.

    The splits are stratified by class and the same in every run.
    """
    # Imported here: it takes over a second, which workers of studies with other data should not spend.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False) * 2 - 1
    labels = torch.from_numpy(raw.target).long()
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=SPLIT_SEED)
    parts = [TensorDataset(images[chosen], labels[chosen]) for chosen in (train, validation, test)]
    counts = " / ".join(f"{len(part):,}" for part in parts)
    about = f"scikit-learn's handwritten digits, {counts} images for training / validation / test, resized to {size}x{size}"
    return Splits(parts[0], parts[1], parts[2], classes=10, about=about)
