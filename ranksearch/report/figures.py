"""Figures that the report derives from a record: the best model near the dense one, knee, hypervolume, correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ranksearch.results import pareto
from ranksearch.results.certainty import chances_within
from ranksearch.results.choosing import smallest_within, yardstick
from ranksearch.results.messages import CurvePoint
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import Control, StudyRecord
from ranksearch.results.trials import TrialRecord

NEAR_DENSE = 0.01
"""A model counts as good as the dense one down to this much below its score: one percentage point of accuracy."""

MAX_SHOWN_SCORE_DROP = 0.10
"""Scores more than this below the yardstick are left out of the charts and the hypervolume."""

PREDICTED_ORIGIN = "frontier"
"""Origin of the trials of the predicted front, which profile and probes predict before any sampler."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation between the scores after `epochs` epochs and a later score, over `trials` trials."""

    epochs: float
    trials: int
    value: float


def finite_or_none(value: float | None) -> float | None:
    """The value; None if it is missing, NaN or infinite, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def scored(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials with a score."""
    return [trial for trial in trials if trial.scored]


def trained(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that `search.trials` counts."""
    return [trial for trial in trials if trial.trained]


def finalists(record: StudyRecord) -> list[TrialRecord]:
    """The trials that were fine-tuned for longer, the largest model first."""
    return sorted((trial for trial in record.trials if trial.finalist), key=record.facts.objectives.ratio)


def curve_of(trial: TrialRecord) -> tuple[CurvePoint, ...]:
    """The learning curve that ends in `score_validation`: the finalist's, else the trial's."""
    return trial.finalist.curve if trial.finalist else trial.curve


def epochs_of(trial: TrialRecord) -> float:
    """Epochs of fine-tuning before `score_validation`; 0 if there were none."""
    return max((curve_point.epochs for curve_point in curve_of(trial)), default=0)


def near_dense(record: StudyRecord) -> TrialRecord | None:
    """The smallest model of the front that is within `NEAR_DENSE` of the dense model, or None."""
    return smallest_within(record.shown, _chances(record), record.facts.objectives)


def chance_near_dense(record: StudyRecord, trial: TrialRecord) -> float | None:
    """The chance that a model is within `NEAR_DENSE` of the dense model on new inputs; None before it was a finalist."""
    if trial.finalist is None or trial.finalist.difference_validation is None:
        return None
    return _chances(record)[trial.number]


def likeliest_near_dense(record: StudyRecord) -> TrialRecord | None:
    """The model of the front with the best chance to be within `NEAR_DENSE`, if its score is; None if no score is so high."""
    enough = record.facts.dense.score_validation - NEAR_DENSE
    near = [trial for trial in record.shown if (trial.score_validation or -math.inf) >= enough]
    judged = [(chance, trial) for trial in near if (chance := chance_near_dense(record, trial)) is not None]
    return max(judged, key=lambda each: each[0])[1] if judged else None


def _chances(record: StudyRecord) -> dict[int, float]:
    facts, judged = record.facts, {trial.number: trial for trial in [*finalists(record), *record.shown]}
    return chances_within(judged.values(), NEAR_DENSE, facts.dense.score_validation, facts.objectives)


def knee(front: Sequence[TrialRecord], objectives: Objectives) -> TrialRecord | None:
    """The knee of the front in validation score and log10 of the ratios, the axes of the chart; None without a front."""
    if not front:
        return None
    return front[pareto.knee([_point(trial.score_validation, trial, objectives) for trial in front])]


def compared_controls(record: StudyRecord) -> list[Control]:
    """The controls that the front is compared with: those within the limits of size, once their costs are measured."""
    limits, measured = record.facts.limits, record.facts.objectives.measured
    return [control for control in record.controls if measured(control) and not limits.excess(control)]


def controls_ahead(record: StudyRecord) -> list[Control]:
    """The controls within all limits that no model of the front beats."""
    limits = record.facts.limits
    within = [control for control in compared_controls(record) if not limits.excess(control, control.score_validation)]
    return [control for control in within if beaten_by(record, control) is None]


def beaten_by(record: StudyRecord, control: Control) -> TrialRecord | None:
    """The best model of the front with at least the control's validation score at no more of each minimised cost, or None."""
    objectives = record.facts.objectives
    theirs = objectives.point(control.score_validation, control)
    better = [
        trial
        for trial in record.shown
        if all(mine >= its for mine, its in zip(_point(trial.score_validation, trial, objectives), theirs, strict=True))
    ]
    return max(better, key=lambda trial: _point(trial.score_validation, trial, objectives), default=None)


def reaches_dense(record: StudyRecord) -> bool:
    """Whether a trial reached the dense model's score during the search; true while no trial has a score."""
    return yardstick(record.facts.dense.score_validation, _searched(record)) == record.facts.dense.score_validation


def hypervolumes(record: StudyRecord, trials: Sequence[TrialRecord] | None = None) -> list[tuple[TrialRecord, float]]:
    """Each trained trial with the hypervolume of the front after it, in the order of `trials` (default: the record's).

    The axes are those of the chart: validation score, and log10 of each ratio. The reference point is the yardstick minus
    `MAX_SHOWN_SCORE_DROP`, and a ratio of 1x. Only scores of the search count: those of finalists, after longer fine-tuning,
    would make a jump at the end.
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
            # Most trials do not change the front, and a hypervolume with two costs is slow.
            value = value if best == before else pareto.hypervolume(best, reference)
        result.append((trial, value))
    return result


def baseline(record: StudyRecord) -> list[TrialRecord]:
    """The trials of the predicted front, with their scores of the search only.

    If a trial has the same plan as an earlier one, it still counts here, with the score of that one.
    """
    return [replace(trial, finalist=None, same_as=None) for trial in record.trials if trial.origin.startswith(PREDICTED_ORIGIN)]


def hypervolume_gain(record: StudyRecord) -> tuple[float, float] | None:
    """The hypervolume of the predicted front's trials alone, and of all trials; None if none of the former has a score."""
    if not scored(baseline(record)):
        return None
    (_, of_all), (_, of_baseline) = hypervolumes(record)[-1], hypervolumes(record, baseline(record))[-1]
    return of_baseline, of_all


def curve_correlations(record: StudyRecord) -> list[Correlation]:
    """Rank correlation of the scores at each learning-curve point with the scores at the last, over the trials that got so far.

    Points with fewer than three trials, or with equal scores only, are left out.
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
    """Rank correlation of the finalists' scores in the search with their scores as finalists; one entry or none."""
    chosen = finalists(record)
    pairs = [(t.score, t.finalist.score_validation) for t in chosen if t.finalist and t.score is not None]
    epochs = max((curve_point.epochs for trial in chosen for curve_point in trial.curve), default=0)
    return _correlations({epochs: pairs})


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; ties get their mean rank. NaN if one side is constant."""
    ranks = np.array([_mean_ranks(first), _mean_ranks(second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    scale = np.linalg.norm(centred, axis=1).prod()
    return float(centred[0] @ centred[1] / scale) if scale else math.nan


def _mean_ranks(values: ArrayLike) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlations(pairs: dict[float, list[tuple[float, float]]]) -> list[Correlation]:
    correlations = [
        Correlation(epochs, len(scores), spearman(*zip(*scores, strict=True)))
        for epochs, scores in sorted(pairs.items())
        if len(scores) >= 3
    ]
    return [entry for entry in correlations if math.isfinite(entry.value)]


def _searched(record: StudyRecord) -> list[float]:
    return [trial.score for trial in scored(record.trials) if trial.score is not None]


def _point(score: float | None, trial: TrialRecord, objectives: Objectives) -> tuple[float, ...]:
    return objectives.point(math.nan if score is None else score, trial)
