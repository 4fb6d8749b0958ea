"""`report.md`: the front beside the dense model, and the settings and command to reproduce it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from ranksearch.report import figures, summary, text
from ranksearch.results.costs import PARAMS
from ranksearch.results.record import StudyRecord
from ranksearch.results.scores import is_percent


def markdown(record: StudyRecord) -> str:
    """The report as GitHub-flavoured Markdown."""
    facts = record.facts
    parts = [
        f"# {_escape(facts.name)}: {_escape(facts.score_name)} against {summary.ratio_names(record)}",
        _escape(summary.headline(record)),
        *map(_escape, filter(None, [summary.against_controls(record)])),
        *map(_escape, record.notes),
        _escape(f"{facts.data.rstrip('.')}. {summary.effort(record)}; seed {facts.seed}."),
        "## Front",
        _table(_front_head(record), map(_front_cells, [summary.dense_line(record), *summary.front_lines(record)])),
        _front_note(record),
        *_controls(record),
        *_latency(record),
        *_account(record),
        "## Settings",
        _table(("setting", "value"), summary.settings(facts.spec)),
        "## Versions, machine, time",
        _table(("item", "value"), _circumstances(record)),
        "## Reproduce",
        # An indented block: text in the command could end a fenced block.
        "\n".join(f"    {line}" for line in facts.command.splitlines()),
    ]
    return "\n\n".join(parts) + "\n"


def _front_head(record: StudyRecord) -> list[str]:
    return ["trial", *_figures_head(record), "epochs", "plan"]


def _figures_head(record: StudyRecord) -> list[str]:
    costs = [
        word for cost in summary.shown_costs(record) for word in (cost.title, "" if cost is PARAMS else cost.ratio) if word
    ]
    return [PARAMS.ratio, *costs, "validation", "test"]


def _front_cells(line: summary.FrontLine) -> list[str]:
    mark = " (knee)" if line.knee else ""
    return [f"{line.trial}{mark}", *_figures(line), line.epochs, str(line.plan)]


def _figures(line: summary.FrontLine | summary.ControlLine) -> list[str]:
    """Ratio, costs and scores."""
    validation, test = (
        f"{score} ({difference})" if difference else score
        for score, difference in ((line.validation, line.validation_difference), (line.test, line.test_difference))
    )
    costs = [word for number, ratio in line.costs for word in (number, ratio) if word]
    return [line.ratio, *costs, validation, test]


def _front_note(record: StudyRecord) -> str:
    unit = "points" if is_percent(record.facts.score_name) else "the score"
    note = f"In brackets: difference from the dense net in {unit}, with its 95 % interval (paired bootstrap over the inputs)."
    gain = figures.hypervolume_gain(record)
    if gain:
        note += f" Hypervolume of the predicted front's trials alone: {gain[0]:.4f}; of all trials: {gain[1]:.4f}."
    return note


def _controls(record: StudyRecord) -> list[str]:
    if not record.controls:
        return []
    rows = ([str(line.number), *_figures(line), line.beaten_by] for line in summary.control_lines(record))
    head = ["control", *_figures_head(record), "beaten by"]
    return ["## Controls", _escape(summary.controls_note(record)), _table(head, rows)]


def _latency(record: StudyRecord) -> list[str]:
    if not record.facts.dense.timings:
        return []
    rows = ([name, *cells] for name, cells in summary.timing_rows(record))
    return ["## Latency", _escape(summary.timing_note(record)), _table(["trial", *summary.timing_head(record)], rows)]


def _account(record: StudyRecord) -> list[str]:
    lines = summary.account_lines(record)
    if not lines:
        return []
    rows = [dataclasses.astuple(line) for line in lines]
    return ["## Dense model", _table(["part of the model", "modules", "parameters", "share", "MACs", "share"], rows)]


def _circumstances(record: StudyRecord) -> list[tuple[str, str]]:
    facts = record.facts
    stages = [(f"time: {stage}", text.duration(seconds)) for stage, seconds in record.seconds.items()]
    total = ("time: total", text.duration(sum(record.seconds.values())))
    return [*facts.versions.items(), ("machine", facts.machine), ("seed", str(facts.seed)), *stages, total]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(words: str) -> str:
    """Escape Markdown and HTML, and replace line breaks by spaces."""
    return re.sub(r"([\\`*\[\]|<>&#~]|__+)", r"\\\1", " ".join(words.split()))
