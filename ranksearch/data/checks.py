"""Checks of a study's data, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from numbers import Integral, Number
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ranksearch.data.batched import Batched
from ranksearch.data.collated import Collated
from ranksearch.data.splits import SPLITS, Splits, batches, size
from ranksearch.errors import DataError, first_line
from ranksearch.support.batch import batch_shapes, sizes_in
from ranksearch.support.nesting import PerInput, nesting, parts_of, tensors_in

BATCH_SIZE, COLLATED_BATCH_SIZE = 512, 32
"""Inputs that are read at once, and of a split with a collate function, whose inputs may be large."""


def check_splits(splits: Splits, *, every_batch: bool = True) -> None:
    """Refuse data on which a study would fail later; checks all of it, or only the first batch of each split.

    Raises:
        DataError: a split is empty or not a readable map-style Dataset of pairs of nested tensors, its batches are not nested
            alike, inputs are not finite, or targets are not integers below `classes`.
    """
    if splits.classes is not None and not isinstance(splits.classes, Integral):
        raise DataError(f"Splits.classes must be the number of classes or None, but got {splits.classes!r}.")
    wanted = ""
    for name in SPLITS:
        _check_kind(name, getattr(splits, name))
        found = _readable(name, getattr(splits, name))
        for batch in found if every_batch else islice(found, 1):
            _check_batch(name, batch)
            wanted = wanted or nesting(tuple(batch))
            if nesting(tuple(batch)) != wanted:
                raise DataError(
                    f"All batches must be nested alike, but one of split {name!r} is {nesting(tuple(batch))} and the first of "
                    f"'train' is {wanted}; let every sample have the same keys and lengths."
                )
            if splits.classes is not None:
                _check_labels(name, batch[1], splits.classes)


def _check_kind(name: str, split: Any) -> None:
    kept = split.split if isinstance(split, Collated) else split
    if not isinstance(kept, Dataset) or isinstance(kept, IterableDataset) or not hasattr(kept, "__len__"):
        raise DataError(f"Each split must be a map-style Dataset, but {name!r} is a {type(kept).__name__}.")
    if isinstance(split, Collated) and isinstance(kept, Batched):
        raise DataError(
            f"Splits.collate is for splits that give one input at a time, but {name!r} is a {type(kept).__name__}, which makes "
            "batches itself; leave it out."
        )
    if size(kept) == 0:
        raise DataError(f"Each split must hold at least one input, but {name!r} is empty.")


def _readable(name: str, split: Dataset[Any]) -> Iterator[Any]:
    """The batches of a split; any exception while reading them is a `DataError`."""
    try:
        yield from batches(split, COLLATED_BATCH_SIZE if isinstance(split, Collated) else BATCH_SIZE)
    except DataError:
        raise
    except Exception as error:  # a user's Dataset may raise any exception, for example on a damaged picture
        uncollatable = any(sign in str(error) for sign in ("default_collate", "equal size"))
        fix = "; for pictures, add Resize and ToTensor; for others give Splits a collate function." if uncollatable else ""
        raise DataError(
            f"A split must be readable in batches, but {name!r} raised {type(error).__name__}: {first_line(error)}{fix}"
        ) from error


def _check_batch(name: str, batch: Any) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(map(_holds_numbers, batch)):
        raise DataError(f"A split must hold pairs (input, target) of tensors or numbers, but {name!r} does not.")
    if not sizes_in(batch[0]) or len(sizes_in(tuple(batch))) != 1:
        raise DataError(
            f"The first dimension of each tensor must count the inputs of a batch, but a batch of split {name!r} has the "
            f"shapes {batch_shapes(tuple(batch))}; correct its data set or its collate function."
        )
    if not all(torch.isfinite(tensor).all() for tensor in tensors_in(batch[0]) if tensor.is_floating_point()):
        raise DataError(f"Inputs must be finite, but split {name!r} holds NaN or infinity.")


def _holds_numbers(batch: Any) -> bool:
    """Whether a batch holds only tensors and numbers; a list with an entry for each input may hold anything."""
    if isinstance(batch, PerInput):
        return True
    parts = parts_of(batch)
    return batch is None or isinstance(batch, (Tensor, Number)) if parts is None else all(map(_holds_numbers, parts.values()))


def _check_labels(name: str, targets: Any, classes: int) -> None:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() != 1:
        held = f"{targets.dtype} of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else nesting(targets)
        raise DataError(
            f"Targets must be one integer class number per input, but split {name!r} holds {held}; for other targets give "
            "classes=None and your own loss and score."
        )
    outside = targets[(targets < 0) | (targets >= classes)]
    if len(outside):
        raise DataError(
            f"Targets must lie in 0..{classes - 1}, but split {name!r} holds {int(outside[0])}; correct the targets or "
            "the number of classes."
        )
