"""Limits on the models of a study: a minimum score, and bounds on costs, which are known before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ranksearch.results.costs import COSTS, Sized


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that a model must keep to be on the front. Scores are validation scores; None means no limit."""

    min_score: float | None = None
    min_ratio: float | None = None
    max_costs: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Largest allowed value of each limited cost, by the cost's name."""

    @classmethod
    def of(cls, search: Mapping[str, Any]) -> Limits:
        """The limits in a study's section `search`: `min_score`, `min_ratio`, and `max_<cost>` for each cost."""
        max_costs = {name: search[cost.limit] for name, cost in COSTS.items() if search.get(cost.limit) is not None}
        return cls(min_score=search.get("min_score"), min_ratio=search.get("min_ratio"), max_costs=max_costs)

    @staticmethod
    def names() -> list[str]:
        """The keys of the section `search` that are limits."""
        return ["min_score", "min_ratio", *(cost.limit for cost in COSTS.values())]

    def to_dict(self) -> dict[str, float | None]:
        """The limits by their keys in the section `search`; None for each that is not set."""
        minima: dict[str, float | None] = {"min_score": self.min_score, "min_ratio": self.min_ratio}
        return minima | {cost.limit: self.max_costs.get(name) for name, cost in COSTS.items()}

    def excess(self, size: Sized, score: float | None = None) -> float:
        """How far a model lies outside the limits; 0 if it keeps them all.

        The sum of the logarithms of the factors by which it is too large, plus the score it lacks. Without a `score` only
        the size counts. A cost that the model has no value for is ignored.
        """
        factors = [self.min_ratio / size.ratio if self.min_ratio else 0.0]
        factors += [size.costs[name] / bound for name, bound in self.max_costs.items() if name in size.costs]
        missing_score = 0.0 if score is None or self.min_score is None else self.min_score - score
        return sum(math.log(factor) for factor in factors if factor > 1) + max(0.0, missing_score)

    def __bool__(self) -> bool:
        return self != UNLIMITED

    def __str__(self) -> str:
        limits = ((name, value) for name, value in self.to_dict().items() if value is not None)
        return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:g}" for name, value in limits)


UNLIMITED = Limits()
