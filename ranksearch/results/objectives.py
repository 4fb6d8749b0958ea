"""Objectives of a study: the score, and the compression in each cost that the study minimises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ranksearch.results.costs import Costed


@dataclass(frozen=True)
class Objectives:
    """The score, and log10 of the ratio dense / compressed for each cost in `minimize`; all are maximised.

    Logarithms make 10x -> 20x worth as much as 50x -> 100x. With plain ratios the smallest models would make up nearly all
    of the hypervolume.
    """

    minimize: tuple[str, ...] = ("params",)
    dense: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Costs of the dense model, by name."""

    @classmethod
    def of(cls, search: Mapping[str, Any], dense: Costed) -> Objectives:
        """The objectives of a study, from its section `search` and its dense model."""
        return cls(tuple(search["minimize"]), dense.costs)

    @property
    def directions(self) -> list[Literal["maximize"]]:
        """The directions of the Optuna study."""
        return ["maximize"] * (1 + len(self.minimize))

    @property
    def reference(self) -> tuple[float, ...]:
        """Reference point of the hypervolume in the costs: a ratio of 1x, so log10 = 0, for each."""
        return (0.0,) * len(self.minimize)

    def only(self, cost: str) -> Objectives:
        """The objectives with this one cost."""
        return Objectives((cost,), self.dense)

    def measured(self, size: Costed) -> bool:
        """Whether a model has a value for every minimised cost; a cost that is measured last has no value before."""
        return all(cost in size.costs for cost in self.minimize)

    def ratios(self, size: Costed) -> tuple[float, ...]:
        """The ratio dense / compressed in each minimised cost; NaN if it is not measured."""
        return tuple(self.dense[cost] / size.costs.get(cost, math.nan) for cost in self.minimize)

    def ratio(self, size: Costed) -> float:
        """The geometric mean of `ratios`; models are sorted by it."""
        ratios = self.ratios(size)
        return ratios[0] if len(ratios) == 1 else math.prod(ratios) ** (1 / len(ratios))

    def point(self, score: float, size: Costed) -> tuple[float, ...]:
        """The model as a point: its score, then log10 of each ratio."""
        return (score, *map(math.log10, self.ratios(size)))


@dataclass(frozen=True)
class Price:
    """Price per unit of each cost, which turns several costs into one number."""

    units: Mapping[str, float] = field(hash=False)

    def of(self, size: Costed) -> float:
        """The sum of a model's costs, each times its price."""
        return sum(price * size.costs[cost] for cost, price in self.units.items())


PER_PARAMETER = Price({"params": 1.0})


def prices(minimize: Sequence[str], dense: Costed) -> list[Price]:
    """The prices that predicted fronts are solved for.

    For one cost: that cost. For several: their sum, scaled so that the dense model costs 1 in each, then each alone.
    """
    alone = [Price({cost: 1.0}) for cost in minimize]
    return alone if len(alone) == 1 else [Price({cost: 1 / dense.costs[cost] for cost in minimize}), *alone]
