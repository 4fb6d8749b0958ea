"""What a study is made from: its data and the weights that its dense model starts with, in a few numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ranksearch.data import Splits, batches, part, size
from ranksearch.support.seeds import seeded

SAMPLED = 16
"""Inputs of a split that are compared; reading pictures takes milliseconds each."""


def inputs_of(splits: Splits, dense: str | None) -> dict[str, Any]:
    """What tells the inputs of a study from others, as JSON: of each split its size and how large its values are.

    `dense` is the digest of the model's weights before any training; None where these are not given but drawn at random, or
    cannot be read any more.
    """
    found: dict[str, Any] = {name: _values_of(getattr(splits, name)) for name in ("train", "validation", "test")}
    return found if dense is None else found | {"dense": dense}


def _values_of(split: Dataset[Any]) -> dict[str, float]:
    """How many inputs a split holds, and the root mean square of a few and of their targets; of a split that reads differently
    each time, as an augmented one does, the number alone."""
    first, again = (_root_mean_squares(split, seed) for seed in (0, 1))
    return {"count": size(split)} | (first if first == again else {})


def _root_mean_squares(split: Dataset[Any], seed: int) -> dict[str, float]:
    # Spread evenly, so that each class of a split that is sorted by them is met.
    few = part(split, torch.arange(0, size(split), max(1, size(split) // SAMPLED))[:SAMPLED])
    with seeded(seed):
        inputs, targets = zip(*batches(few, SAMPLED), strict=True)
    return {"inputs": _root_mean_square(inputs), "targets": _root_mean_square(targets)}


def _root_mean_square(parts: tuple[Tensor, ...]) -> float:
    """Of all that is known: a target may be NaN."""
    return float(torch.cat([part.flatten() for part in parts]).double().square().nanmean().sqrt())
