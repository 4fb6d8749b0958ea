"""Data of the charts: rows with a position, a kind of mark, and the texts of the tooltip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ranksearch.plan import Plan
from ranksearch.report import figures, text
from ranksearch.results.choosing import front_of, yardstick
from ranksearch.results.costs import PARAMS, Costed, costs_of
from ranksearch.results.messages import Difference, Outcome
from ranksearch.results.record import Control, StudyRecord
from ranksearch.results.trials import TrialRecord

TRIAL, VBMF, DENSE = "trial", "VBMF one-shot", "dense model"
PREDICTED = "predicted front"
FINALIST, FRONT, TEST, SEARCH = "finalist", "front", "test score of finalist", "finished trial"
UNFINISHED = "unfinished trial"
CONTROL = "control from scratch"


@dataclass(frozen=True)
class Window:
    """The visible part of the front's chart: scores `low..high`, and `ratios`. `below` trials lie below it."""

    low: float
    high: float
    ratios: tuple[float, float]
    below: int


def window(record: StudyRecord, cost: str) -> Window:
    """The visible part of the front's chart: scores down to `MAX_SHOWN_SCORE_DROP` below the yardstick.

    Otherwise one trial at chance level would squeeze the differences that matter into a few pixels.
    """
    rows = front_points(record, cost)
    scores = [row["score"] for row in rows]
    best = [trial.score_validation or 0.0 for trial in record.shown]
    lowest = yardstick(record.facts.dense.score_validation, best) - figures.MAX_SHOWN_SCORE_DROP
    pad = 0.05 * (max(scores) - max(min(scores), lowest)) + 0.002
    band = record.facts.dense.score_validation - 1.5 * figures.NEAR_DENSE
    low = max(lowest, min(min(scores) - pad, band))
    ratios = [row["ratio"] for row in rows]
    below = {row["trial"] for row in rows} - {row["trial"] for row in rows if row["score"] >= low}
    return Window(low, max(scores) + pad, (min(ratios) * 0.92, max(max(ratios) * 1.12, 2.0)), len(below))


def front_points(record: StudyRecord, cost: str) -> list[dict[str, Any]]:
    """All marks of the front's chart against one cost, in drawing order: later marks are on top."""
    front = {trial.number for trial in record.shown}
    measured = record.facts.objectives.only(cost).measured
    finalists = [trial for trial in figures.finalists(record) if measured(trial)]
    trials = [trial for trial in figures.trained(record.trials) if measured(trial)]
    rows = [_point(record, t, t.score, cost, kind=_kind(t)) for t in trials if t.curve and t.score is not None]
    rows.sort(key=lambda row: row["kind"] in (VBMF, PREDICTED))
    for trial in [*finalists, *(trial for trial in record.shown if not trial.finalist)]:
        kind = FRONT if trial.number in front else FINALIST
        rows.append(_point(record, trial, trial.score_validation, cost, kind=kind))
    rows += [_point(record, t, t.finalist.score_test, cost, kind=TEST) for t in finalists if t.finalist]
    rows += [_control_point(record, control, cost) for control in record.controls if measured(control)]
    return [row for row in rows if row["score"] is not None] + [_dense_point(record)]


def front_line(record: StudyRecord, cost: str) -> list[dict[str, Any]]:
    """The front as a line. With two costs: the models of the front that no other model beats in score and this cost."""
    best = front_of(record.shown, record.facts.objectives.only(cost))
    return [{"ratio": ratio(record, trial, cost), "score": trial.score_validation} for trial in best]


def front_labels(record: StudyRecord, cost: str) -> list[dict[str, Any]]:
    """Labels of the two points that the report names: the knee, and the smallest model near the dense one."""
    facts = record.facts
    at_knee, near = (
        figures.knee(record.shown, facts.objectives),
        figures.near_dense(record),
    )
    suffixes = {trial.number: (trial, "") for trial in (near,) if trial}
    suffixes |= {trial.number: (trial, ", knee") for trial in (at_knee,) if trial}
    measured = record.facts.objectives.only(cost).measured
    ratios = [(trial, ratio(record, trial, cost), suffix) for trial, suffix in suffixes.values() if measured(trial)]
    return [{"ratio": x, "score": t.score_validation, "text": f"{text.ratio(x)}{suffix}"} for t, x, suffix in ratios]


