"""The record of a study, and how to choose a model from it. The report reads nothing else; torch is not needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ranksearch.errors import StudyError
from ranksearch.plan import Factorization, Plan
from ranksearch.results import pareto
from ranksearch.results.account import Part, listed
from ranksearch.results.costs import Counts
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.objectives import Objectives

_UNTRAINED = (Outcome.NOT_SMALLER, Outcome.OVER_BUDGET, Outcome.WORKER_LOST)

MAX_UNTRAINED = 100
"""The search ends after this many proposals in a row without training: the sampler finds nothing new within the limits."""
MAX_PREDICTION_ERROR = 0.2
"""Relative error of a predicted latency above which the report says that the prediction was wrong."""
MAX_TRIES = 3
"""How often a plan is tried while its workers are lost; after that the plan itself must be the cause."""


@dataclass(frozen=True)
class Timing:
    """How long a model took for one batch in one runtime; `spread` is how far the median of the rounds lay above the least."""

    runtime: str
    threads: int
    batch: int
    ms: float
    spread: float
    quiet: bool
    """Whether the machine was quiet enough for the order of models timed together to be trusted."""


class Timed:
    """A property for records with latencies."""

    timings: tuple[Timing, ...]

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds of one pass, as the study measures them."""
        return self.timings[0].ms if self.timings else None


@dataclass(frozen=True, kw_only=True)
class Finalist(Timed):
    """Result of fine-tuning a trial again, from its start and for longer; scored once on the test split."""

    score_validation: float
    score_test: float
    curve: tuple[CurvePoint, ...]
    seconds: float
    timings: tuple[Timing, ...] = ()
    """Its latencies; the first is in the runtime and at the size of batch that the study names."""
    predicted_ms: float | None = None
    """What the first was predicted to be, in a study that minimises or limits the latency."""
    layers_ms: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The predicted latency of each decomposed layer, in such a study."""

    @property
    def mispredicted(self) -> bool:
        """Whether its latency was predicted wrong by more than `MAX_PREDICTION_ERROR`."""
        if self.predicted_ms is None or self.latency_ms is None:
            return False
        return abs(self.predicted_ms / self.latency_ms - 1) > MAX_PREDICTION_ERROR


@dataclass(frozen=True, kw_only=True)
class TrialRecord(Counts):
    """One trial. `score` is the validation score at the end of its learning curve; None if it did not finish."""

    number: int
    index: int
    origin: str
    plan: Plan
    outcome: Outcome
    costs: Mapping[str, float] = field(hash=False)
    """Its known costs, by name."""
    ratio: float
    """Compression ratio: parameters of the dense model / parameters of this one."""
    score: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    same_as: int | None = None
    """Number of the earlier trial of the same plan, whose result this trial took over instead of training."""
    finalist: Finalist | None = None
    failed: Outcome | None = None
    """Outcome of its longer fine-tuning, if that failed."""

    @property
    def trained(self) -> bool:
        """Whether it was trained itself, and its worker not lost; `search.trials` counts these trials."""
        return self.same_as is None and self.outcome not in _UNTRAINED

    @property
    def scored(self) -> bool:
        """Whether it has a score, its own or that of the trial of the same plan."""
        return self.outcome is Outcome.DONE and self.score is not None

    @property
    def score_validation(self) -> float | None:
        """The validation score after the longest fine-tuning: the finalist's, else the trial's."""
        return self.finalist.score_validation if self.finalist else self.score

    @property
    def ending(self) -> str:
        """The outcome in a word or two: `done`, `diverged`."""
        return self.outcome.value.partition(":")[0]


@dataclass(frozen=True)
class Probe:
    """The loss on a sample of the validation split, with one layer stored as `value`, without training."""

    layer: str
    value: Factorization
    loss: float
    width: float = 1.0
    """The net whose layer it is."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts(Counts):
    """A layer that can be decomposed. `weight` is the shape of its kernel, (out, in, *size)."""

    name: str
    kind: str
    weight: tuple[int, ...]
    costs: Mapping[str, float] = field(hash=False)
    vbmf: tuple[int | None, int | None]
    """VBMF ranks of the input and the output unfolding; None if VBMF finds no low-rank signal."""


