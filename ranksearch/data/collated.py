"""How single inputs become a batch: by torch's rule, or by a collate function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.utils.data import Dataset
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from ranksearch.errors import DataError, first_line
from ranksearch.support.nesting import PerInput, parts_of, rebuilt

Collate: TypeAlias = Callable[[list[Any]], Any]
"""A list of pairs (input, target) -> a batch (inputs, targets)."""


@dataclass(frozen=True, eq=False)
class Collated(Dataset[Any]):
    """A split whose batches a user's collate function makes."""

    split: Dataset[Any]
    function: Collate

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.split[index]

    def collate(self, samples: list[Any]) -> Any:
        """The batch (inputs, targets) of these samples, with `PerInput` in the place of its lists.

        Raises:
            DataError: the function fails, does not return a pair, or returns a list without an entry for each input.
        """
        try:
            batch = self.function(samples)
        except Exception as error:  # a user's function may raise anything
            raise DataError(
                f"Splits.collate must make a batch of any samples, but of {len(samples)} it raised {type(error).__name__}: "
                f"{first_line(error)}; correct the function."
            ) from error
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            held = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise DataError(
                f"Splits.collate must return a pair (inputs, targets), but returned a {type(batch).__name__}{held}; correct "
                "the function."
            )
        return tuple(_per_input(part, len(samples)) for part in batch)


def _per_input(batch: Any, count: int) -> Any:
    if isinstance(batch, list):
        if len(batch) != count:
            raise DataError(
                f"A list that Splits.collate returns must have an entry for each input, but has {len(batch)} for {count} "
                "inputs; return a tuple or a dict to nest tensors."
            )
        return PerInput(batch)
    parts = parts_of(batch)
    return batch if parts is None else rebuilt(batch, {name: _per_input(part, count) for name, part in parts.items()})


def collate_nested(samples: list[Any]) -> Any:
    """torch's default collate function, but tuples, which hold the arguments of a model, stay tuples."""
    return collate(samples, collate_fn_map={**default_collate_fn_map, tuple: _collate_tuples})


def _collate_tuples(samples: Sequence[tuple[Any, ...]], *, collate_fn_map: Mapping[Any, Any]) -> Any:
    first = samples[0]
    columns = zip(*samples, strict=True)
    return rebuilt(first, dict(enumerate(collate(list(column), collate_fn_map=dict(collate_fn_map)) for column in columns)))
