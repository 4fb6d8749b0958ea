"""Chooses from trials: the front, and one model of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ranksearch.errors import StudyError
from ranksearch.results import pareto
from ranksearch.results.certainty import chances_within
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import TrialRecord

SURE_ENOUGH = 0.7
"""The chance that a model must have to count as within a margin of the dense one."""


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


def smallest_within(pool: Iterable[TrialRecord], chances: Mapping[int, float], objectives: Objectives) -> TrialRecord | None:
    """The smallest model that is near the dense one with a chance of at least `SURE_ENOUGH`, or None.

    Args:
        pool: the models to choose from.
        chances: of each by number, as `chances_within` gives them for all finalists.
        objectives: the study's objectives, which define the size.
    """
    close = [trial for trial in pool if chances.get(trial.number, 0.0) >= SURE_ENOUGH]
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
            chosen = smallest_within(pool, chances_within(finalists, within, dense_score, objectives), objectives)
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
    raise StudyError(_why_none(finalists, objectives, dense_score, within, min_score, min_ratio))


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
    finalists: Sequence[TrialRecord], objectives: Objectives, dense_score: float, within: float | None, min_score: float | None,
    min_ratio: float | None,
) -> str:  # fmt: skip
    if within is not None:
        best = max(chances_within(finalists, within, dense_score, objectives).values())
        sure = f"with a chance of at least {100 * SURE_ENOUGH:.0f} %"
        return f"No finalist is within {within:g} of the dense net's score {sure}; the best has {100 * best:.0f} %; allow more."
    if min_score is not None:
        best = max(map(_score, finalists))
        return f"No finalist has a validation score of at least {min_score:g}; the best has {best:.4f}."
    largest = max(trial.ratio for trial in finalists)
    return f"No finalist has a compression ratio of at least {min_ratio:g}; the smallest model has {largest:.1f}."


def _score(trial: TrialRecord) -> float:
    return trial.score_validation if trial.score_validation is not None else -math.inf
