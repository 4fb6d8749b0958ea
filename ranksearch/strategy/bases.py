"""The dense nets that a study searches from: the given one, and narrower ones that pruning made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from ranksearch.compress.inventory import Inventory
from ranksearch.errors import SpecError
from ranksearch.plan import Plan
from ranksearch.results.costs import COSTS
from ranksearch.results.limits import Limits
from ranksearch.strategy.space import UNUSED_LEVEL, SearchSpace, Size, size_of

WIDTH = "width"
"""The parameter that chooses the net. No other parameter has this name: theirs all hold a dot."""


@dataclass(frozen=True)
class Base:
    """A dense net to search from: its layers, its search space, and its width, which names it (1.0 for the given net)."""

    inventory: Inventory
    space: SearchSpace
    width: float = 1.0


@dataclass(frozen=True)
class Bases:
    """All nets to search from, the given one first, and one search space over all of them.

    Layers have the same names in every net, and share their parameters: a level in 0..1 stands for a rank of the net that the
    parameter `width` chooses.
    """

    nets: tuple[Base, ...]

    @classmethod
    def of(cls, space: SearchSpace, inventory: Inventory) -> Bases:
        """The given net alone."""
        return cls((Base(inventory, space),))

    def __iter__(self) -> Iterator[Base]:
        return iter(self.nets)

    def __len__(self) -> int:
        return len(self.nets)

    def __getitem__(self, width: float) -> Base:
        return next(base for base in self.nets if base.width == width)

    @property
    def dense(self) -> Inventory:
        """The layers of the given net, with whose costs all plans are compared."""
        return self.nets[0].inventory

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by parameter name. Of a layer, the methods that any of the nets allows."""
        found: dict[str, BaseDistribution] = {}
        if len(self.nets) > 1:
            found[WIDTH] = CategoricalDistribution([base.width for base in self.nets])
        for base in self.nets:
            for name, kind in base.space.distributions().items():
                earlier = found.get(name)
                if isinstance(earlier, CategoricalDistribution) and isinstance(kind, CategoricalDistribution):
                    kind = CategoricalDistribution(list(dict.fromkeys([*earlier.choices, *kind.choices])))
                found[name] = kind
        return found

    def plan(self, params: Mapping[str, Any]) -> Plan:
        """The plan that a trial's parameters choose."""
        base = self[params.get(WIDTH, 1.0)]
        return replace(base.space.plan(params), width=base.width)

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters that choose `plan`; the inverse of `Bases.plan` for plans inside the space."""
        unused = {
            name: kind.choices[0] if isinstance(kind, CategoricalDistribution) else UNUSED_LEVEL
            for name, kind in self.distributions().items()
        }
        chosen = self[plan.width].space.params(plan)
        return {**unused, **chosen, **({WIDTH: plan.width} if len(self.nets) > 1 else {})}

    def size_of(self, plan: Plan) -> Size:
        """The size of the whole model under a plan. Its ratio is that to the given net."""
        costs = size_of(plan, self[plan.width].inventory).costs
        return Size(costs, self.dense.params / costs["params"])

    def smallest(self, cost: str) -> Size:
        """The size of the plan with the lowest value of this cost."""
        sizes = [self.size_of(replace(base.space.smallest(cost), width=base.width)) for base in self.nets]
        return min(sizes, key=lambda size: size.costs[cost])


def check_limits(limits: Limits, bases: Bases) -> None:
    """Refuse limits that no plan of the space can meet.

    Raises:
        SpecError: the smallest plan is still over a limit.
    """
    ratio = bases.smallest("params").ratio
    if limits.min_ratio and limits.min_ratio > ratio:
        # Rounded down, so that the value in the message would be accepted.
        largest = math.floor(ratio * 100) / 100
        raise SpecError(
            f"search.min_ratio must be at most {largest:.12g}, the ratio of the smallest plan in the space, but got "
            f"{limits.min_ratio:g}; lower it, or widen the space."
        )
    for cost, limit in limits.max_costs.items():
        smallest = bases.smallest(cost).costs[cost]
        if limit < smallest:
            shown = smallest if isinstance(smallest, int) else f"{math.ceil(smallest * 1000) / 1000:g}"
            raise SpecError(
                f"search.{COSTS[cost].limit} must be at least {shown}, that of the smallest plan in the space, but got "
                f"{limit}; raise it, or widen the space."
            )
