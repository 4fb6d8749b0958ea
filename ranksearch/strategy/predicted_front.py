"""The predicted front: the best plans by predicted loss increase and cost, found by sweeping one Lagrange multiplier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ranksearch.plan import Dense, Factorization, Plan


@dataclass(frozen=True)
class Choice:
    """One way to store one layer: its cost (for example its parameters), and the loss increase predicted for it alone."""

    value: Factorization
    cost: float
    loss_increase: float


@dataclass(frozen=True)
class Corner:
    """A plan of the predicted front: the cost that it saves, and its predicted loss increase."""

    plan: Plan
    saved: float
    loss_increase: float


def predicted_front(dense: Mapping[str, float], choices: Mapping[str, Sequence[Choice]]) -> list[Corner]:
    """The plans that minimise loss increase + multiplier * cost for some multiplier, by rising savings, the dense plan first.

    The loss increases of single layers are assumed to add up. Then, for each multiplier, every layer takes its cheapest choice
    on its own (Shoham and Gersho 1988; for ranks: Kim et al. 2019, "Efficient neural network compression"). As the multiplier
    rises, a layer moves along the lower convex hull of its choices. So the front is found by merging the edges of all layers'
    hulls, those with the smallest loss increase per saved cost first.

    Args:
        dense: the cost of each dense layer; a layer may always stay dense.
        choices: by layer, the ways to store it. Choices that save nothing are ignored; a negative loss increase counts as 0.
    """
    layers: dict[str, Factorization] = {}
    saved, loss_increase = 0.0, 0.0
    corners = [Corner(Plan(), 0, 0.0)]
    for edge in edges(dense, choices):
        layers[edge.layer] = edge.value
        saved, loss_increase = saved + edge.saved, loss_increase + edge.loss_increase
        corners.append(Corner(Plan.of(layers), saved, loss_increase))
    return corners


def edges(dense: Mapping[str, float], choices: Mapping[str, Sequence[Choice]]) -> list[Edge]:
    """The edges of all layers' hulls by rising slope; each is one step along the predicted front."""
    # Python's sort is stable and a layer's slopes never fall, so the edges of a layer keep their order.
    steps = [edge for name, cost in dense.items() for edge in _hull(name, cost, choices.get(name, ()))]
    return sorted(steps, key=lambda edge: edge.slope)


@dataclass(frozen=True)
class Edge:
    """A step along one layer's hull, to `value`: the cost it saves, its loss increase, and their ratio, `slope`."""

    layer: str
    value: Factorization
    saved: float
    loss_increase: float
    slope: float


def _hull(layer: str, dense: float, choices: Sequence[Choice]) -> Iterator[Edge]:
    """The edges of the lower convex hull of the points (saved cost, loss increase), starting at the dense layer."""
    points: list[tuple[float, float, Factorization]] = [(0, 0.0, Dense())]
    for choice in sorted(choices, key=lambda c: (-c.cost, c.loss_increase)):
        point = (dense - choice.cost, max(0.0, choice.loss_increase), choice.value)
        if point[0] <= points[-1][0]:
            continue  # it saves no more than the point before, which has a smaller loss increase
        while len(points) > 1 and _bends_up(points[-2], points[-1], point):
            points.pop()
        points.append(point)
    slope = 0.0
    for before, after in pairwise(points):
        saved, loss_increase = after[0] - before[0], after[1] - before[1]
        # Slopes of a hull rise; `max` keeps that so despite rounding, since `edges` relies on it.
        slope = max(slope, loss_increase / saved)
        yield Edge(layer, after[2], saved, loss_increase, slope)


def _bends_up(
    first: tuple[float, float, object], middle: tuple[float, float, object], last: tuple[float, float, object]
) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])
