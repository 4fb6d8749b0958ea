"""What the models of a study compete in: their score, and how much smaller they are in each cost that it minimises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ranksearch.results.limits import Costed, Sized

COSTS = ("params", "macs")


@dataclass(frozen=True)
class Objectives:
    """The score, and for each cost of `minimize` by how many times it is smaller than the dense model's; all to be maximised.

    On a log scale: from 10x to 20x is worth as much as from 50x to 100x. On a plain one a hypervolume is all about the
    smallest models.
    """

    minimize: tuple[str, ...] = ("params",)
    dense_macs: int = 1
    """Multiply-accumulates of the dense model, which those of the others are set against."""

    @classmethod
    def of(cls, search: Mapping[str, Any], dense_macs: int) -> Objectives:
        """From a study's section `search`; studies of older releases minimise parameters and do not say so."""
        return cls(tuple(search.get("minimize", cls.minimize)), dense_macs)

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
        return Objectives((cost,), self.dense_macs)

    def ratios(self, size: Sized) -> tuple[float, ...]:
        """How many times smaller than the dense model, in each cost."""
        return tuple(size.ratio if cost == "params" else self.dense_macs / size.macs for cost in self.minimize)

    def ratio(self, size: Sized) -> float:
        """How many times smaller over all costs, their geometric mean: what sizes are put in order by."""
        ratios = self.ratios(size)
        return ratios[0] if len(ratios) == 1 else math.prod(ratios) ** (1 / len(ratios))

    def point(self, score: float, size: Sized) -> tuple[float, ...]:
        """The score, then log10 of each ratio."""
        return (score, *map(math.log10, self.ratios(size)))


@dataclass(frozen=True)
class Price:
    """What a parameter and a multiply-accumulate are worth, where several costs are weighed against one loss."""

    params: float = 1.0
    macs: float = 0.0

    def of(self, size: Costed) -> float:
        """The price of a whole size."""
        return self.params * size.params + self.macs * size.macs


PER_PARAMETER, PER_MAC = Price(1.0, 0.0), Price(0.0, 1.0)


def prices(minimize: Sequence[str], dense: Costed) -> list[Price]:
    """The prices at which frontiers are solved: of the one cost, or of both alike (the dense model costs 1 in each) and of
    each alone."""
    alone = [{"params": PER_PARAMETER, "macs": PER_MAC}[cost] for cost in minimize]
    return alone if len(alone) == 1 else [Price(1 / dense.params, 1 / dense.macs), *alone]
