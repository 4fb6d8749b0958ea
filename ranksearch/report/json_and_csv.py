"""`front.json`, `front.csv` and `trials.csv`: the study as rows, with unrounded numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ranksearch.report import figures
from ranksearch.results.costs import COSTS, Costed, costs_of
from ranksearch.results.messages import Difference
from ranksearch.results.record import Control, StudyRecord
from ranksearch.results.trials import Timing, TrialRecord

COST_COLUMNS = "costs"
"""Placeholder in the lists of columns; replaced by one column per cost."""

_TRIAL_COLUMNS = (
    "trial", "index", "origin", "outcome", "score", "ratio", COST_COLUMNS, "seconds", "seed", "epochs", "curve",
    "width", "plan_text", "finalist_score_validation", "finalist_score_test", "finalist_epochs", "finalist_latency_ms",
    "same_as",
)  # fmt: skip

_FRONT_COLUMNS = (
    "trial", "score_validation", "score_validation_interval", "score_test", "score_test_interval", "ratio", COST_COLUMNS,
    "width", "plan", "plan_text", "origin", "epochs",
    "latency_ms", "knee", "within_limits",
)  # fmt: skip


_CONTROL_COLUMNS = (
    "control", "score_validation", "score_test", "ratio", COST_COLUMNS, "share", "epochs", "seconds", "latency_ms", "beaten_by",
    "within_limits",
)  # fmt: skip


def front_json(record: StudyRecord) -> str:
    """The front, the dense model, and the circumstances of the study, as indented JSON."""
    facts = record.facts
    content = {
        "name": facts.name,
        "front": _timed_front_rows(record),
        "within_one_point": _within_one_point(record),
        "dense": dense_row(record),
        "controls": _timed_control_rows(record),
        "minimize": list(facts.objectives.minimize),
        "limits": facts.limits.to_dict(),
        "versions": dict(facts.versions),
        "seed": facts.seed,
        "seconds": seconds_row(record),
        "score_name": facts.score_name,
        "machine": facts.machine,
        "command": facts.command,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def front_csv(record: StudyRecord) -> str:
    """The front as CSV; each plan is one cell of JSON."""
    rows = [row | {"plan": json.dumps(row["plan"])} for row in front_rows(record)]
    return _csv(_columns(record, _FRONT_COLUMNS), rows)


def controls_csv(record: StudyRecord) -> str:
    """The controls as CSV."""
    return _csv(_columns(record, _CONTROL_COLUMNS), control_rows(record))


def trials_csv(record: StudyRecord) -> str:
    """Every trial as CSV, including trials that did not finish."""
    return _csv(_columns(record, _TRIAL_COLUMNS), [trial_row(trial) for trial in record.trials])


def front_rows(record: StudyRecord) -> list[dict[str, Any]]:
    """One row per trial of the front, the largest model first; `knee` is true in exactly one row.

    If no model keeps the limits, the rows are the front without limits, and `within_limits` is false.
    """
    at_knee, within = figures.knee(record.shown, record.facts.objectives), bool(record.front)
    return [_front_row(trial) | {"knee": trial == at_knee, "within_limits": within} for trial in record.shown]


def _timed_front_rows(record: StudyRecord) -> list[dict[str, Any]]:
    finalists = [trial.finalist for trial in record.shown]
    rows = zip(front_rows(record), finalists, strict=True)
    return [row | {"timings": _timings(final.timings) if final else []} for row, final in rows]


def _within_one_point(record: StudyRecord) -> dict[str, Any] | None:
    """The model that the report names as within `NEAR_DENSE` of the dense one, and the chance that it is on new data."""
    best = figures.near_dense(record)
    return None if best is None else {"trial": best.number, "chance": figures.chance_near_dense(record, best)}


def dense_row(record: StudyRecord) -> dict[str, Any]:
    """The dense model, with the keys of a row of the front."""
    dense = record.facts.dense
    return {
        **_costs(dense),
        "score_validation": figures.finite_or_none(dense.score_validation),
        "score_test": figures.finite_or_none(dense.score_test),
        "latency_ms": figures.finite_or_none(dense.costs.get("latency")),
        "timings": _timings(dense.timings),
    }


def control_rows(record: StudyRecord) -> list[dict[str, Any]]:
    """One row per control; `beaten_by` is the trial of the front that beats it, or None."""
    return [_control_row(record, control) for control in record.controls]


def _timed_control_rows(record: StudyRecord) -> list[dict[str, Any]]:
    rows = zip(control_rows(record), record.controls, strict=True)
    return [row | {"timings": _timings(control.timings)} for row, control in rows]


def _control_row(record: StudyRecord, control: Control) -> dict[str, Any]:
    winner = figures.beaten_by(record, control)
    return {
        "control": control.number,
        "score_validation": control.score_validation,
        "score_test": control.score_test,
        "ratio": control.ratio,
        **_costs(control),
        "share": control.share,
        "epochs": control.curve[-1].epochs,
        "seconds": control.seconds,
        "latency_ms": figures.finite_or_none(control.costs.get("latency")),
        "beaten_by": winner and winner.number,
        "within_limits": not record.facts.limits.excess(control, control.score_validation),
    }


def seconds_row(record: StudyRecord) -> dict[str, float]:
    """The seconds of each stage, and their `total`."""
    return dict(record.seconds) | {"total": sum(record.seconds.values())}


def trial_row(trial: TrialRecord) -> dict[str, Any]:
    """One trial; the columns of finalists are None for other trials."""
    final = trial.finalist
    return {
        "trial": trial.number,
        "index": trial.index,
        "origin": trial.origin,
        "outcome": trial.outcome.value,
        "score": figures.finite_or_none(trial.score),
        "ratio": trial.ratio,
        **_costs(trial),
        "seconds": trial.seconds,
        "seed": trial.seed,
        "epochs": max((curve_point.epochs for curve_point in trial.curve), default=0),
        "curve": json.dumps([[curve_point.epochs, figures.finite_or_none(curve_point.score)] for curve_point in trial.curve]),
        "width": trial.plan.width,
        "plan_text": str(trial.plan),
        "finalist_score_validation": final and final.score_validation,
        "finalist_score_test": final and final.score_test,
        "finalist_epochs": final and figures.epochs_of(trial),
        "finalist_latency_ms": final and figures.finite_or_none(final.latency_ms),
        "same_as": trial.same_as,
    }


def _front_row(trial: TrialRecord) -> dict[str, Any]:
    final = trial.finalist
    return {
        "trial": trial.number,
        "score_validation": trial.score_validation,
        "score_validation_interval": _interval(final.difference_validation if final else None),
        "score_test": final and figures.finite_or_none(final.score_test),
        "score_test_interval": _interval(final.difference_test if final else None),
        "ratio": trial.ratio,
        **_costs(trial),
        "width": trial.plan.width,
        "plan": trial.plan.to_dict()["layers"],
        "plan_text": str(trial.plan),
        "origin": trial.origin,
        "epochs": figures.epochs_of(trial),
        "latency_ms": figures.finite_or_none(trial.costs.get("latency")),
    }


def _interval(difference: Difference | None) -> list[float] | None:
    """The 95 % interval of the score's difference from the dense model's."""
    return None if difference is None else [difference.low, difference.high]


def _costs(costed: Costed) -> dict[str, float | None]:
    return {COSTS[name].column: figures.finite_or_none(value) for name, value in costed.costs.items()}


def _timings(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(timing) for timing in timings]


def _columns(record: StudyRecord, columns: Sequence[str]) -> list[str]:
    costs = [cost.column for cost in costs_of(record.facts.dense) if cost.column not in columns]
    return [name for column in columns for name in (costs if column == COST_COLUMNS else [column])]


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
