"""The limits that a study's models must keep: a least score, and bounds on their costs that are known before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ranksearch.results.costs import COSTS, Sized


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model must keep to be on the front. Scores are validation scores; a bound is None where there is none."""

    min_score: float | None = None
    min_ratio: float | None = None
    most: Mapping[str, float] = field(default_factory=dict, hash=False)
    """By the name of a cost, the largest value that is allowed; no entry where there is no bound."""

    @classmethod
    def of(cls, search: Mapping[str, Any]) -> Limits:
        """From a study's section `search`: `min_score`, `min_ratio`, and `max_<cost>` for each cost."""
        most = {name: search[cost.limit] for name, cost in COSTS.items() if search.get(cost.limit) is not None}
        return cls(min_score=search.get("min_score"), min_ratio=search.get("min_ratio"), most=most)

    @staticmethod
    def names() -> list[str]:
        """The keys of the section `search` that are limits."""
        return ["min_score", "min_ratio", *(cost.limit for cost in COSTS.values())]

    def to_dict(self) -> dict[str, float | None]:
        """The limits by those keys; None where there is none."""
        found: dict[str, float | None] = {"min_score": self.min_score, "min_ratio": self.min_ratio}
        return found | {cost.limit: self.most.get(name) for name, cost in COSTS.items()}

    def excess(self, size: Sized, score: float | None = None) -> float:
        """How far a model lies outside: 0 within, and the larger the farther.

        The logarithms of the factors by which it is too large, and the score that it lacks; without a score the size alone
        is judged, and without a number for a cost that cost is not.
        """
        factors = [self.min_ratio / size.ratio if self.min_ratio else 0.0]
        factors += [size.costs[name] / bound for name, bound in self.most.items() if name in size.costs]
        lacking = 0.0 if score is None or self.min_score is None else self.min_score - score
        return sum(math.log(factor) for factor in factors if factor > 1) + max(0.0, lacking)

    def __bool__(self) -> bool:
        return self != UNLIMITED

    def __str__(self) -> str:
        given = ((name, value) for name, value in self.to_dict().items() if value is not None)
        return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:g}" for name, value in given)


UNLIMITED = Limits()
