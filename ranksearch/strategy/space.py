"""The search space: for each layer, the choice of a method and a level in 0..1 for each of the method's ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from ranksearch import spec
from ranksearch.compress.inventory import Inventory
from ranksearch.errors import PlanError, SpecError, nearest
from ranksearch.methods import FEWER_PARAMS, METHODS, Method, RankConstraints, method_of, nearest_rank
from ranksearch.methods.layer import Layer
from ranksearch.plan import Dense, Factorization, Plan
from ranksearch.results.costs import Counts

DENSE_METHOD = Dense.method
UNUSED_LEVEL = 0.5
"""A queued trial needs a value for every parameter; ranks of methods that it does not choose get this level."""


@dataclass(frozen=True)
class Size(Counts):
    """The costs of a whole model by name, and its compression ratio."""

    costs: Mapping[str, float] = field(hash=False)
    ratio: float


def size_of(plan: Plan, inventory: Inventory) -> Size:
    """The size of the whole model under a plan."""
    costs = dict(inventory.costs)
    for name, value in plan:
        layer, method = inventory[name], METHODS[type(value)]
        saved, remaining = layer.costs, method.costs(layer, value.ranks)
        costs = {cost: total - saved[cost] + remaining[cost] for cost, total in costs.items()}
    return Size(costs, inventory.params / costs["params"])


@dataclass(frozen=True)
class Axis:
    """One layer and the methods that can make it smaller.

    The parameter `LAYER.method` chooses among them. Each rank of each method has a parameter of its own,
    `LAYER.METHOD.RANK`: a level in 0..1, on a log scale from the smallest rank to the largest that still shrinks the layer.
    """

    layer: Layer
    methods: tuple[Method, ...]
    constraints: RankConstraints = FEWER_PARAMS

    @functools.cached_property
    def rank_ranges(self) -> Mapping[type[Factorization], tuple[range, ...]]:
        """By type of factorization, the allowed values of each rank."""
        return {method.kind: method.rank_ranges(self.layer, self.constraints) for method in self.methods}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by parameter name; they are the same for every trial."""
        name = self.layer.name
        names = [DENSE_METHOD, *(method.kind.method for method in self.methods)]
        levels = {key: FloatDistribution(0.0, 1.0) for method in self.methods for key in self._levels(method)}
        return {f"{name}.method": CategoricalDistribution(names), **levels}

    def smallest(self, cost: str) -> Factorization:
        """The factorization of the lowest cost. Costs rise with the ranks, so only the smallest ranks are compared."""
        layer = self.layer
        least = [(method, tuple(ranks[0] for ranks in self.rank_ranges[method.kind])) for method in self.methods]
        method, ranks = min(least, key=lambda choice: choice[0].costs(layer, choice[1])[cost])
        return method.value(layer, ranks) if method.shrinks(layer, ranks, RankConstraints(smaller_in=(cost,))) else Dense()

    def factorization(self, params: Mapping[str, Any]) -> Factorization:
        """The factorization that these parameters choose; `Dense()` if their ranks would not make the layer smaller."""
        name = self.layer.name
        method = next((m for m in self.methods if m.kind.method == params[f"{name}.method"]), None)
        if method is None:
            return Dense()
        rank_ranges = self.rank_ranges[method.kind]
        ranks = tuple(
            rank_at(params[key], rank_range) for key, rank_range in zip(self._levels(method), rank_ranges, strict=True)
        )
        return method.value(self.layer, ranks) if method.shrinks(self.layer, ranks, self.constraints) else Dense()

    def params(self, value: Factorization) -> dict[str, Any]:
        """The parameters that choose `value`."""
        name = self.layer.name
        params: dict[str, Any] = {key: UNUSED_LEVEL for method in self.methods for key in self._levels(method)}
        if isinstance(value, Dense):
            return params | {f"{name}.method": DENSE_METHOD}
        method = self._method(value)
        rank_ranges = self.rank_ranges[method.kind]
        levels = [level_of(rank, rank_range) for rank, rank_range in zip(value.ranks, rank_ranges, strict=True)]
        return params | {f"{name}.method": value.method} | dict(zip(self._levels(method), levels, strict=True))

    def check(self, value: Factorization) -> None:
        """Refuse a factorization that is outside the space.

        Raises:
            PlanError: the method, a rank or the kernel is not in the space, or the layer would not become smaller.
        """
        method, layer = self._method(value), self.layer
        ranks = zip(value.rank_names(), value.ranks, self.rank_ranges[method.kind], method.bounds(layer.weight), strict=True)
        for name, rank, allowed, bound in ranks:
            prefix = f"Layer {layer.name!r}: {name} of {value.title} must be"
            if rank > bound:
                raise PlanError(f"{prefix} at most {bound}, but got {rank}.")
            if rank not in allowed:
                multiple = f" a multiple of {allowed.step} and" if allowed.step > 1 else ""
                raise PlanError(f"{prefix}{multiple} at most {allowed[-1]} in this study, but got {rank}.")
        if not method.shrinks(layer, value.ranks, self.constraints):
            costs = " and ".join(self.constraints.smaller_in)
            raise PlanError(
                f"Layer {layer.name!r} must become smaller in {costs} (space.smaller_in), but {value} does not shrink it."
            )
        if value.padding != (expected := method.value(layer, value.ranks)).padding:
            raise PlanError(
                f"Layer {layer.name!r} must have padding={expected.padding} in this study, but got {value.padding}."
            )
        if value != expected:
            raise PlanError(f"Layer {layer.name!r} must have kernel={expected.kernel} in this study, but got {value.kernel}.")

    def _method(self, value: Factorization) -> Method:
        method, name = method_of(value), self.layer.name
        if method in self.methods:
            return method
        if not method.applies(self.layer.weight, linear=self.layer.kind == "Linear"):
            raise PlanError(f"Layer {name!r} of shape {self.layer.weight} cannot be stored as {value.title}.")
        raise PlanError(f"Layer {name!r} may not be stored as {value.title} in this study; add it to space.methods.")

    def _levels(self, method: Method) -> list[str]:
        """The names of the parameters for the method's ranks. They are unique: names of methods and ranks hold no dot, and no
        rank is called `method`."""
        return [f"{self.layer.name}.{method.kind.method}.{rank}" for rank in method.kind.rank_names()]