@dataclass(frozen=True, kw_only=True)
class DenseFacts(Counts, Timed):
    """The dense model: costs by name, scores, and latencies."""

    costs: Mapping[str, float] = field(hash=False)
    score_validation: float
    score_test: float
    timings: tuple[Timing, ...] = ()
    """As those of a finalist, taken in turn with them."""


@dataclass(frozen=True, kw_only=True)
class Control(Counts, Timed):
    """A narrower copy of the dense net, trained from random weights; scored once on the test split."""

    number: int
    share: float
    """The share of the channels that each layer keeps."""
    costs: Mapping[str, float] = field(hash=False)
    ratio: float
    """Compression ratio, as of a trial."""
    score_validation: float
    score_test: float
    curve: tuple[CurvePoint, ...]
    seconds: float
    timings: tuple[Timing, ...] = ()
    """As those of a finalist, taken in turn with them."""


@dataclass(frozen=True, kw_only=True)
class NarrowFacts(Counts):
    """A narrower net that plans start from: its share of the given net's multiply-accumulates, costs by name, and score."""

    width: float
    costs: Mapping[str, float] = field(hash=False)
    score_validation: float


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """Facts about the whole study, stored as an attribute of the Optuna study."""

    name: str
    seed: int
    spec: Mapping[str, Any]
    score_name: str
    dense: DenseFacts
    layers: tuple[LayerFacts, ...]
    skipped: Mapping[str, str]
    versions: Mapping[str, str]
    machine: str
    command: str
    data: str
    """One sentence: the kind of data, and the size of each split."""
    account: tuple[Part, ...] = ()
    """All parts of the dense model: their parameters and MACs add up to its own. Empty in older records."""
    permanent: Mapping[str, str] = field(default_factory=dict)
    """By layer, what its factorization keeps that the layer itself computes in each pass."""
    narrow: tuple[NarrowFacts, ...] = ()
    """The narrower nets that plans start from, the widest first."""
    since: int = 0
    """Number of the first trial that was proposed under the current limits; earlier runs may have had other limits."""

    @property
    def limits(self) -> Limits:
        """The limits of the last run."""
        return Limits.of(self.spec["search"])

    @property
    def objectives(self) -> Objectives:
        """The objectives of the study."""
        return Objectives.of(self.spec["search"], self.dense)


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A whole study: its facts, its trials by number, the seconds each stage has taken so far, and its controls."""

    facts: StudyFacts
    trials: tuple[TrialRecord, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    missing_controls: tuple[str, ...] = ()
    """A sentence about each control that failed, or about the reason why there are none."""

    @cached_property
    def front(self) -> list[TrialRecord]:
        """The non-dominated trials within the study's limits, the largest first; see `front_of`."""
        return front_of(self.trials, self.facts.objectives, self.facts.limits)

    @cached_property
    def unconstrained_front(self) -> list[TrialRecord]:
        """The front without the limits."""
        return front_of(self.trials, self.facts.objectives)

    @cached_property
    def shown(self) -> list[TrialRecord]:
        """The front to show: the front, or the unconstrained one if no model keeps the limits."""
        return self.front or self.unconstrained_front

    @property
    def notes(self) -> list[str]:
        """Sentences about limits that no model keeps, proposals that were not trained, and failures; often none."""
        trials, planned = self.trials, self.facts.spec["search"]["trials"]
        over = sum(trial.outcome is Outcome.OVER_BUDGET for trial in trials)
        repeated = sum(trial.same_as is not None for trial in trials)
        trained = sum(trial.trained for trial in trials)
        notes = []
        if self.facts.limits and not self.front and self.unconstrained_front:
            notes.append(
                f"No model keeps the limits ({self.facts.limits}). The front is shown without them, and the finalists are the "
                "trials nearest to them."
            )
        if trained < planned and untrained_in_a_row(trials, self.facts.since) >= MAX_UNTRAINED:
            notes.append(
                f"The search ended after {trained} of {planned} trials: {MAX_UNTRAINED} proposals in a row were over the "
                "limits or repeated an earlier plan; widen the limits or the space."
            )
        if trials and not any(trial.scored for trial in trials):
            ends = Counter(trial.outcome for trial in trials)
            reasons = " ".join(f"{count:,} {outcome.value}." for outcome, count in ends.items())
            notes.append(f"No trial of {len(trials):,} has a score. {reasons}")
        for trial in trials:
            if trial.failed:
                notes.append(f"Trial {trial.number} failed as a finalist, {trial.failed.of_finalist}.")
        unused = sum(part.unused for part in self.facts.account)
        if unused:
            names = [name for part in self.facts.account if part.unused for name in part.modules]
            share = unused / self.facts.dense.params
            notes.append(f"No pass uses {share:.1%} of the parameters ({listed(names)}); remove them from the model.")
        for words in dict.fromkeys(self.facts.permanent.values()):
            names = [name for name, kept in self.facts.permanent.items() if kept == words]
            notes.append(f"Made permanent where decomposed: {words} ({listed(names)}).")
        notes += self.missing_controls
        notes += self._latency_notes()
        if over:
            notes.append(f"Proposals over the limits, not trained: {over:,}.")
        if repeated:
            notes.append(f"Proposals that repeated an earlier plan, not trained again: {repeated:,}.")
        return notes

    def _latency_notes(self) -> list[str]:
        finalists = [(trial.number, trial.finalist) for trial in self.trials if trial.finalist]
        notes = []
        if not all(timing.quiet for _, finalist in finalists for timing in finalist.timings):
            notes.append(
                "The machine was busy while the finalists were timed, so the order of latencies that are near each other "
                "may be wrong."
            )
        wrong = [str(number) for number, finalist in finalists if finalist.mispredicted]
        if wrong:
            notes.append(
                f"The latency of {_named('trial', wrong)} was predicted wrong by more than {MAX_PREDICTION_ERROR:.0%}; the "
                "front is of measured latencies."
            )
        return notes


