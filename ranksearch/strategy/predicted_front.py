"""The predicted front: all layers' candidates under one Lagrange multiplier, which is swept; milliseconds for any network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ranksearch.plan import Dense, Factorization, Plan


@dataclass(frozen=True)
class Choice:
    """One way to store one layer: its cost, such as its parameters, and how much the loss is predicted to rise by it alone."""

    value: Factorization
    cost: float
    loss_increase: float


@dataclass(frozen=True)
class Corner:
    """A plan of the frontier: the cost it saves, and the predicted rise of the loss."""

    plan: Plan
    saved: float
    loss_increase: float


def predicted_front(dense: Mapping[str, float], choices: Mapping[str, Sequence[Choice]]) -> list[Corner]:
    """The plans that some price of the cost makes cheapest, by rising savings; the dense plan is the first.

    A multiplier is the price of the cost in units of the loss. At each price every layer takes its cheapest choice by
    itself, since the rises of single layers are taken to add up (Shoham and Gersho 1988; for ranks: Kim et al. 2019,
    "Efficient neural network compression"). As the price rises a layer walks along the lower convex hull of its choices,
    so the frontier is the merger of all layers' hulls, edge by edge, the least rise for what is saved first.

    Args:
        dense: the cost of each layer as it is; storing it so is always a choice.
        choices: by layer, the ways to store it; those that save nothing are none. A negative rise counts as none.
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
    """The steps of the frontier from corner to corner: the edges of all layers' hulls, by rising slope."""
    # Python's sort is stable and a layer's slopes never fall, so its edges stay in their order.
    found = [edge for name, cost in dense.items() for edge in _hull(name, cost, choices.get(name, ()))]
    return sorted(found, key=lambda edge: edge.slope)


@dataclass(frozen=True)
class Edge:
    """A step along one layer's hull: to `value`, saving so much more for so much more of the loss, `slope` for each unit."""

    layer: str
    value: Factorization
    saved: float
    loss_increase: float
    slope: float


def _hull(layer: str, dense: float, choices: Sequence[Choice]) -> Iterator[Edge]:
    """The edges of the lower convex hull of (saved, rise), from the dense layer on."""
    points: list[tuple[float, float, Factorization]] = [(0, 0.0, Dense())]
    for choice in sorted(choices, key=lambda c: (-c.cost, c.loss_increase)):
        point = (dense - choice.cost, max(0.0, choice.loss_increase), choice.value)
        if point[0] <= points[-1][0]:
            continue  # as large as the one before, which rises less
        while len(points) > 1 and _bends_up(points[-2], points[-1], point):
            points.pop()
        points.append(point)
    slope = 0.0
    for before, after in pairwise(points):
        saved, loss_increase = after[0] - before[0], after[1] - before[1]
        # Rounding aside a hull's slopes rise anyway; where they must, its edges are walked in their order.
        slope = max(slope, loss_increase / saved)
        yield Edge(layer, after[2], saved, loss_increase, slope)


def _bends_up(
    first: tuple[float, float, object], middle: tuple[float, float, object], last: tuple[float, float, object]
) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])
