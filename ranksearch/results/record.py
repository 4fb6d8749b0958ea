"""The record of a study. The report reads nothing else; torch is not needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ranksearch.plan import Factorization
from ranksearch.results.account import Part, listed
from ranksearch.results.choosing import front_of
from ranksearch.results.costs import Counts
from ranksearch.results.limits import Limits
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import (
    MAX_PREDICTION_ERROR,
    MAX_UNTRAINED,
    Timed,
    Timing,
    TrialRecord,
    trial_with_measured,
    untrained_in_a_row,
)

MAX_SHARE_WORSE = 0.3
"""The share of models that may end their fine-tuning below their score before it; more, and a note says so."""
DEFAULT_STANDARD_ERROR = 0.01
"""The standard error of a score where a bootstrap cannot tell it: the score gave no number for most resamples, or the dense net
erred on no input. It is that of an accuracy of 96 % on 360 images."""


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
    """A layer that can be decomposed. `weight` is the shape of the kernel, (out, in, *size), of each of its groups."""

    name: str
    kind: str
    weight: tuple[int, ...]
    groups: int = 1
    costs: Mapping[str, float] = field(hash=False)
    vbmf: tuple[int | None, int | None]
    """VBMF ranks of the input and the output unfolding; None if VBMF finds no low-rank signal."""

    @property
    def shape(self) -> str:
        """The shape of its kernel as text: `6 x 4 x 3 x 3`, `2 of 3 x 2 x 3 x 3` if it has two groups."""
        kernel = " x ".join(map(str, self.weight))
        return f"{self.groups} of {kernel}" if self.groups > 1 else kernel


@dataclass(frozen=True, kw_only=True)
class DenseFacts(Counts, Timed):
    """The dense model: costs by name, scores, and latencies."""

    costs: Mapping[str, float] = field(hash=False)
    score_validation: float
    score_test: float
    standard_error: float = DEFAULT_STANDARD_ERROR
    """Of `score_validation`, by a bootstrap over the inputs."""
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
        notes += self._training_notes()
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

    def _training_notes(self) -> list[str]:
        """Whether fine-tuning made many models worse than they were before it, which a high learning rate does."""
        curves = {
            "finetune": [trial.curve for trial in self.trials if trial.scored],
            "finalists": [trial.finalist.curve for trial in self.trials if trial.finalist],
        }
        notes = []
        for section, of_section in curves.items():
            trained = [curve for curve in of_section if len(curve) > 1 and curve[0].epochs == 0]
            noise = self.facts.dense.standard_error
            worse = sum(curve[-1].score < curve[0].score - noise for curve in trained)
            if worse > MAX_SHARE_WORSE * len(trained):
                whose = "trials" if section == "finetune" else "finalists"
                notes.append(
                    f"{worse} of {len(trained)} {whose} score lower after their fine-tuning than before it; lower "
                    f"{section}.learning_rate."
                )
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


def control_with_measured(control: Control) -> Control:
    """A control with its measured latency among its costs, if it was timed."""
    if control.latency_ms is None:
        return control
    return replace(control, costs={**control.costs, "latency": control.latency_ms})


def with_measured(facts: StudyFacts, trials: Sequence[TrialRecord]) -> tuple[StudyFacts, tuple[TrialRecord, ...]]:
    """The record with measured latencies in place of predicted ones, where the dense model and the finalists were timed."""
    dense = facts.dense
    if dense.latency_ms is None:
        return facts, tuple(trials)
    facts = replace(facts, dense=replace(dense, costs={**dense.costs, "latency": dense.latency_ms}))
    return facts, tuple(trial_with_measured(trial) for trial in trials)
