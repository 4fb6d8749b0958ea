"""Data sets in three splits, and batches of a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ranksearch.data.batched import Batched
from ranksearch.errors import DataError, first_line
from ranksearch.support.batch import batch_to, concatenate, tensors_in
from ranksearch.support.seeds import CPU, seeded


@dataclass(frozen=True)
class Splits:
    """The data of a study; the function that `task.data` names returns it.

    Each split is a map-style `torch.utils.data.Dataset` of pairs (input, target). Batches of a `TensorDataset` or a `Batched`
    are made by indexing, not input by input, which is much faster for small inputs. `classes` is None if targets are not class
    labels.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: int | None
    about: str
    """One sentence that describes the data."""


def size(split: Dataset[Any]) -> int:
    """The number of inputs in a split."""
    return len(split)  # type: ignore[arg-type]


def example(split: Dataset[Any]) -> Any:
    """The split's first input as a batch of one."""
    return next(batches(split, 1))[0]


def sample(split: Dataset[Any], count: int, *, seed: int) -> Dataset[Any]:
    """A random sample of `count` inputs of a split, in the split's order; the whole split if it holds no more."""
    if size(split) <= count:
        return split
    return part(split, torch.randperm(size(split), generator=torch.Generator().manual_seed(seed))[:count].sort().values)


def part(split: Dataset[Any], chosen: Tensor) -> Dataset[Any]:
    """The part of a split with the indices `chosen` (count,)."""
    if isinstance(split, Batched):
        return split.only(chosen)
    if type(split) is TensorDataset:
        return TensorDataset(*(tensor[chosen] for tensor in split.tensors))
    return Subset(split, chosen.tolist())


def at_once(split: Dataset[Any], batch_size: int) -> int:
    """The size of a split's batches: `batch_size`, or less if the split limits it because its inputs are large."""
    limit = split.at_once if isinstance(split, Batched) else None
    return min(batch_size, limit or batch_size)


def batches(
    split: Dataset[Any], batch_size: int, *, generator: torch.Generator | None = None, device: torch.device = CPU
) -> Iterator[Any]:
    """Batches (inputs, targets) of a split on `device`, in order, or shuffled by `generator`."""
    count = size(split)
    # Only exactly TensorDataset: a subclass may transform inputs in its own __getitem__.
    if type(split) is TensorDataset or isinstance(split, Batched):
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        batch_size = at_once(split, batch_size)
        for start in range(0, count, batch_size):
            chosen = order[start : start + batch_size]
            if generator is not None and _lonely(len(chosen), batch_size, count):
                continue
            if isinstance(split, Batched):
                yield split.batch(chosen, device)
            else:
                yield batch_to(tuple(tensor[chosen] for tensor in split.tensors), device)
    else:
        for batch in DataLoader(split, batch_size=batch_size, shuffle=generator is not None, generator=generator):
            if generator is None or not _lonely(len(tensors_in(batch)[0]), batch_size, count):
                yield batch_to(batch, device)


def _lonely(inputs: int, size: int, count: int) -> bool:
    """Whether a shuffled batch is a leftover of one input. It is dropped: batch normalisation cannot train on one input."""
    return inputs == 1 < min(size, count)


def sample_inputs(split: Dataset[Any], count: int, *, seed: int) -> Any:
    """The inputs of `sample` as one batch; random transforms depend only on the seed too."""
    with seeded(seed):
        return concatenate([inputs for inputs, _ in batches(sample(split, count, seed=seed), count)])


def check_splits(splits: Splits, *, every_batch: bool = True) -> None:
    """Refuse data on which a study would fail later; checks all of it, or only the first batch of each split.

    Raises:
        DataError: a split is empty or not a readable map-style Dataset of pairs of tensors, inputs are not finite, or targets
            are not integers below `classes`.
    """
    if splits.classes is not None and not isinstance(splits.classes, Integral):
        raise DataError(f"Splits.classes must be the number of classes or None, but got {splits.classes!r}.")
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        if not isinstance(split, Dataset) or isinstance(split, IterableDataset) or not hasattr(split, "__len__"):
            raise DataError(f"Each split must be a map-style Dataset, but {name!r} is a {type(split).__name__}.")
        if size(split) == 0:
            raise DataError(f"Each split must hold at least one input, but {name!r} is empty.")
        for batch in _readable(name, split) if every_batch else islice(_readable(name, split), 1):
            if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
                raise DataError(f"A split must hold pairs (input, target) of tensors or numbers, but {name!r} does not.")
            inputs, targets = batch
            if inputs.is_floating_point() and not torch.isfinite(inputs).all():
                raise DataError(f"Inputs must be finite, but split {name!r} holds NaN or infinity.")
            if splits.classes is not None:
                _check_labels(name, targets, splits.classes)


def _readable(name: str, split: Dataset[Any]) -> Iterator[Any]:
    """The batches of a split; any exception while reading them is a `DataError`."""
    try:
        yield from batches(split, 512)
    except Exception as error:  # a user's Dataset may raise any exception, for example on a damaged picture
        uncollatable = any(sign in str(error) for sign in ("default_collate", "equal size"))
        fix = "; for pictures, add Resize and ToTensor." if uncollatable else ""
        raise DataError(
            f"A split must be readable in batches, but {name!r} raised {type(error).__name__}: {first_line(error)}{fix}"
        ) from error


def _check_labels(name: str, targets: Tensor, classes: int) -> None:
    if targets.is_floating_point() or targets.dim() != 1:
        raise DataError(
            f"Targets must be one integer class number per input, but split {name!r} holds {targets.dtype} of shape "
            f"{tuple(targets.shape)}; for other targets give classes=None and your own loss and score."
        )
    outside = targets[(targets < 0) | (targets >= classes)]
    if len(outside):
        raise DataError(
            f"Targets must lie in 0..{classes - 1}, but split {name!r} holds {int(outside[0])}; correct the targets or "
            "the number of classes."
        )
