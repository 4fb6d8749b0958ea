"""Chooses from trials: the front, and one model of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

from ranksearch.errors import StudyError
from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import TrialRecord

SURE_ENOUGH = 0.7
"""The chance that a model must have to count as within a margin of the dense one."""
MIN_STANDARD_ERROR = 1e-4
"""The smallest standard error of a difference; a bootstrap gives 0 where a model and the dense one fail on the same inputs."""
# In floating point 0.98 - 0.97 > 0.01, although the scores differ by exactly one percentage point.
_ROUNDING = 1e-9


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


def chance_within(trial: TrialRecord, margin: float, dense_score: float) -> float:
    """The chance that a trial's score on new inputs is at most `margin` below the dense model's, judged by validation alone.

    Before its difference from the dense model is measured, the chance is 1 or 0, by the score itself.
    """
    final = trial.finalist
    if final is None or final.difference_validation is None:
        return float(_score(trial) >= dense_score - margin - _ROUNDING)
    measured = final.difference_validation
    below = NormalDist(measured.value + _ROUNDING, max(measured.standard_error, MIN_STANDARD_ERROR)).cdf(-margin)
    return 1.0 - below


def smallest_within(
    trials: Iterable[TrialRecord], margin: float, dense_score: float, objectives: Objectives
) -> TrialRecord | None:
    """The smallest model that is at most `margin` below the dense one with a chance of at least `SURE_ENOUGH`, or None.

    The smallest model whose validation score alone is within the margin owes that score to luck too often, since it is chosen
    from many with noisy scores.
    """
    close = [trial for trial in trials if chance_within(trial, margin, dense_score) >= SURE_ENOUGH]
    return max(close, key=objectives.ratio, default=None)


def choose(
    trials: Sequence[TrialRecord],
    objectives: Objectives,
    *,
    dense_score: float,
    number: int | None = None,
    within: float | None = None,
    min_score: float | None = None,
    min_ratio: float | None = None,
    limits: Limits = UNLIMITED,
) -> TrialRecord:
    """Choose one finalist; without `number`, `within`, `min_score` and `min_ratio` it is the knee of the front.

    Args:
        trials: the trials of a study.
        objectives: the study's objectives, which define front, knee and size.
        dense_score: validation score of the dense model.
        number: choose the finalist with this trial number.
        within: choose the smallest finalist at most this much below the dense model, as `smallest_within` does.
        min_score: choose the smallest finalist with at least this validation score.
        min_ratio: choose the best finalist with at least this compression ratio.
        limits: the study's limits; finalists that keep them are preferred.

    Raises:
        StudyError: there are no finalists, or none meets the condition.
    """
    # All finalists, not only the front: the front may be about another cost than the compression ratio.
    finalists = _finalists(trials)
    if number is not None:
        return _of_number(finalists, number)
    preferred = [trial for trial in finalists if not limits.excess(trial, _score(trial))] or finalists
    for pool in (preferred, finalists):
        if within is not None:
            chosen = smallest_within(pool, within, dense_score, objectives)
        elif min_score is not None:
            fitting = [trial for trial in pool if _score(trial) >= min_score]
            chosen = max(fitting, key=lambda trial: (objectives.ratio(trial), _score(trial)), default=None)
        elif min_ratio is not None:
            fitting = [trial for trial in pool if trial.ratio >= min_ratio]
            chosen = max(fitting, key=lambda trial: (_score(trial), objectives.ratio(trial)), default=None)
        else:
            front = front_of(pool, objectives)
            chosen = front[pareto.knee([objectives.point(_score(trial), trial) for trial in front])]
        if chosen is not None:
            return chosen
    raise StudyError(_why_none(finalists, dense_score, within, min_score, min_ratio))


def _finalists(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The finalists; raises `StudyError` if there are none."""
    finalists = [trial for trial in trials if trial.finalist]
    if finalists:
        return finalists
    if trials and not any(trial.scored for trial in trials):
        raise StudyError("Only finalists can be exported, but no trial has a score; the report says why.")
    failed = sum(trial.failed is not None for trial in trials)
    failures = f" ({failed} failed, see the report)" if failed else ""
    raise StudyError(f"Only finalists can be exported, but there are none yet{failures}; finish the study first.")


def _of_number(finalists: Sequence[TrialRecord], number: int) -> TrialRecord:
    by_number = {trial.number: trial for trial in finalists}
    if number not in by_number:
        names = ", ".join(map(str, sorted(by_number)))
        raise StudyError(f"Only finalists can be exported, but trial {number} is not one of them; they are {names}.")
    return by_number[number]


def _why_none(
    finalists: Sequence[TrialRecord], dense_score: float, within: float | None, min_score: float | None, min_ratio: float | None
) -> str:
    if within is not None:
        best = max(chance_within(trial, within, dense_score) for trial in finalists)
        sure = f"with a chance of at least {SURE_ENOUGH:.0%}"
        return f"No finalist is within {within:g} of the dense net's score {sure}; the best has {best:.0%}."
    if min_score is not None:
        best = max(map(_score, finalists))
        return f"No finalist has a validation score of at least {min_score:g}; the best has {best:.4f}."
    largest = max(trial.ratio for trial in finalists)
    return f"No finalist has a compression ratio of at least {min_ratio:g}; the smallest model has {largest:.1f}."


def _score(trial: TrialRecord) -> float:
    return trial.score_validation if trial.score_validation is not None else -math.inf
