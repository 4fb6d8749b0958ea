"""Choice of the finalists: the trials that are fine-tuned for longer and scored on the test split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ranksearch.results import pareto
from ranksearch.results.choosing import yardstick
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import TrialRecord

MAX_FINALIST_SCORE_DROP = 0.15
"""How far below the dense score a finalist may be, or below the best score if no trial reaches the dense score. Above 0, since
a long fine-tuning gains several percentage points."""


def choose_finalists(
    trials: Sequence[TrialRecord],
    dense_score: float,
    count: int,
    limits: Limits,
    objectives: Objectives,
) -> list[TrialRecord]:
    """Choose at most `count` trials of different plans, sorted by size, the largest model first.

    Trials on the front come first, then those on the next fronts. Of a front with too many trials, the ones that add the least
    hypervolume are dropped one by one. Trials outside the limits come last, the nearest first, since a long fine-tuning may
    lift their score above `min_score`.
    """
    done = [trial for trial in trials if trial.scored and trial.same_as is None]
    # Fine-tuning cannot shrink a model, so trials over a size limit are used only if there are no others.
    done = [trial for trial in done if not limits.excess(trial)] or done
    scores = [trial.score for trial in done if trial.score is not None]
    floor, default_floor = floor_of(dense_score, scores, limits), floor_of(dense_score, scores, UNLIMITED)
    candidates = [trial for trial in done if trial.score is not None and trial.score >= min(floor, default_floor)]
    # By the trial's own score: with the finalist's score, the choice would change once that is known.
    excess = {trial.number: limits.excess(trial, trial.score) for trial in candidates}
    chosen = _fronts([trial for trial in candidates if not excess[trial.number]], count, floor, objectives)
    outside = sorted((trial for trial in candidates if excess[trial.number]), key=lambda trial: excess[trial.number])
    return sorted([*chosen, *outside[: count - len(chosen)]], key=objectives.ratio)


def floor_of(dense_score: float, scores: Iterable[float], limits: Limits, *, below: float = MAX_FINALIST_SCORE_DROP) -> float:
    """The score below which trials do not count: `limits.min_score` if it is set, otherwise `below` under the `yardstick`."""
    if limits.min_score is not None:
        return limits.min_score
    return yardstick(dense_score, scores) - below


def _fronts(pool: Sequence[TrialRecord], count: int, floor: float, objectives: Objectives) -> list[TrialRecord]:
    points = [objectives.point(trial.score or 0.0, trial) for trial in pool]
    reference = (floor, *objectives.reference)
    ranks, chosen = pareto.ranks(points), list[int]()
    for rank in range(len(pool)):
        front = [i for i in range(len(pool)) if ranks[i] == rank]
        chosen += _spread(front, points, count - len(chosen), reference)
        if len(chosen) == count:
            break
    return [pool[i] for i in chosen]


def _spread(front: list[int], points: Sequence[tuple[float, ...]], count: int, reference: tuple[float, ...]) -> list[int]:
    kept, values = list(front), np.array(points)
    while len(kept) > count:
        del kept[int(np.argmin(pareto.contributions(values[kept], reference)))]
    return kept
