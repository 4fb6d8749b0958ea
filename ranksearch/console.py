"""Progress of a study: a live display with the front on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

import abc
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ranksearch.results.account import Part, listed
from ranksearch.results.costs import COSTS, Cost, Costed, costs_of
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.record import Control, DenseFacts, LayerFacts, StudyFacts, StudyRecord
from ranksearch.results.scores import is_percent
from ranksearch.results.trials import TrialRecord

QUIET_SECONDS = 60.0
"""After this many seconds without output a log gets a line about the progress of the stage."""


class View(abc.ABC):
    """Receives the progress of a study. A context manager: a live view takes the screen on entry and releases it on exit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    @abc.abstractmethod
    def stage(self, title: str, total: int, done: int = 0) -> None:
        """A stage of `total` steps begins; an earlier run has done `done` of them."""

    @abc.abstractmethod
    def step(self, text: str = "") -> None:
        """One step of the stage is done."""

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Something happened that does not stop the study: a worker is lost, the database does not answer."""

    @abc.abstractmethod
    def facts(self, facts: StudyFacts) -> None:
        """The dense model and its layers have been measured."""

    @abc.abstractmethod
    def curve_point(self, name: str, curve_point: CurvePoint) -> None:
        """A job in training, such as `trial 5` or `control 2`, reached a point of its learning curve."""

    @abc.abstractmethod
    def trial(self, record: TrialRecord, trials: Sequence[TrialRecord]) -> None:
        """A trial, trained or not, or a finalist has ended; `trials` are all finished trials so far."""


class Silent(View):
    """Shows nothing; the default for calls from Python."""

    def stage(self, title: str, total: int, done: int = 0) -> None: ...

    def step(self, text: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def facts(self, facts: StudyFacts) -> None: ...

    def curve_point(self, name: str, curve_point: CurvePoint) -> None: ...

    def trial(self, record: TrialRecord, trials: Sequence[TrialRecord]) -> None: ...


class Lines(View):
    """For logs and pipes: one line per stage and per finished trial, and one per minute when neither comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._facts: StudyFacts | None = None
        self._title, self._done, self._total, self._last = "", 0, 0, 0.0

    def stage(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._done, self._total = title, done, total
        begun = f", {done} of them done by an earlier run" if done else ""
        self._print(f"{title}: {total} {'step' if total == 1 else 'steps'}{begun}")

    def step(self, text: str = "") -> None:
        self._done += 1
        self._print_seldom(f"{self._title}: {self._done} of {self._total}")

    def note(self, text: str) -> None:
        self._print(text)

    def facts(self, facts: StudyFacts) -> None:
        self._facts = facts
        self._print(dense_line(facts.dense, facts.score_name))

    def curve_point(self, name: str, curve_point: CurvePoint) -> None:
        self._print_seldom(curve_point_line(name, curve_point, self._facts))

    def trial(self, record: TrialRecord, trials: Sequence[TrialRecord]) -> None:
        # Under tight limits most proposals are over budget; the notes at the end give their number.
        assert self._facts is not None, "trials come after the facts"
        if record.outcome is not Outcome.OVER_BUDGET:
            self._print(trial_line(record, self._facts))

    def _print_seldom(self, text: str) -> None:
        if time.monotonic() - self._last >= QUIET_SECONDS:
            self._print(text)

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.out(text, highlight=False)


class Terminal(View):
    """For terminals: the progress and time left of every stage, and the front so far below."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )
        self._front: Table | str = ""
        self._current: TaskID | None = None
        self._facts: StudyFacts | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._front = ""  # the caller prints the final front
        self._live.stop()

    def stage(self, title: str, total: int, done: int = 0) -> None:
        self._current = self._progress.add_task(title, total=total, completed=done, before=done, note="")

    def step(self, text: str = "") -> None:
        self._note(text, advance=1)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def facts(self, facts: StudyFacts) -> None:
        self._facts = facts

    def curve_point(self, name: str, curve_point: CurvePoint) -> None:
        self._note(curve_point_line(name, curve_point, self._facts), advance=0)

    def trial(self, record: TrialRecord, trials: Sequence[TrialRecord]) -> None:
        assert self._facts is not None, "trials come after the facts"
        self._note(f"trial {record.number}: {short_outcome(record, self._facts)}", advance=int(record.trained))
        rows = max(4, self._console.height - 12)
        front = StudyRecord(facts=self._facts, trials=tuple(trials)).shown
        self._front = front_table(front, self._facts, max_rows=rows, title="front so far")

    def _note(self, text: str, *, advance: int) -> None:
        assert self._current is not None, "a step belongs to a stage"
        self._progress.update(self._current, advance=advance, note=text)

    def _render(self) -> Group:
        return Group(self._progress, self._front)


class _TimeLeft(TimeRemainingColumn):
    """Time left, from the mean time per step of the stage: rich forgets its own estimate when a step takes minutes."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"{clock(task.finished_time or 0)} taken", style="progress.elapsed")
        done = task.completed - task.fields["before"]
        if task.elapsed is None or done <= 0 or task.total is None:
            return Text("-:-- left", style="progress.remaining")
        left = task.elapsed / done * (task.total - task.completed)
        return Text(f"{clock(left)} left", style="progress.remaining")


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def score_text(score: float | None, score_name: str) -> str:
    """A score as people read it: accuracy and agreement as per cent, any other with four decimals."""
    if score is None:
        return "-"
    return f"{score * 100:.1f} %" if is_percent(score_name) else f"{score:.4f}"


def short_outcome(record: TrialRecord, facts: StudyFacts) -> str:
    """Ratios and score of a trial that is done, such as `55.3x, 98.1 %` or `12.0x MACs, 98.1 %`; else its outcome."""
    ratios = zip(facts.objectives.minimize, facts.objectives.ratios(record), strict=True)
    sizes = (f"{ratio:.1f}x{COSTS[cost].suffix}" for cost, ratio in ratios)
    result = ", ".join([*sizes, score_text(record.score_validation, facts.score_name)])
    if record.outcome is Outcome.DONE:
        return result if record.same_as is None else f"{result}, same plan as trial {record.same_as}"
    return record.ending


def trial_line(record: TrialRecord, facts: StudyFacts) -> str:
    """One line about one finished trial or finalist."""
    kind = "finalist" if record.finalist else "trial"
    seconds = record.finalist.seconds if record.finalist else record.seconds
    outcome = short_outcome(record, facts)
    test = f" (test {score_text(record.finalist.score_test, facts.score_name)})" if record.finalist else ""
    return f"{kind} {record.number} [{record.origin}] {outcome}{test}, {seconds:.1f} s: {record.plan}"


def control_line(control: Control, facts: StudyFacts) -> str:
    """One line about one finished control."""
    ratios = (f"{facts.objectives.only(cost).ratio(control):.1f}x{COSTS[cost].suffix}" for cost in ("params", "macs"))
    validation, test = (score_text(score, facts.score_name) for score in (control.score_validation, control.score_test))
    return f"control {control.number}: {', '.join(ratios)}, {validation} (test {test}), {control.seconds:.1f} s"


def curve_point_line(name: str, curve_point: CurvePoint, facts: StudyFacts | None) -> str:
    """One line about a trial, finalist or control in training."""
    assert facts is not None, "trials come after the facts"
    return f"{name}: epoch {curve_point.epochs:g}, {score_text(curve_point.score, facts.score_name)}"


def dense_line(dense: DenseFacts, score_name: str) -> str:
    """One line about the dense model."""
    sizes = ", ".join(f"{cost.text(dense.costs[cost.name])} {cost.title}" for cost in costs_of(dense))
    return (
        f"dense: {sizes}, {score_name} "
        f"{score_text(dense.score_validation, score_name)} on validation, {score_text(dense.score_test, score_name)} on test"
    )


def front_table(front: Sequence[TrialRecord], facts: StudyFacts, *, max_rows: int | None = None, title: str = "") -> Table:
    """The dense model and the front as a table, the largest model first; only the first `max_rows` models if it is given."""
    table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    dense, costs = facts.dense, costs_of(facts.dense)
    ratios = [COSTS[cost].short_ratio for cost in facts.objectives.minimize]
    for heading in ("trial", *ratios, *(cost.title for cost in costs), "validation", "test"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=min(10, len(heading) + 6))
    table.add_column("plan", overflow="ellipsis", no_wrap=bool(max_rows))  # a live table has little room: one line per model
    scores = (score_text(score, facts.score_name) for score in (dense.score_validation, dense.score_test))
    table.add_row("dense", *["1.0x"] * len(ratios), *_sizes(dense, costs), *scores, "", style="dim")
    for record in front[: max_rows or len(front)]:
        test = record.finalist.score_test if record.finalist else None
        table.add_row(
            str(record.number),
            *(f"{ratio:.1f}x" for ratio in facts.objectives.ratios(record)),
            *_sizes(record, costs),
            score_text(record.score_validation, facts.score_name),
            score_text(test, facts.score_name),
            Text(str(record.plan)),  # a str would be parsed as markup
        )
    return table


def _sizes(costed: Costed, costs: Sequence[Cost]) -> list[str]:
    return [cost.text(costed.costs.get(cost.name)) for cost in costs]


def next_steps(folder: Path, record: StudyRecord, storage: str) -> str:
    """The paths of report and models, and the next command; `storage` is its option --storage, or empty."""
    report = f"report  {folder / 'report.html'}"
    if not any(trial.finalist for trial in record.trials):
        return report
    export = f"ranksearch export {shlex.quote(str(folder))} --knee --format onnx{storage}"
    return f"{report}\nmodels  {folder / 'models'}\nexport  {export}"


@dataclass(frozen=True, kw_only=True)
class Look:
    """The data that `ranksearch layers` shows."""

    layers: tuple[LayerFacts, ...]
    account: tuple[Part, ...]
    permanent: Mapping[str, str]
    params: int
    macs: int
    costs: Mapping[str, tuple[tuple[str, int], ...]]
    """By layer, for each method: the text of its factorization, such as "CP 16", and its number of parameters.

    The ranks are those of VBMF, or a quarter of the largest ranks if VBMF finds none.
    """
    trained: bool
    """Whether the weights are trained, so that the VBMF ranks mean something."""


def layers_table(look: Look) -> Table:
    """One row per layer: kernel shape, parameters, MACs, VBMF ranks, and the parameters of each method at those ranks."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer")
    table.add_column("kernel (out, in, *size)")
    for heading in ("parameters", "share", "MACs", "share", "VBMF in", "out"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("parameters at the VBMF ranks, or a quarter of the largest")
    for layer in look.layers:
        costs = [f"{text}: {params:,} ({layer.params / params:.1f}x)" for text, params in look.costs.get(layer.name, ())]
        table.add_row(
            Text(layer.name),
            layer.shape.replace(" x ", "x") + (", flattened" if layer.kind == "Linear" and len(layer.weight) > 2 else ""),
            f"{layer.params:,}",
            f"{layer.params / look.params:.1%}",
            f"{layer.macs:,}",
            f"{layer.macs / look.macs:.1%}",
            *(str(rank or "-") for rank in layer.vbmf),
            "\n".join(costs),
        )
    return table


def layers_summary(look: Look) -> str:
    """The totals and where they are, what becomes permanent, and a note if the weights are untrained."""
    lines = [f"{look.params:,} parameters, {look.macs:,} MACs for one input"]
    lines += [_part_line(part, look) for part in look.account]
    if unused := sum(part.unused for part in look.account):
        names = [name for part in look.account if part.unused for name in part.modules]
        lines.append(f"no pass uses {unused:,} parameters, {unused / look.params:.1%} of all: {listed(names)}")
    lines += [f"made permanent where decomposed, {name}: {words}" for name, words in look.permanent.items()]
    if not look.trained:
        lines.append("The dense net is not trained yet: these VBMF ranks are of its initial weights.")
    return "\n".join(lines)


def _part_line(part: Part, look: Look) -> str:
    """One line: `skipped conv: it is depthwise (0.3% of the parameters, 1.2% of the MACs)`."""
    shares = f"{_share(part.params, look.params)} of the parameters, {_share(part.macs, look.macs)} of the MACs"
    named = part.title.startswith(f"skipped {part.modules[0]}: ")
    return f"{part.title} ({shares})" if named else f"{part.title}: {shares} ({part.names})"


def _share(count: int, whole: int) -> str:
    return "<0.1%" if 0 < count < 0.0005 * whole else f"{count / whole:.1%}"
