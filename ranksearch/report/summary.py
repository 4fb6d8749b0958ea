"""Texts for the page and the Markdown file: the headline, the front as lines of text, outcomes, settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranksearch.plan import Plan
from ranksearch.report import figures, text
from ranksearch.results.choosing import SURE_ENOUGH
from ranksearch.results.costs import COSTS, LATENCY, PARAMS, Cost, Costed, costs_of
from ranksearch.results.messages import Difference, Outcome
from ranksearch.results.record import Control, StudyRecord
from ranksearch.results.trials import Timing, TrialRecord
from ranksearch.spec import FROM_PYTHON


@dataclass(frozen=True, kw_only=True)
class ModelLine:
    """The figures of one model as text."""

    ratio: str
    costs: list[tuple[str, str]]
    """Each cost with its ratio; parameters have an empty ratio here, as `ratio` holds it."""
    validation: str
    validation_difference: str
    test: str
    test_difference: str


@dataclass(frozen=True, kw_only=True)
class FrontLine(ModelLine):
    """The dense model or one trial of the front as text; `near` marks the smallest model near the dense one."""

    trial: int | str
    sizes: list[str]
    """The ratio in each cost that the study minimises: `36.4x`, `3.67x MACs`."""
    epochs: str
    plan: Plan
    knee: bool
    near: bool


@dataclass(frozen=True, kw_only=True)
class ControlLine(ModelLine):
    """One control as text."""

    number: int
    beaten_by: str
    """The model of the front that beats it: `trial 12`, `no model`; or `outside the limits`; a dash before it is timed."""


def headline(record: StudyRecord) -> str:
    """One sentence: the smallest model near the dense one, or why there is none yet."""
    facts, name = record.facts, record.facts.score_name
    near = text.margin(figures.NEAR_DENSE, name)
    if not record.shown:
        return no_scores(record)
    best = figures.near_dense(record)
    if best is None and (likeliest := figures.likeliest_near_dense(record)):
        chance = figures.chance_near_dense(record, likeliest)
        assert chance is not None
        model = f"trial {likeliest.number}, with {text.chance(chance)}"
        return (
            f"No model is within {near} of the dense net with a chance of {text.chance(SURE_ENOUGH)} yet. The likeliest is "
            f"{model}: {_smaller(record, likeliest)}, {_scores(record, likeliest)}."
        )
    if best is None:
        top = max(trial.score_validation or 0.0 for trial in record.shown)
        return (
            f"No model is within {near} of the dense net yet: the best of the front reaches {text.score(top, name)} "
            f"{name} on validation, the dense net {text.score(facts.dense.score_validation, name)}."
        )
    chance = figures.chance_near_dense(record, best)
    sure = (
        ""
        if chance is None
        else f" Judged by validation, the chance that it is within {near} on new data is {text.chance(chance)}."
    )
    model = f"trial {best.number}: {_smaller(record, best)}, {_scores(record, best)}"
    return f"The smallest model within {near} of the dense net is {model}.{sure}"


def against_controls(record: StudyRecord) -> str:
    """One sentence: whether the front beats the controls. Empty if there is nothing to compare."""
    controls = figures.compared_controls(record)
    if not controls or not record.shown:
        return ""
    ahead = figures.controls_ahead(record)
    one, many = "the control, a narrower net trained from scratch", "controls, narrower nets trained from scratch"
    each = "" if len(controls) == 1 else "for each, "
    costs = " and ".join(COSTS[cost].title for cost in record.facts.objectives.minimize)
    if not ahead:
        beaten = one if len(controls) == 1 else f"all {len(controls)} {many}"
        better = f"a model of the front with at most its {costs} scores at least as well on validation"
        return f"The front beats {beaten}: {each}{better}."
    part = "any" if len(ahead) == len(controls) else len(ahead)
    some = one if len(controls) == 1 else f"{part} of {len(controls)} {many}"
    name = record.facts.score_name
    points = "; ".join(f"{', '.join(_sizes(record, net))} at {text.score(net.score_validation, name)}" for net in ahead)
    worse = f"no model of the front with at most its {costs} scores as well on validation"
    return f"The front does not beat {some} ({points}): {'' if len(ahead) == 1 else each}{worse}."


def controls_note(record: StudyRecord) -> str:
    """How the controls were made, and what "beaten" means."""
    dense = record.facts.spec.get("dense", {})
    epochs = max((control.curve[-1].epochs for control in record.controls), default=0)
    unknown = " The dense net began with given weights; their training is not counted."
    return (
        "A control has the layers of the dense net with fewer channels. It was trained from random weights for "
        f"{epochs:g} epochs, as many as the dense net and a finalist together, by the recipe of the dense net."
        f"{unknown if dense.get('weights') or not dense.get('epochs') else ''} "
        "A model of the front beats it with at least its validation score at no more of each cost that the study minimises."
    )


def no_scores(record: StudyRecord) -> str:
    """The sentence that replaces tables and charts when no trial has a score."""
    return "No trial has a score." if record.trials else "No trial has finished yet."


def worst_that_counts(record: StudyRecord) -> str:
    """How bad a model must be to count for nothing in the hypervolume: `10 points worse than the dense one`."""
    other = "the dense one" if figures.reaches_dense(record) else "the best trial, as none reaches the dense one,"
    return f"{text.margin(figures.MAX_SHOWN_SCORE_DROP, record.facts.score_name)} worse than {other}"


def ratio_words(record: StudyRecord, trial: TrialRecord) -> list[tuple[str, str]]:
    """The ratio of a trial in each minimised cost, and the words after it: (`25.5x`, `smaller`), (`12.0x`, `fewer MACs`)."""
    objectives = record.facts.objectives
    ratios = zip(objectives.minimize, objectives.ratios(trial), strict=True)
    return [(text.ratio(ratio), COSTS[cost].fewer) for cost, ratio in ratios]


def shown_costs(record: StudyRecord) -> list[Cost]:
    """The costs that the tables show."""
    return costs_of(record.facts.dense)


def ratio_names(record: StudyRecord) -> str:
    """The ratios that the front shows against the score: `compression ratio and MACs ratio`."""
    return " and ".join(COSTS[cost].ratio for cost in record.facts.objectives.minimize)


def pictures(record: StudyRecord) -> dict[str, str]:
    """Picture files of the front and the cost that each shows: `front.png`, then `front-COST.png` for each further cost.

    The latency has a picture whenever it was measured.
    """
    first, *more = dict.fromkeys([*record.facts.objectives.minimize, *({LATENCY.name} & set(record.facts.dense.costs))])
    return {"front.png": first} | {f"front-{cost}.png": cost for cost in more}


def front_lines(record: StudyRecord) -> list[FrontLine]:
    """The front as text, the largest model first."""
    shown = record.shown
    facts = record.facts
    at_knee, near = figures.knee(shown, facts.objectives), figures.near_dense(record)
    return [_line(record, trial, knee=trial is at_knee, near=trial is near) for trial in shown]


def dense_line(record: StudyRecord) -> FrontLine:
    """The dense model as text."""
    dense, name, same = record.facts.dense, record.facts.score_name, text.ratio(1)
    return FrontLine(
        trial="dense", sizes=[], ratio=same, costs=_costs(record, dense),
        validation=text.score(dense.score_validation, name), validation_difference="",
        test=text.score(dense.score_test, name), test_difference="",
        epochs="", plan=Plan(), knee=False, near=False,
    )  # fmt: skip


@dataclass(frozen=True)
class AccountLine:
    """A part of the dense model in its account as text."""

    title: str
    modules: str
    params: str
    params_share: str
    macs: str
    macs_share: str


def account_lines(record: StudyRecord) -> list[AccountLine]:
    """Where all parameters and MACs of the dense model are; empty in older records."""
    dense = record.facts.dense
    return [
        AccountLine(
            part.title, text.count(len(part.modules)), text.count(part.params), text.share(part.params / dense.params),
            text.count(part.macs), text.share(part.macs / dense.macs),
        )
        for part in record.facts.account
    ]  # fmt: skip


@dataclass(frozen=True)
class NarrowLine:
    """A narrower net as text."""

    width: str
    sizes: list[tuple[str, str]]
    score: str


def narrow_lines(record: StudyRecord) -> list[NarrowLine]:
    """The narrower nets that plans start from."""
    name = record.facts.score_name
    return [
        NarrowLine(f"{net.width:g}", _costs(record, net), text.score(net.score_validation, name)) for net in record.facts.narrow
    ]


def control_lines(record: StudyRecord) -> list[ControlLine]:
    """The controls as text, the largest first."""
    return [_control_line(record, control) for control in sorted(record.controls, key=record.facts.objectives.ratio)]


def timing_head(record: StudyRecord) -> list[str]:
    """One heading for each way in which the models were timed: `ONNX Runtime, batch 1`."""
    return [f"{text.runtime(timing.runtime)}, batch {timing.batch}" for timing in record.facts.dense.timings]


def timing_rows(record: StudyRecord) -> list[tuple[str, list[str]]]:
    """The dense model, the models of the front and the controls, each with its latencies: `0.034 ms (6.1x, +2 %)`.

    In brackets the speed-up, and how far the median of the rounds lay above the least.
    """
    dense = record.facts.dense.timings
    models = [("dense", dense)] + [(str(trial.number), trial.finalist.timings) for trial in record.shown if trial.finalist]
    models += [(f"control {control.number}", control.timings) for control in record.controls]
    return [(name, [_timing(timings, way) for way in dense]) for name, timings in models]


def timing_note(record: StudyRecord) -> str:
    """The circumstances of the latencies in a sentence."""
    threads = sorted({timing.threads for timing in record.facts.dense.timings})
    quiet = all(timing.quiet for timing in record.facts.dense.timings)
    return (
        f"Milliseconds for one batch on {text.with_noun(threads[0], 'thread')}, the least of rounds in which all models took "
        "turns; in brackets the speed-up, and how far the median round lay above the least. "
        f"The machine was {'quiet' if quiet else 'busy'} meanwhile."
    )


def _timing(timings: Sequence[Timing], dense: Timing) -> str:
    """The timing that was taken as the dense model's was."""
    timing = next((timing for timing in timings if (timing.runtime, timing.batch) == (dense.runtime, dense.batch)), None)
    if timing is None:
        return text.NO_VALUE
    return f"{text.milliseconds(timing.ms)} ({text.ratio(dense.ms / timing.ms)}, +{timing.spread:.0%})"