@dataclass(frozen=True)
class SearchSpace:
    """All axes of a study, in the order in which the model calls the layers."""

    axes: tuple[Axis, ...]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of every axis."""
        return {name: kind for axis in self.axes for name, kind in axis.distributions().items()}

    def plan(self, params: Mapping[str, Any]) -> Plan:
        """The plan that a trial's parameters choose."""
        return Plan.of({axis.layer.name: axis.factorization(params) for axis in self.axes})

    def smallest(self, cost: str) -> Plan:
        """The plan with the lowest value of this cost."""
        return Plan.of({axis.layer.name: axis.smallest(cost) for axis in self.axes})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters that choose `plan`; the inverse of `SearchSpace.plan` for plans inside the space."""
        return {key: value for axis in self.axes for key, value in axis.params(plan[axis.layer.name]).items()}


def check_plan(plan: Plan, space: SearchSpace, inventory: Inventory) -> None:
    """Refuse a plan that is outside the space.

    Raises:
        PlanError: the plan is of a narrower net, or names no layer, or a layer, method or rank that is not in the space.
    """
    if plan.width != 1:
        raise PlanError(
            f"A plan to try first must be one of the dense net, but this one has width {plan.width:g}; narrower nets are made "
            "after the plans are checked."
        )
    axes = {axis.layer.name: axis for axis in space.axes}
    if not plan.layers:
        raise PlanError("A plan must decompose at least one layer, but this one leaves all layers dense.")
    for name, value in plan:
        if name not in axes:
            decomposable = any(layer.name == name for layer in inventory.layers)
            reason = "This study leaves it dense." if decomposable else _why_skipped(name, inventory.skipped).strip()
            hint = f" {reason}" if reason else nearest(name, axes)
            raise PlanError(f"A plan must name layers of the search space, but got {name!r}.{hint}")
        axes[name].check(value)


def constraints_of(section: spec.Space) -> RankConstraints:
    """The constraints on ranks that a study's section `space` sets."""
    return RankConstraints(section.rank_multiple or 1, section.smaller_in)


