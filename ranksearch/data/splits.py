"""A data set in three splits, and the batches that it is taken in."""

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
    """Data for a study, as a `data` reference returns it.

    Each split is any map-style `torch.utils.data.Dataset` of (input, target); a `TensorDataset` and a `Batched` are cut
    into batches as a whole, which is far quicker for small inputs. `classes` is None where targets are no class labels.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: int | None
    about: str
    """One sentence: what the data is."""


def size(split: Dataset[Any]) -> int:
    """How many inputs stand in a split."""
    return len(split)  # type: ignore[arg-type]


def example(split: Dataset[Any]) -> Any:
    """A batch of the split's first input."""
    return next(batches(split, 1))[0]


def sample(split: Dataset[Any], count: int, *, seed: int) -> Dataset[Any]:
    """`count` inputs of a split, drawn without repeats and in the split's order; the whole split if it holds no more."""
    if size(split) <= count:
        return split
    return part(split, torch.randperm(size(split), generator=torch.Generator().manual_seed(seed))[:count].sort().values)


def part(split: Dataset[Any], chosen: Tensor) -> Dataset[Any]:
    """The split of the inputs with the numbers `chosen` (count,) alone."""
    if isinstance(split, Batched):
        return split.only(chosen)
    if type(split) is TensorDataset:
        return TensorDataset(*(tensor[chosen] for tensor in split.tensors))
    return Subset(split, chosen.tolist())


def at_once(split: Dataset[Any], batch_size: int) -> int:
    """How many inputs a batch of a split holds: as many as are asked for, or fewer where they are large."""
    most = split.at_once if isinstance(split, Batched) else None
    return min(batch_size, most or batch_size)


def batches(
    split: Dataset[Any], batch_size: int, *, generator: torch.Generator | None = None, device: torch.device = CPU
) -> Iterator[Any]:
    """Batches (inputs, targets) of a split on `device`: in order, or shuffled when a generator is given."""
    count = size(split)
    # Not of a subclass: its own __getitem__ may transform.
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
        for found in DataLoader(split, batch_size=batch_size, shuffle=generator is not None, generator=generator):
            if generator is None or not _lonely(len(tensors_in(found)[0]), batch_size, count):
                yield batch_to(found, device)


def _lonely(inputs: int, size: int, count: int) -> bool:
    """A last shuffled batch of one input: batch normalisation cannot train on it, and the next epoch leaves out another."""
    return inputs == 1 < min(size, count)


def sample_inputs(split: Dataset[Any], count: int, *, seed: int) -> Any:
    """The inputs of `sample` as one batch; what their transforms draw at random follows the seed too."""
    with seeded(seed):
        return concatenate([inputs for inputs, _ in batches(sample(split, count, seed=seed), count)])


def check_splits(splits: Splits, *, whole: bool = True) -> None:
    """Refuse data that a study would stumble over later; all of it, or the first batch of each split.

    Raises:
        DataError: an empty split, inputs that are not finite, or targets that are not whole numbers below `classes`.
    """
    if splits.classes is not None and not isinstance(splits.classes, Integral):
        raise DataError(f"Splits.classes must be None or how many there are, a whole number, but got {splits.classes!r}.")
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        if not isinstance(split, Dataset) or isinstance(split, IterableDataset) or not hasattr(split, "__len__"):
            raise DataError(f"Each split must be a map-style Dataset, but {name!r} is a {type(split).__name__}.")
        if size(split) == 0:
            raise DataError(f"Each split must hold at least one input, but {name!r} is empty.")
        for found in _readable(name, split) if whole else islice(_readable(name, split), 1):
            if len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
                raise DataError(f"A split must hold pairs (input, target) of tensors or numbers, but {name!r} does not.")
            inputs, targets = found
            if inputs.is_floating_point() and not torch.isfinite(inputs).all():
                raise DataError(f"Inputs must be finite, but split {name!r} holds NaN or infinity.")
            if splits.classes is not None:
                _check_labels(name, targets, splits.classes)


def _readable(name: str, split: Dataset[Any]) -> Iterator[Any]:
    """All of a split; what torch cannot make batches of is the data's fault."""
    try:
        yield from batches(split, 512)
    except Exception as error:  # of a user's data set, as of a picture that is none
        odd = any(sign in str(error) for sign in ("default_collate", "equal size"))
        fix = "; for pictures, add Resize and ToTensor." if odd else ""
        raise DataError(
            f"A split must be readable in batches, but {name!r} raised {type(error).__name__}: {first_line(error)}{fix}"
        ) from error


def _check_labels(name: str, targets: Tensor, classes: int) -> None:
    if targets.is_floating_point() or targets.dim() != 1:
        raise DataError(
            f"Targets must be whole class numbers, one an input, but split {name!r} holds {targets.dtype} of shape "
            f"{tuple(targets.shape)}; for other targets give classes=None and your own loss and score."
        )
    outside = targets[(targets < 0) | (targets >= classes)]
    if len(outside):
        raise DataError(
            f"Targets must lie in 0..{classes - 1}, but split {name!r} holds {int(outside[0])}; mend the targets or the "
            "number of classes."
        )
