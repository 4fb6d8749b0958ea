"""Chooses from trials: the front, and one model of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ranksearch.errors import StudyError
from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import TrialRecord


def yardstick(dense_score: float, scores: Iterable[float]) -> float:
    """The score that trials are compared with: the dense model's, or their best score if none reaches the dense model's.

    Trials may all lie far below the dense model, if the limits allow only small models or a few epochs train them from
    scratch. The distance to the dense score would not separate them.
    """
    return min(dense_score, max(scores, default=dense_score))


def front_of(trials: Sequence[TrialRecord], objectives: Objectives, limits: Limits = UNLIMITED) -> list[TrialRecord]:
    """The non-dominated trials within the limits, by validation score and ratios; the largest model first, each plan once.

    If there are finalists within the limits, only they compete: scores after long and after short fine-tuning are not
    comparable.
    """
    within = [trial for trial in trials if trial.scored and not limits.excess(trial, trial.score_validation)]
    within = [trial for trial in within if objectives.measured(trial)]
    pool = [trial for trial in within if trial.finalist] or [trial for trial in within if trial.same_as is None]
    chosen = [pool[i] for i in pareto.front([objectives.point(_score(trial), trial) for trial in pool])]
    return sorted(chosen, key=objectives.ratio)


def choose(
    trials: Sequence[TrialRecord],
    objectives: Objectives,
    *,
    number: int | None = None,
    min_score: float | None = None,
    min_ratio: float | None = None,
    limits: Limits = UNLIMITED,
) -> TrialRecord:
    """Choose one finalist; without `number`, `min_score` and `min_ratio` it is the knee of the front.

    Args:
        trials: the trials of a study.
        objectives: the study's objectives, which define front, knee and size.
        number: choose the finalist with this trial number.
        min_score: choose the smallest finalist with at least this validation score.
        min_ratio: choose the best finalist with at least this compression ratio.
        limits: the study's limits; finalists that keep them are preferred.

    Raises:
        StudyError: there are no finalists, or none meets the condition.
    """
    finalists = {trial.number: trial for trial in trials if trial.finalist}
    if not finalists:
        if trials and not any(trial.scored for trial in trials):
            raise StudyError("Only finalists can be exported, but no trial has a score; the report says why.")
        failed = sum(trial.failed is not None for trial in trials)
        failures = f" ({failed} failed, see the report)" if failed else ""
        raise StudyError(f"Only finalists can be exported, but there are none yet{failures}; finish the study first.")
    if number is not None:
        if number not in finalists:
            names = ", ".join(map(str, sorted(finalists)))
            raise StudyError(f"Only finalists can be exported, but trial {number} is not one of them; they are {names}.")
        return finalists[number]
    # All finalists, not only the front: the front may be about another cost than the compression ratio.
    candidates = list(finalists.values())
    within = [trial for trial in candidates if not limits.excess(trial, _score(trial))]
    if min_score is not None:
        fitting = [t for t in within if _score(t) >= min_score] or [t for t in candidates if _score(t) >= min_score]
        if not fitting:
            best = max(map(_score, candidates))
            raise StudyError(f"No finalist has a validation score of at least {min_score:g}; the best has {best:.4f}.")
        return max(fitting, key=lambda trial: (objectives.ratio(trial), _score(trial)))
    if min_ratio is not None:
        fitting = [t for t in within if t.ratio >= min_ratio] or [t for t in candidates if t.ratio >= min_ratio]
        if not fitting:
            largest = max(trial.ratio for trial in candidates)
            raise StudyError(
                f"No finalist has a compression ratio of at least {min_ratio:g}; the smallest model has {largest:.1f}."
            )
        return max(fitting, key=lambda trial: (_score(trial), objectives.ratio(trial)))
    front = front_of(within or candidates, objectives)
    return front[pareto.knee([objectives.point(_score(trial), trial) for trial in front])]


def _score(trial: TrialRecord) -> float:
    return trial.score_validation if trial.score_validation is not None else -math.inf