def _named(noun: str, names: Sequence[str]) -> str:
    return f"{noun} {names[0]}" if len(names) == 1 else f"{noun}s {', '.join(names[:-1])} and {names[-1]}"


def untrained_in_a_row(
    trials: Iterable[TrialRecord], since: int, *, waiting: Iterable[int] = (), running: Iterable[int] = ()
) -> int:
    """Number of proposals without training since the last one that was trained or is being trained.

    Args:
        trials: the finished trials.
        since: the number of the first trial that counts; earlier ones were proposed under other limits.
        waiting: numbers of the trials that wait for a running trial of the same plan.
        running: numbers of the trials that are being trained.
    """
    trials = list(trials)
    last = max([since - 1, *running, *(trial.number for trial in trials if trial.trained)])
    untrained = [*waiting, *(trial.number for trial in trials if not trial.trained)]
    return sum(number > last for number in untrained)


def with_measured(facts: StudyFacts, trials: Sequence[TrialRecord]) -> tuple[StudyFacts, tuple[TrialRecord, ...]]:
    """The record with measured latencies in place of predicted ones, where the dense model and the finalists were timed."""
    dense = facts.dense
    if dense.latency_ms is None:
        return facts, tuple(trials)
    facts = replace(facts, dense=replace(dense, costs={**dense.costs, "latency": dense.latency_ms}))
    return facts, tuple(_with_measured(trial) for trial in trials)


def control_with_measured(control: Control) -> Control:
    """A control with its measured latency among its costs, if it was timed."""
    if control.latency_ms is None:
        return control
    return replace(control, costs={**control.costs, "latency": control.latency_ms})


def _with_measured(trial: TrialRecord) -> TrialRecord:
    if trial.finalist is None or trial.finalist.latency_ms is None:
        return trial
    return replace(trial, costs={**trial.costs, "latency": trial.finalist.latency_ms})


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