def space_of(section: spec.Space, inventory: Inventory) -> SearchSpace:
    """The search space that a study's section `space` describes; raises as `make_space` does."""
    return make_space(inventory, section.methods, layers=section.layers, skip=section.skip, constraints=constraints_of(section))


def make_space(
    inventory: Inventory,
    methods: Sequence[str],
    *,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    constraints: RankConstraints = FEWER_PARAMS,
) -> SearchSpace:
    """The search space over all layers that at least one of the methods makes smaller.

    Args:
        inventory: the model's layers.
        methods: names of the methods to choose from.
        layers: names or patterns (`fnmatch.fnmatchcase`) of the layers to decompose; empty for all layers.
        skip: names or patterns of layers to leave dense.
        constraints: the number that ranks must be multiples of, and the costs in which a layer must shrink.

    Raises:
        SpecError: a name or pattern matches no layer that can be decomposed, or no layer is left.
    """
    names = [layer.name for layer in inventory.layers]
    selected, skipped = _matching_layers("space.layers", layers, inventory), _matching_layers("space.skip", skip, inventory)
    allowed = [m for kind, m in METHODS.items() if kind.method in methods]
    candidates = [layer for layer in inventory.layers if (not layers or layer.name in selected) and layer.name not in skipped]
    if not candidates:
        raise SpecError(f"The search needs a layer to decompose, but space.layers and space.skip leave none of {names}.")
    axes = []
    for layer in candidates:
        suitable = tuple(method for method in allowed if applies(method, layer, constraints))
        if suitable:
            axes.append(Axis(layer, suitable, constraints))
    if not axes:
        raise SpecError(
            f"The search needs a layer to decompose, but {', '.join(methods)} make none of {names} "
            f"smaller{_beyond_default(constraints)}."
        )
    return SearchSpace(tuple(axes))


def _matching_layers(key: str, patterns: Sequence[str], inventory: Inventory) -> set[str]:
    """The names of the layers that the patterns match."""
    names = [layer.name for layer in inventory.layers]
    matched = set[str]()
    for pattern in patterns:
        matches = _matches(pattern, names)
        if not matches:
            hint = _why_skipped(pattern, inventory.skipped) or nearest(pattern, names)
            raise SpecError(f"{key} must name layers that can be decomposed, but {pattern!r} matches none.{hint}")
        matched.update(matches)
    return matched


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    # Compared as a plain name too, since layer names may contain pattern characters such as "[".
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def _why_skipped(pattern: str, skipped: Mapping[str, str]) -> str:
    """Why the layers that a pattern matches cannot be decomposed, for the first three of them."""
    names = _matches(pattern, skipped)
    if names == [pattern]:
        return f" Skipped: {skipped[pattern]}."
    reasons = [f"{name} ({skipped[name]})" for name in names[:3]] + [f"{len(names) - 3} more"] * (len(names) > 3)
    return f" Skipped: {', '.join(reasons)}." if names else ""


def _beyond_default(constraints: RankConstraints) -> str:
    """The constraints beyond the default (fewer parameters), each with its key, for an error message."""
    costs = (
        f" in {' and '.join(constraints.smaller_in)} (space.smaller_in)"
        if constraints.smaller_in != FEWER_PARAMS.smaller_in
        else ""
    )
    return costs + (
        f" at ranks that are multiples of {constraints.multiple} (space.rank_multiple)" if constraints.multiple > 1 else ""
    )


def applies(method: Method, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> bool:
    """Whether the method can store this layer and makes it smaller at some allowed rank."""
    return method.applies(layer.weight, linear=layer.kind == "Linear") and all(method.rank_ranges(layer, constraints))


def rank_at(level: float, ranks: range) -> int:
    """The rank at a level in 0..1, on a log scale over `ranks`, one of `Method.rank_ranges`."""
    return nearest_rank(ranks, ranks.step * math.exp(level * math.log(len(ranks))))


def level_of(rank: int, ranks: range) -> float:
    """The level of a rank, the inverse of `rank_at`; ranks outside `ranks` get the level of the nearest end."""
    return min(1.0, max(0.0, math.log(rank / ranks.step) / math.log(len(ranks)))) if len(ranks) > 1 else 0.0
