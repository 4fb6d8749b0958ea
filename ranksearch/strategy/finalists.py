"""Which trials are fine-tuned for longer and tested."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import TrialRecord, yardstick

MAX_FINALIST_SCORE_DROP = 0.15
"""How far below the dense score a trial may lie and still be worth taking home, or below the best trial's where none reaches
the dense score: a long fine-tuning gains some points."""


def choose_finalists(
    trials: Sequence[TrialRecord],
    dense_score: float,
    count: int,
    limits: Limits,
    objectives: Objectives,
) -> list[TrialRecord]:
    """At most `count` trials of different plans: the front, filled up with the fronts behind it; the largest model first.

    Where a front holds too many, those that add the least hypervolume are left out, one after the other. Trials outside
    the limits come last, the nearest first: a long fine-tuning may yet lift them inside.
    """
    done = [trial for trial in trials if trial.scored and trial.same_as is None]
    # Only a size is never mended: what an earlier run trained under wider limits is for want of others.
    done = [trial for trial in done if not limits.excess(trial)] or done
    scores = [trial.score for trial in done if trial.score is not None]
    floor, least = floor_of(dense_score, scores, limits), floor_of(dense_score, scores, UNLIMITED)
    worth = [trial for trial in done if trial.score is not None and trial.score >= min(floor, least)]
    # By the score of the search: that of a finalist would change the choice once it is known.
    excess = {trial.number: limits.excess(trial, trial.score) for trial in worth}
    chosen = _fronts([trial for trial in worth if not excess[trial.number]], count, floor, objectives)
    outside = sorted((trial for trial in worth if excess[trial.number]), key=lambda trial: excess[trial.number])
    return sorted([*chosen, *outside[: count - len(chosen)]], key=objectives.ratio)


def floor_of(dense_score: float, scores: Iterable[float], limits: Limits, *, below: float = MAX_FINALIST_SCORE_DROP) -> float:
    """The score below which a trial is worth nothing: what the user asks for, or else so far below the `yardstick`."""
    if limits.min_score is not None:
        return limits.min_score
    return yardstick(dense_score, scores) - below


def _fronts(pool: Sequence[TrialRecord], count: int, floor: float, objectives: Objectives) -> list[TrialRecord]:
    points = [objectives.point(trial.score or 0.0, trial) for trial in pool]
    reference = (floor, *objectives.reference)
    ranks, chosen = pareto.ranks(points), list[int]()
    for rank in range(len(pool)):
        layer = [i for i in range(len(pool)) if ranks[i] == rank]
        chosen += _spread(layer, points, count - len(chosen), reference)
        if len(chosen) == count:
            break
    return [pool[i] for i in chosen]


def _spread(layer: list[int], points: Sequence[tuple[float, ...]], count: int, reference: tuple[float, ...]) -> list[int]:
    kept, values = list(layer), np.array(points)
    while len(kept) > count:
        del kept[int(np.argmin(pareto.contributions(values[kept], reference)))]
    return kept