def effort(record: StudyRecord) -> str:
    """The work that the study took: `45 trials, 8 of them finalists, in 11 min 49 s`."""
    finalists = len(figures.finalists(record))
    parts = [text.with_noun(len(figures.trained(record.trials)), "trial")]
    parts += [f"{finalists} of them finalists"] if finalists else []
    return ", ".join(parts) + f", in {text.duration(sum(record.seconds.values()))}"


def unfinished(record: StudyRecord) -> list[tuple[str, list[TrialRecord]]]:
    """The trials that did not finish, grouped by outcome, with the sentence of the outcome."""
    groups = [(outcome, [t for t in record.trials if t.outcome is outcome]) for outcome in Outcome]
    return [(outcome.value, trials) for outcome, trials in groups if outcome is not Outcome.DONE and trials]


def settings(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The resolved settings as pairs (`section.key`, value as JSON)."""
    return list(_flat(spec, ""))


def _flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


def _scores(record: StudyRecord, trial: TrialRecord) -> str:
    dense, name = record.facts.dense, record.facts.score_name
    validation = f"{text.score(trial.score_validation, name)} {name} on validation"
    if trial.finalist is None:
        return f"{validation} (dense {text.score(dense.score_validation, name)})"
    test, measured = text.score(trial.finalist.score_test, name), trial.finalist.difference_test
    interval = f"; difference {_difference(trial.finalist.score_test, dense.score_test, name, measured)}" if measured else ""
    return (
        f"{validation} (dense {text.score(dense.score_validation, name)}) "
        f"and {test} on test (dense {text.score(dense.score_test, name)}{interval})"
    )


def export_command(record: StudyRecord, trial: TrialRecord, folder: Path) -> str:
    """The command that exports a finalist as ONNX, or the call that loads it in Python if its dense model came from there.

    Empty for other trials, whose weights are not kept. `folder` is the study's folder as the user named it.
    """
    if trial.finalist is None:
        return ""
    if record.facts.spec.get("task", {}).get("model") == FROM_PYTHON:
        return f'ranksearch.load_model(model, "{(folder / "models" / str(trial.number)).as_posix()}")'
    return f"ranksearch export {shlex.quote(str(folder))} --trial {trial.number} --format onnx"


def _line(record: StudyRecord, trial: TrialRecord, *, knee: bool, near: bool) -> FrontLine:
    dense, name, final = record.facts.dense, record.facts.score_name, trial.finalist
    on_validation, on_test = (final.difference_validation, final.difference_test) if final else (None, None)
    return FrontLine(
        trial=trial.number,
        sizes=_sizes(record, trial),
        ratio=text.ratio(trial.ratio),
        costs=_costs(record, trial),
        validation=text.score(trial.score_validation, name),
        validation_difference=_difference(trial.score_validation, dense.score_validation, name, on_validation),
        test=text.score(final.score_test if final else None, name),
        test_difference=_difference(final.score_test if final else None, dense.score_test, name, on_test),
        epochs=f"{figures.epochs_of(trial):g}",
        plan=trial.plan,
        knee=knee,
        near=near,
    )


def _control_line(record: StudyRecord, control: Control) -> ControlLine:
    dense, name = record.facts.dense, record.facts.score_name
    return ControlLine(
        number=control.number,
        ratio=text.ratio(control.ratio),
        costs=_costs(record, control),
        validation=text.score(control.score_validation, name),
        validation_difference=_difference(control.score_validation, dense.score_validation, name),
        test=text.score(control.score_test, name),
        test_difference=_difference(control.score_test, dense.score_test, name),
        beaten_by=_winner(record, control),
    )


def _winner(record: StudyRecord, control: Control) -> str:
    if not record.facts.objectives.measured(control):
        return text.NO_VALUE
    if control not in figures.compared_controls(record):
        return "outside the limits"
    winner = figures.beaten_by(record, control)
    return "no model" if winner is None else f"trial {winner.number}"


def _sizes(record: StudyRecord, costed: Costed) -> list[str]:
    objectives = record.facts.objectives
    ratios = zip(objectives.minimize, objectives.ratios(costed), strict=True)
    return [text.ratio(ratio) + COSTS[cost].suffix for cost, ratio in ratios]


def _costs(record: StudyRecord, costed: Costed) -> list[tuple[str, str]]:
    dense, cells = record.facts.dense, []
    for cost in shown_costs(record):
        value = costed.costs.get(cost.name)
        has_ratio = value and cost is not PARAMS
        cells.append((cost.text(value), text.ratio(dense.costs[cost.name] / value) if has_ratio and value else ""))
    return cells


def _smaller(record: StudyRecord, trial: TrialRecord) -> str:
    """How much smaller a model is in each cost that the study minimises, and how much faster if that was measured."""
    dense = record.facts.dense
    costs = [COSTS[cost] for cost in record.facts.objectives.minimize]
    costs += [LATENCY] if LATENCY not in costs and all(LATENCY.name in net.costs for net in (trial, dense)) else []
    *others, last = [_smaller_by(record, trial, cost) for cost in costs]
    return f"{', '.join(others)} and {last}" if others else last


def _smaller_by(record: StudyRecord, trial: TrialRecord, cost: Cost) -> str:
    """`26.3x smaller (47,554 parameters instead of 1,250,282)`, without the cost's name if the words or the unit say it."""
    noun = "" if cost.unit or cost.title in cost.fewer else f" {cost.title}"
    value, dense = trial.costs[cost.name], record.facts.dense.costs[cost.name]
    return f"{text.ratio(dense / value)} {cost.fewer} ({cost.text(value)}{noun} instead of {cost.text(dense)})"


def _difference(score: float | None, dense: float, name: str, measured: Difference | None = None) -> str:
    """The difference from the dense model's score, and its interval if that was measured: `-0.8 [-1.9, +0.3]`."""
    if score is None:
        return ""
    interval = f" {text.interval(measured.low, measured.high, name)}" if measured else ""
    return text.difference(score - dense, name) + interval
