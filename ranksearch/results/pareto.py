"""Front, hypervolume and knee of points (points, objectives), all objectives maximised. The algorithms are moocore's."""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the non-dominated points, by rising second objective.

    A point dominates another if it is smaller in no objective and larger in at least one. Of equal points the first is kept.
    """
    values = _points(points)
    if not len(values):
        return np.empty(0, dtype=np.intp)
    chosen = np.flatnonzero(moocore.is_nondominated(values, maximise=True))
    return chosen[np.argsort(values[chosen, 1], kind="stable")]


def ranks(points: ArrayLike) -> NDArray[np.intp]:
    """Non-domination rank of each point (Deb et al. 2002): 0 on the front, 1 on the front of the rest, and so on.

    Equal points get different ranks, in their order; moocore's own function gives them the same rank.
    """
    values = _points(points)
    result, left, rank = np.empty(len(values), dtype=np.intp), np.arange(len(values)), 0
    while len(left):
        on_front = front(values[left])
        result[left[on_front]] = rank
        left, rank = np.delete(left, on_front), rank + 1
    return result


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Hypervolume of `points` above `reference`; points that are not above it in every objective add nothing."""
    origin = np.asarray(reference, dtype=float)
    values = _points(points, len(origin))
    return float(moocore.hypervolume(values, ref=origin, maximise=True)) if len(values) else 0.0


def contributions(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Hypervolume that each point of a front adds to the others (exclusive hypervolume, While et al. 2012).

    Points that occur twice add nothing.
    """
    return np.asarray(moocore.hv_contributions(_points(points), ref=np.asarray(reference, dtype=float), maximise=True))


def knee(points: ArrayLike) -> int:
    """Index of the knee: the front point farthest above the plane through the ends of the front (Das 1999).

    Each objective is scaled to 0..1. With fewer than three points on the front it is the one with the highest first objective.
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


def _points(points: ArrayLike, objectives: int = 2) -> NDArray[np.float64]:
    """The points as a float array (points, objectives), also if there are none."""
    values = np.asarray(points, dtype=float)
    return values if values.ndim == 2 else values.reshape(-1, objectives)
