"""Data sets in three splits, and batches of a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ranksearch.data.batched import Batched
from ranksearch.data.collated import Collate, Collated, collate_nested
from ranksearch.support.batch import batch_to, concatenate
from ranksearch.support.seeds import CPU, seeded

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The data of a study; the function that `task.data` names returns it.

    Each split is a map-style `torch.utils.data.Dataset` of pairs (input, target), each a tensor, or tensors nested in tuples,
    lists and dicts. A tuple of inputs holds the arguments of the model, a dict its arguments by name. Batches of a
    `TensorDataset` or a `Batched` are made by indexing, not input by input, which is much faster for small inputs. `classes` is
    None if targets are not class labels.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: int | None
    about: str
    """One sentence that describes the data."""
    collate: Collate | None = None
    """Makes a batch (inputs, targets) of a list of pairs, as a DataLoader's `collate_fn`; None for torch's own rule. A list in
    the batch has one entry for each input, such as images of several sizes; tuples and dicts nest tensors."""

    def __post_init__(self) -> None:
        if self.collate is not None:
            for name in SPLITS:
                split = getattr(self, name)
                if not isinstance(split, Collated):
                    object.__setattr__(self, name, Collated(split, self.collate))


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
    if isinstance(split, Collated):
        return replace(split, split=part(split.split, chosen))
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
        collate = split.collate if isinstance(split, Collated) else collate_nested
        loader = DataLoader(split, batch_size, shuffle=generator is not None, generator=generator, collate_fn=collate)
        for start, batch in zip(range(0, count, batch_size), loader, strict=True):
            if generator is None or not _lonely(min(batch_size, count - start), batch_size, count):
                yield batch_to(batch, device)


def _lonely(inputs: int, size: int, count: int) -> bool:
    """Whether a shuffled batch is a leftover of one input. It is dropped: batch normalisation cannot train on one input."""
    return inputs == 1 < min(size, count)


def sample_inputs(split: Dataset[Any], count: int, *, seed: int) -> Any:
    """The inputs of `sample` as one batch; random transforms depend only on the seed too."""
    with seeded(seed):
        return concatenate([inputs for inputs, _ in batches(sample(split, count, seed=seed), count)])
