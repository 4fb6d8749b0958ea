"""What the models of a study compete in: their score, and how much smaller they are in each cost that it minimises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ranksearch.results.costs import Costed


@dataclass(frozen=True)
class Objectives:
    """The score, and for each cost of `minimize` by how many times it is smaller than the dense model's; all to be maximised.

    On a log scale: from 10x to 20x is worth as much as from 50x to 100x. On a plain one a hypervolume is all about the
    smallest models.
    """

    minimize: tuple[str, ...] = ("params",)
    dense: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The costs of the dense model, which those of the others are set against."""

    @classmethod
    def of(cls, search: Mapping[str, Any], dense: Costed) -> Objectives:
        """From a study's section `search`."""
        return cls(tuple(search["minimize"]), dense.costs)

    @property
    def directions(self) -> list[Literal["maximize"]]:
        """Optuna's directions."""
        return ["maximize"] * (1 + len(self.minimize))

    @property
    def reference(self) -> tuple[float, ...]:
        """The dense model's place in the costs, above which hypervolumes count: 1x, as logarithms."""
        return (0.0,) * len(self.minimize)

    def only(self, cost: str) -> Objectives:
        """The score against that cost alone."""
        return Objectives((cost,), self.dense)

    def measured(self, size: Costed) -> bool:
        """Whether a model has a number for each of the costs; one that is measured in the end is missing until then."""
        return all(cost in size.costs for cost in self.minimize)

    def ratios(self, size: Costed) -> tuple[float, ...]:
        """How many times smaller than the dense model, in each cost; NaN where that is not measured."""
        return tuple(self.dense[cost] / size.costs.get(cost, math.nan) for cost in self.minimize)

    def ratio(self, size: Costed) -> float:
        """How many times smaller over all costs, their geometric mean: what sizes are put in order by."""
        ratios = self.ratios(size)
        return ratios[0] if len(ratios) == 1 else math.prod(ratios) ** (1 / len(ratios))

    def point(self, score: float, size: Costed) -> tuple[float, ...]:
        """The score, then log10 of each ratio."""
        return (score, *map(math.log10, self.ratios(size)))


@dataclass(frozen=True)
class Price:
    """What a unit of each cost is worth, where several costs are weighed against one loss."""

    units: Mapping[str, float] = field(hash=False)

    def of(self, size: Costed) -> float:
        """The price of a whole size."""
        return sum(price * size.costs[cost] for cost, price in self.units.items())


PER_PARAMETER = Price({"params": 1.0})


def prices(minimize: Sequence[str], dense: Costed) -> list[Price]:
    """The prices at which predicted fronts are solved: of the one cost, or of all alike (the dense model costs 1 in each) and
    of each alone."""
    alone = [Price({cost: 1.0}) for cost in minimize]
    return alone if len(alone) == 1 else [Price({cost: 1 / dense.costs[cost] for cost in minimize}), *alone]
