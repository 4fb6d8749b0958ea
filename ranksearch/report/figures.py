"""What the report derives from a record: the best model near the dense one, the knee, hypervolume, correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ranksearch.results import pareto
from ranksearch.results.messages import CurvePoint
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import DenseFacts, StudyRecord, TrialRecord, yardstick

NEAR_DENSE = 0.01
"""A model this close to the dense one on validation counts as "as good": one point of accuracy."""

MAX_SHOWN_SCORE_DROP = 0.10
"""Scores more than this below the yardstick are of no interest: outside the charts, and nothing in the hypervolume."""

PREDICTED_ORIGIN = "frontier"
"""The origin of trials that were predicted from the profile and the probes, before any sampler."""

# A score is a ratio of counts, so 0.98 - 0.97 > 0.01 in floating point though both differ by exactly one point.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of the scores after `epochs` with a later score, over `trials` trials."""

    epochs: float
    trials: int
    value: float


def known(value: float | None) -> float | None:
    """The value, or None where it is missing, NaN or infinite: neither JSON nor a reader can use those."""
    return value if value is not None and math.isfinite(value) else None


def scored(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that finished with a score."""
    return [trial for trial in trials if trial.scored]


def trained(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that `search.trials` counts."""
    return [trial for trial in trials if trial.trained]


def finalists(record: StudyRecord) -> list[TrialRecord]:
    """The trials that were fine-tuned for longer, the largest model first."""
    return sorted((trial for trial in record.trials if trial.finalist), key=record.facts.objectives.ratio)


def curve_of(trial: TrialRecord) -> tuple[CurvePoint, ...]:
    """The curve that ends in the trial's best-trained score: the finalist's, otherwise the search's."""
    return trial.finalist.curve if trial.finalist else trial.curve


def epochs_of(trial: TrialRecord) -> float:
    """The epochs of fine-tuning behind `score_validation`; 0 where there was none."""
    return max((curve_point.epochs for curve_point in curve_of(trial)), default=0)


def near_dense(front: Sequence[TrialRecord], dense: DenseFacts, objectives: Objectives) -> TrialRecord | None:
    """The front's smallest model whose validation score is at most `NEAR_DENSE` below the dense one, if there is one."""
    floor = dense.score_validation - NEAR_DENSE - _ROUNDING
    close = [trial for trial in front if trial.score_validation is not None and trial.score_validation >= floor]
    return max(close, key=objectives.ratio, default=None)


def knee(front: Sequence[TrialRecord], objectives: Objectives) -> TrialRecord | None:
    """The front's elbow in validation score and logarithm of the ratio, as the chart shows it, if there is a front."""
    if not front:
        return None
    return front[pareto.knee([_point(trial.score_validation, trial, objectives) for trial in front])]


def reaches_dense(record: StudyRecord) -> bool:
    """Whether a trial's score of the search is the dense model's at least, or there is none yet."""
    return yardstick(record.facts.dense.score_validation, _searched(record)) == record.facts.dense.score_validation


def hypervolumes(record: StudyRecord, trials: Sequence[TrialRecord] | None = None) -> list[tuple[TrialRecord, float]]:
    """Each trial with the hypervolume of the search's front once it was told; of the record's trials or of some.

    It is measured in validation score and log10 of each ratio, above 1x and the yardstick less `MAX_SHOWN_SCORE_DROP`, so half
    the area of a chart is half the value. Only scores of the search count: longer fine-tuning of finalists would be a
    jump at the end.
    """
    objectives = record.facts.objectives
    reference = (
        yardstick(record.facts.dense.score_validation, _searched(record)) - MAX_SHOWN_SCORE_DROP,
        *objectives.reference,
    )
    best: list[tuple[float, ...]] = []
    value, result = 0.0, []
    for trial in trained(record.trials if trials is None else trials):
        if trial.scored and objectives.measured(trial):
            point, before = _point(trial.score, trial, objectives), best
            best = [(*best, point)[i] for i in pareto.front([*best, point])]
            # Most trials are behind the front, and a volume of two costs takes its time.
            value = value if best == before else pareto.hypervolume(best, reference)
        result.append((trial, value))
    return result


def baseline(record: StudyRecord) -> list[TrialRecord]:
    """The trials of the predicted frontier, without the longer fine-tuning of those that became finalists.

    A VBMF plan may be one of them too: whichever was trained, both have its score.
    """
    return [replace(trial, finalist=None, same_as=None) for trial in record.trials if trial.origin.startswith(PREDICTED_ORIGIN)]


def gain(record: StudyRecord) -> tuple[float, float] | None:
    """The hypervolume of the predicted frontier's trials alone, and of the whole search; None without such trials."""
    if not scored(baseline(record)):
        return None
    (_, whole), (_, alone) = hypervolumes(record)[-1], hypervolumes(record, baseline(record))[-1]
    return alone, whole


def curve_correlations(record: StudyRecord) -> list[Correlation]:
    """How well each rung's scores foretell the order after the last rung, among the trials that finished.

    A rung is left out where fewer than three trials, or equal scores, leave nothing to correlate.
    """
    curves = [trial.curve for trial in scored(trained(record.trials)) if trial.curve]
    last = max((curve[-1].epochs for curve in curves), default=0)
    pairs: dict[float, list[tuple[float, float]]] = {}
    for curve in curves:
        if curve[-1].epochs == last:
            for curve_point in curve[:-1]:
                pairs.setdefault(curve_point.epochs, []).append((curve_point.score, curve[-1].score))
    return _correlations(pairs)


def finalist_correlations(record: StudyRecord) -> list[Correlation]:
    """How well the search's score of a finalist foretells the order of finalists' scores; at most one entry."""
    chosen = finalists(record)
    pairs = [(t.score, t.finalist.score_validation) for t in chosen if t.finalist and t.score is not None]
    epochs = max((curve_point.epochs for trial in chosen for curve_point in trial.curve), default=0)
    return _correlations({epochs: pairs})


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side is constant."""
    ranks = np.array([_mean_ranks(first), _mean_ranks(second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    scale = np.linalg.norm(centred, axis=1).prod()
    return float(centred[0] @ centred[1] / scale) if scale else math.nan


def _mean_ranks(values: ArrayLike) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlations(pairs: dict[float, list[tuple[float, float]]]) -> list[Correlation]:
    found = [
        Correlation(epochs, len(scores), spearman(*zip(*scores, strict=True)))
        for epochs, scores in sorted(pairs.items())
        if len(scores) >= 3
    ]
    return [entry for entry in found if math.isfinite(entry.value)]


def _searched(record: StudyRecord) -> list[float]:
    return [trial.score for trial in scored(record.trials) if trial.score is not None]


def _point(score: float | None, trial: TrialRecord, objectives: Objectives) -> tuple[float, ...]:
    return objectives.point(math.nan if score is None else score, trial)
