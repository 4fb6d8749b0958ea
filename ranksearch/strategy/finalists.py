"""Which trials are fine-tuned for longer and tested."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ranksearch import pareto
from ranksearch.record import Outcome, TrialRecord

WORTH = 0.15
"""How far below the dense score a trial may lie and still be worth taking home: a long fine-tuning gains some points."""


def choose_finalists(trials: Sequence[TrialRecord], dense_score: float, count: int) -> list[TrialRecord]:
    """At most `count` trials: the front, filled up with the fronts behind it, by rising ratio.

    Where a front holds too many, those that add the least hypervolume are left out, one after the other.
    """
    floor = dense_score - WORTH
    done = [trial for trial in trials if trial.outcome is Outcome.DONE and trial.score is not None]
    pool = [trial for trial in done if trial.score is not None and trial.score > floor] or done
    points = [(trial.score or 0.0, math.log10(trial.ratio)) for trial in pool]
    ranks, chosen = pareto.ranks(points), list[int]()
    for rank in range(len(pool)):
        layer = [i for i in range(len(pool)) if ranks[i] == rank]
        chosen += _spread(layer, points, count - len(chosen), floor)
        if len(chosen) == count:
            break
    return sorted((pool[i] for i in chosen), key=lambda trial: trial.ratio)


def _spread(layer: list[int], points: Sequence[tuple[float, float]], count: int, floor: float) -> list[int]:
    kept = list(layer)
    while len(kept) > count:
        rest = {i: [points[j] for j in kept if j != i] for i in kept}
        kept.remove(max(kept, key=lambda i: pareto.hypervolume(rest[i], (floor, 0.0))))
    return kept
