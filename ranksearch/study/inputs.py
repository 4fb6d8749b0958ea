"""A fingerprint of a study's inputs: statistics of its data, and the digest of its dense model's initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from ranksearch.data import Splits, batches, part, size
from ranksearch.support.nesting import tensors_in
from ranksearch.support.seeds import seeded

COMPARED_INPUTS = 16
"""How many inputs of a split are compared. Reading an image takes milliseconds."""


def inputs_of(splits: Splits, dense: str | None) -> dict[str, Any]:
    """The fingerprint of a study's inputs, as JSON: each split's size and the root mean square of its values.

    `dense` is the digest of the model's weights before any training, or None if they are random or their file is missing.
    """
    fingerprint: dict[str, Any] = {name: _values_of(getattr(splits, name)) for name in ("train", "validation", "test")}
    return fingerprint if dense is None else fingerprint | {"dense": dense}


def _values_of(split: Dataset[Any]) -> dict[str, float]:
    """The number of inputs in a split, and the root mean squares of a few inputs and of their targets.

    Only the number if the split reads differently under different seeds, as with random augmentation.
    """
    first, again = (_root_mean_squares(split, seed) for seed in (0, 1))
    return {"count": size(split)} | (first if first == again else {})


def _root_mean_squares(split: Dataset[Any], seed: int) -> dict[str, float]:
    # Spread evenly, so that a split sorted by class contributes inputs of each class.
    few = part(split, torch.arange(0, size(split), max(1, size(split) // COMPARED_INPUTS))[:COMPARED_INPUTS])
    with seeded(seed):
        inputs, targets = zip(*batches(few, COMPARED_INPUTS), strict=True)
    return {"inputs": _root_mean_square(inputs), "targets": _root_mean_square(targets)}


def _root_mean_square(parts: tuple[Any, ...]) -> float:
    """The root mean square of all values that are not NaN: a NaN target marks an unknown value."""
    values = [tensor.flatten().double() for tensor in tensors_in(parts)]
    return float(torch.cat(values).square().nanmean().sqrt()) if values else 0.0