def layer_bars(record: StudyRecord) -> list[dict[str, Any]]:
    """The latency of each layer, dense and in the model that the report names; empty if the layers were not timed."""
    facts = record.facts
    near = figures.near_dense(record) or figures.knee(record.shown, facts.objectives)
    timed = [layer for layer in facts.layers if "latency" in layer.costs]
    if near is None or near.finalist is None or not near.finalist.layers_ms:
        return []
    rows = []
    for layer in timed:
        ms = layer.costs["latency"], near.finalist.layers_ms.get(layer.name, layer.costs["latency"])
        names = ("dense", "dense model"), (str(near.plan[layer.name]), f"trial {near.number}")
        rows += [
            {"layer": layer.name, "ms": ms, "how": how, "model": model} for ms, (how, model) in zip(ms, names, strict=True)
        ]
    return rows


def limit_lines(record: StudyRecord, cost: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The limits on score and ratio that lie inside the chart; a maximum cost counts as a minimum ratio."""
    limits, dense, shown = record.facts.limits, record.facts.dense, window(record, cost)
    ratios = [dense.costs[cost] / limits.max_costs[cost] if cost in limits.max_costs else 0.0]
    ratios += [limits.min_ratio] if cost == PARAMS.name and limits.min_ratio else []
    scores = [limits.min_score] if limits.min_score is not None and shown.low <= limits.min_score <= shown.high else []
    inside = [max(ratios)] if shown.ratios[0] <= max(ratios) <= shown.ratios[1] else []
    return [{"score": score} for score in scores], [{"ratio": ratio} for ratio in inside]


def search_line(record: StudyRecord, cost: str) -> list[dict[str, Any]]:
    """The front by the scores of the search; empty before there are finalists, when it equals the front."""
    if not any(trial.finalist for trial in record.shown):
        return []
    searched = [replace(trial, finalist=None) for trial in record.trials]
    return _searched(record, searched, cost)


def baseline_line(record: StudyRecord, cost: str) -> list[dict[str, Any]]:
    """The front of the predicted front's trials alone, by the scores of the search: the baseline of the search."""
    return _searched(record, figures.baseline(record), cost)


def ratio(record: StudyRecord, costed: Costed, cost: str) -> float:
    """The ratio dense / compressed of a model in one cost."""
    return record.facts.objectives.only(cost).ratio(costed)


def hypervolume_points(record: StudyRecord) -> list[dict[str, Any]]:
    """One row per trial: the hypervolume after it, and whether the trial raised it."""
    before, rows = 0.0, []
    for trial, value in figures.hypervolumes(record):
        rows.append(
            {
                "trial": trial.number,
                "origin": trial.origin,
                "hypervolume": value,
                "raised": value > before,
                "plan": plan_lines(trial.plan),
            }
        )
        before = value
    return rows


def curve_points(record: StudyRecord) -> list[dict[str, Any]]:
    """One row per learning-curve point of every trial, and of every finalist's longer fine-tuning."""
    rows = []
    for trial in figures.trained(record.trials):
        kind = SEARCH if trial.outcome is Outcome.DONE else UNFINISHED
        rows += _curve(record, trial, trial.curve, kind=kind)
        if trial.finalist:
            rows += _curve(record, trial, trial.finalist.curve, kind=FINALIST)
    return rows


def curve_domain(record: StudyRecord) -> tuple[float, float]:
    """Lowest and highest score in the chart of learning curves.

    The curves start low, so the chart reaches down three times as far as that of the front.
    """
    scores = [row["score"] for row in curve_points(record)]
    low = max(min(scores), yardstick(record.facts.dense.score_validation, scores) - 3 * figures.MAX_SHOWN_SCORE_DROP)
    pad = 0.04 * (max(scores) - low) + 0.001
    return low - pad, max(scores) + pad


def plan_lines(plan: Plan) -> str:
    """The plan, one layer per line, below the width of the net if that is not the dense one."""
    width = [] if plan.width == 1 else [f"width: {plan.width:g}"]
    return "\n".join([*width, *(f"{name}: {value}" for name, value in plan)]) or "dense"


def _searched(record: StudyRecord, trials: Sequence[TrialRecord], cost: str) -> list[dict[str, Any]]:
    """The front of some trials against one cost as a line, by the scores of the search."""
    front = front_of(trials, record.facts.objectives.only(cost))
    return [{"ratio": ratio(record, trial, cost), "score": trial.score} for trial in front]


def _kind(trial: TrialRecord) -> str:
    if trial.origin.startswith("vbmf"):
        return VBMF
    if trial.origin.startswith(figures.PREDICTED_ORIGIN):
        return PREDICTED
    return TRIAL


def _point(record: StudyRecord, trial: TrialRecord, score: float | None, cost: str, *, kind: str) -> dict[str, Any]:
    name = record.facts.score_name
    searched = kind in (TRIAL, VBMF, PREDICTED)
    final, score_shown = trial.finalist, trial.score if searched else trial.score_validation
    return {
        "kind": kind,
        "ratio": ratio(record, trial, cost),
        "score": figures.finite_or_none(score),
        "trial": str(trial.number),
        "origin": trial.origin,
        "outcome": trial.ending,
        "ratio_text": text.ratio(ratio(record, trial, cost)),
        **_sizes(record, trial),
        "validation": _with_interval(score_shown, final.difference_validation if final and not searched else None, name),
        "test": _with_interval(final.score_test if final else None, final.difference_test if final else None, name),
        "plan": plan_lines(trial.plan),
    }


def _with_interval(value: float | None, difference: Difference | None, name: str) -> str:
    """A score, and the interval of its difference from the dense model's."""
    words = text.score(value, name)
    return words if difference is None else f"{words}, from dense {text.interval(difference.low, difference.high, name)}"


def _dense_point(record: StudyRecord) -> dict[str, Any]:
    dense, name = record.facts.dense, record.facts.score_name
    return {
        "kind": DENSE,
        "ratio": 1.0,
        "score": dense.score_validation,
        "trial": text.NO_VALUE,
        "origin": DENSE,
        "outcome": text.NO_VALUE,
        "ratio_text": text.ratio(1.0),
        **_sizes(record, dense),
        "validation": text.score(dense.score_validation, name),
        "test": text.score(dense.score_test, name),
        "plan": "dense",
    }


def _control_point(record: StudyRecord, control: Control, cost: str) -> dict[str, Any]:
    name = record.facts.score_name
    return {
        "kind": CONTROL,
        "ratio": ratio(record, control, cost),
        "score": control.score_validation,
        "trial": text.NO_VALUE,
        "origin": f"control {control.number}",
        "outcome": text.NO_VALUE,
        "ratio_text": text.ratio(ratio(record, control, cost)),
        **_sizes(record, control),
        "validation": text.score(control.score_validation, name),
        "test": text.score(control.score_test, name),
        "plan": "fewer channels in each layer",
    }


def _sizes(record: StudyRecord, costed: Costed) -> dict[str, str]:
    return {cost.name: cost.text(costed.costs.get(cost.name)) for cost in costs_of(record.facts.dense)}


def _curve(record: StudyRecord, trial: TrialRecord, curve: Sequence[Any], *, kind: str) -> list[dict[str, Any]]:
    return [
        {
            "line": f"{trial.number} {kind}",
            "kind": kind,
            "trial": trial.number,
            "origin": trial.origin,
            "epochs": curve_point.epochs,
            "score": curve_point.score,
            "text": text.score(curve_point.score, record.facts.score_name),
        }
        for curve_point in curve
        if figures.finite_or_none(curve_point.score) is not None
    ]
