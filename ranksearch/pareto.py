"""Front, hypervolume and knee of points to be maximised in two objectives or three: pure functions of an array
(points, objectives)."""

from __future__ import annotations

import bisect
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Staircase: TypeAlias = list[tuple[float, float]]
"""Points of two objectives of which none dominates another, by rising first objective: so the second falls."""


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the points that no other point dominates, ordered by rising second objective.

    A point dominates another when it is nowhere smaller and somewhere larger. Of equal points only the first is kept.
    """
    values = _points(points)
    order = np.lexsort(-values.T[::-1])
    if values.shape[1] == 2:
        # By falling first objective, a point is on the front when its second is larger than all before it.
        seconds = values[order, 1]
        before = np.concatenate([[-np.inf], np.maximum.accumulate(seconds)[:-1]]) if len(order) else seconds
        return order[seconds > before]
    kept, reached = list[int](), Staircase()
    for index, (second, third) in zip(order.tolist(), values[order, 1:].tolist(), strict=True):
        # Only what comes before it in this order can dominate it, or equal it: what reaches as far in the other two.
        if not _covers(reached, second, third):
            _add(reached, second, third)
            kept.append(index)
    return np.array(sorted(kept, key=lambda index: values[index, 1]), dtype=np.intp)


def ranks(points: ArrayLike) -> NDArray[np.intp]:
    """Non-domination rank of each point (Deb et al. 2002): 0 on the front, 1 on the front of the rest, and so on. Of equal
    points each lies behind the one before."""
    values = _points(points)
    result = np.empty(len(values), dtype=np.intp)
    if values.shape[1] == 2:
        # By falling first objective, a point lies behind the fronts that reached its second; what they reached falls with rank.
        reached: list[float] = []
        for i in np.lexsort(-values.T[::-1]):
            rank = result[i] = bisect.bisect_right(reached, -values[i, 1])
            reached[rank : rank + 1] = [-values[i, 1]]
        return result
    # The same with a staircase for each front (efficient non-dominated sort, Zhang et al. 2015): behind a front, behind all
    # before it too.
    stairs: list[Staircase] = []
    order = np.lexsort(-values.T[::-1])
    for index, (second, third) in zip(order.tolist(), values[order, 1:].tolist(), strict=True):
        ahead = bisect.bisect_left(stairs, True, key=lambda stair: not _covers(stair, second, third))
        if ahead == len(stairs):
            stairs.append([])
        _add(stairs[ahead], second, third)
        result[index] = ahead
    return result


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between the front of `points` and `reference`; points not above the reference count nothing."""
    origin = np.asarray(reference, dtype=float)
    values = _points(points, len(origin))
    values = values[(values > origin).all(1)]
    values = values[front(values)]
    if len(origin) == 2:
        area, before = 0.0, origin[1]
        for first, second in values:
            area += (first - origin[0]) * (second - before)
            before = second
        return float(area)
    # Slice by slice of the first objective: in each, what reaches above it spans the same volume in the others.
    values = values[np.argsort(-values[:, 0], kind="stable")]
    lower = np.append(values[1:, 0], origin[0])[: len(values)]
    slices = (
        float(high - low) * hypervolume(values[: count + 1, 1:], origin[1:])
        for count, (high, low) in enumerate(zip(values[:, 0], lower, strict=True))
        if high > low
    )
    return sum(slices, start=0.0)


def contribution(points: ArrayLike, index: int, reference: ArrayLike) -> float:
    """The volume that one point adds to the hypervolume of the others (exclusive hypervolume, While et al. 2012)."""
    origin = np.asarray(reference, dtype=float)
    values = _points(points, len(origin))
    # What the others take of the point's own box, each cut to it.
    taken = np.minimum(np.delete(values, index, axis=0), values[index])
    return hypervolume(values[[index]], origin) - hypervolume(taken, origin)


def knee(points: ArrayLike) -> int:
    """Index of the front point farthest above the plane through the ends of the front, each objective scaled to 0..1.

    The usual "elbow" of a front (Das 1999); with fewer than three points the one of highest first objective.
    """
    values = _points(points)
    chosen = front(values)
    if chosen.size == 0:
        raise ValueError("a knee needs at least one point")
    on_front = values[chosen]
    span = np.ptp(on_front, axis=0)
    if chosen.size < 3 or (span == 0).any():
        return int(chosen[np.argmax(on_front[:, 0])])
    scaled = (on_front - on_front.min(0)) / span
    return int(chosen[np.argmax(scaled.sum(1))])


def _covers(stair: Staircase, first: float, second: float) -> bool:
    """Whether a point of the staircase dominates that one, or equals it."""
    place = bisect.bisect_left(stair, (first, -np.inf))
    return place < len(stair) and stair[place][1] >= second


def _add(stair: Staircase, first: float, second: float) -> None:
    """Put a point that is not covered on the staircase, in the place of those that it dominates."""
    begin = end = bisect.bisect_right(stair, (first, second))
    while begin and stair[begin - 1][1] <= second:
        begin -= 1
    stair[begin:end] = [(first, second)]


def _points(points: ArrayLike, objectives: int = 2) -> NDArray[np.float64]:
    """As an array of two dimensions, where there is no point too."""
    values = np.asarray(points, dtype=float)
    return values if values.ndim == 2 else values.reshape(-1, objectives)
