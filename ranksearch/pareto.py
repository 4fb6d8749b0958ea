"""Front, hypervolume and knee of points to be maximised in two objectives: pure functions of an array (points, 2)."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the points that no other point dominates, ordered by rising second objective.

    A point dominates another when it is nowhere smaller and somewhere larger. Of equal points only the first is kept.
    """
    values = np.asarray(points, dtype=float).reshape(-1, 2)
    order = np.lexsort((-values[:, 1], -values[:, 0]))
    # By falling first objective, a point is on the front when its second is larger than all before it.
    seconds = values[order, 1]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(seconds)[:-1]]) if len(order) else seconds
    return order[seconds > before]


def ranks(points: ArrayLike) -> NDArray[np.intp]:
    """Non-domination rank of each point (Deb et al. 2002): 0 on the front, 1 on the front of the rest, and so on."""
    values = np.asarray(points, dtype=float).reshape(-1, 2)
    result = np.empty(len(values), dtype=np.intp)
    # By falling first objective, a point lies behind the fronts that reached its second; what fronts reached falls with rank.
    reached: list[float] = []
    for i in np.lexsort((-values[:, 1], -values[:, 0])):
        rank = result[i] = bisect.bisect_right(reached, -values[i, 1])
        reached[rank : rank + 1] = [-values[i, 1]]
    return result


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Area between the front of two-objective `points` and `reference`; points not above the reference count nothing."""
    origin = np.asarray(reference, dtype=float)
    values = np.asarray(points, dtype=float).reshape(-1, 2)
    values = values[(values > origin).all(1)]
    area, before = 0.0, origin[1]
    for first, second in values[front(values)]:
        area += (first - origin[0]) * (second - before)
        before = second
    return float(area)


def knee(points: ArrayLike) -> int:
    """Index of the front point farthest above the straight line between the front's ends, each objective scaled to 0..1.

    The usual "elbow" of a two-objective front (Das 1999); with fewer than three points the one of highest first objective.
    """
    values = np.asarray(points, dtype=float).reshape(-1, 2)
    chosen = front(values)
    if chosen.size == 0:
        raise ValueError("a knee needs at least one point")
    on_front = values[chosen]
    span = np.ptp(on_front, axis=0)
    if chosen.size < 3 or (span == 0).any():
        return int(chosen[np.argmax(on_front[:, 0])])
    scaled = (on_front - on_front.min(0)) / span
    return int(chosen[np.argmax(scaled.sum(1))])
