"""The limits that a study's models must keep: a least score, and bounds on their size that are known before training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Costed(Protocol):
    """Something with costs: a layer, a way to store it, a whole model."""

    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...


class Sized(Costed, Protocol):
    """A whole model, whose ratio is known."""

    @property
    def ratio(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each bound is None where there is none. Scores are validation scores."""

    min_score: float | None = None
    min_ratio: float | None = None
    max_params: int | None = None
    max_macs: int | None = None

    @classmethod
    def of(cls, search: Mapping[str, Any]) -> Limits:
        """From a study's section `search`; studies of older releases do not name them."""
        return cls(**{entry.name: search.get(entry.name) for entry in dataclasses.fields(cls)})

    def excess(self, size: Sized, score: float | None = None) -> float:
        """How far a model lies outside: 0 within, and the larger the farther.

        The logarithms of the factors by which it is too large, and the score that it lacks; without a score the size alone
        is judged.
        """
        factors = [
            self.min_ratio / size.ratio if self.min_ratio else 0.0,
            size.params / self.max_params if self.max_params else 0.0,
            size.macs / self.max_macs if self.max_macs else 0.0,
        ]
        lacking = 0.0 if score is None or self.min_score is None else self.min_score - score
        return sum(math.log(factor) for factor in factors if factor > 1) + max(0.0, lacking)

    def __bool__(self) -> bool:
        return self != UNLIMITED

    def __str__(self) -> str:
        given = ((name, value) for name, value in dataclasses.asdict(self).items() if value is not None)
        return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:g}" for name, value in given)


UNLIMITED = Limits()
