"""What a study found, and choosing from it. The report reads nothing else, and neither needs torch."""

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
from ranksearch.results.costs import Counts
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.objectives import Objectives

_UNTRAINED = (Outcome.NOT_SMALLER, Outcome.OVER_BUDGET, Outcome.WORKER_LOST)

MAX_UNTRAINED = 100
"""A search ends once so many proposals in a row needed no training: the sampler finds nothing new within the limits."""
MAX_PREDICTION_ERROR = 0.2
"""Relative; a predicted latency that is further from the measured one is told to the user."""
MAX_TRIES = 3
"""A plan whose worker was lost so often is not tried again: by then the plan is the cause."""


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


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A trial that was fine-tuned for longer, from its start, and scored once on the test split."""

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
    def latency_ms(self) -> float | None:
        """Milliseconds of one pass, as the study measures them."""
        return self.timings[0].ms if self.timings else None

    @property
    def missed(self) -> bool:
        """Whether its latency was predicted wrong by more than `MAX_PREDICTION_ERROR`."""
        if self.predicted_ms is None or self.latency_ms is None:
            return False
        return abs(self.predicted_ms / self.latency_ms - 1) > MAX_PREDICTION_ERROR


@dataclass(frozen=True, kw_only=True)
class TrialRecord(Counts):
    """One trial. `score` is the validation score after its last rung, None where it did not get there."""

    number: int
    index: int
    origin: str
    plan: Plan
    outcome: Outcome
    costs: Mapping[str, float] = field(hash=False)
    """By the name of each cost that is known of it."""
    ratio: float
    """Of compression: parameters of the dense model over its own."""
    score: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    same_as: int | None = None
    """The number of the trial of the same plan that answered for this one, which was not trained again."""
    finalist: Finalist | None = None
    failed: Outcome | None = None
    """How its longer fine-tuning ended, where that gave no finalist."""

    @property
    def trained(self) -> bool:
        """Whether it was trained to an answer of its own: what `search.trials` counts."""
        return self.same_as is None and self.outcome not in _UNTRAINED

    @property
    def scored(self) -> bool:
        """Whether it came to a score, its own or that of the trial of the same plan."""
        return self.outcome is Outcome.DONE and self.score is not None

    @property
    def score_validation(self) -> float | None:
        """The validation score with the most fine-tuning behind it."""
        return self.finalist.score_validation if self.finalist else self.score

    @property
    def ending(self) -> str:
        """How the trial ended, in a word or two: `done`, `diverged`."""
        return self.outcome.value.partition(":")[0]


@dataclass(frozen=True)
class Probe:
    """The loss, on a sample of the validation split, with one layer alone stored as `value` and nothing trained."""

    layer: str
    value: Factorization
    loss: float


@dataclass(frozen=True, kw_only=True)
class LayerFacts(Counts):
    """One layer that can be decomposed, as the report shows it. `weight` is the kernel's shape (out, in, *kernel)."""

    name: str
    kind: str
    weight: tuple[int, ...]
    costs: Mapping[str, float] = field(hash=False)
    vbmf: tuple[int | None, int | None]
    """VBMF ranks of the input and the output unfolding; None where the estimate finds no low-rank signal."""


@dataclass(frozen=True, kw_only=True)
class DenseFacts(Counts):
    """The dense model: its costs by name, its scores, and milliseconds for one input."""

    costs: Mapping[str, float] = field(hash=False)
    score_validation: float
    score_test: float
    timings: tuple[Timing, ...] = ()
    """As those of a finalist, taken in turn with them."""

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds of one pass, as the study measures them."""
        return self.timings[0].ms if self.timings else None


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What holds for the study as a whole, kept as attributes of the Optuna study."""

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
    """One sentence: what the images are, and how many stand in each split."""
    since: int = 0
    """The number of the first trial within today's limits: earlier ones were proposed within others."""

    @property
    def limits(self) -> Limits:
        """What the models of the front must keep, as of the last run."""
        return Limits.of(self.spec["search"])

    @property
    def objectives(self) -> Objectives:
        """What the models of the study compete in."""
        return Objectives.of(self.spec["search"], self.dense)


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A whole study: its facts, its trials in the order they were asked for, and the seconds each stage took so far."""

    facts: StudyFacts
    trials: tuple[TrialRecord, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def front(self) -> list[TrialRecord]:
        """The non-dominated trials within the study's limits, the largest first; see `front_of`."""
        return front_of(self.trials, self.facts.objectives, self.facts.limits)

    @cached_property
    def unconstrained_front(self) -> list[TrialRecord]:
        """The front that there would be without the limits."""
        return front_of(self.trials, self.facts.objectives)

    @cached_property
    def shown(self) -> list[TrialRecord]:
        """What a reader is shown: the front, or the unconstrained one where no model keeps the limits."""
        return self.front or self.unconstrained_front

    @property
    def notes(self) -> list[str]:
        """Sentences on what became of the limits and of proposals that were not trained; most studies have none."""
        trials, planned = self.trials, self.facts.spec["search"]["trials"]
        over = sum(trial.outcome is Outcome.OVER_BUDGET for trial in trials)
        known = sum(trial.same_as is not None for trial in trials)
        trained = sum(trial.trained for trial in trials)
        found = []
        if self.facts.limits and not self.front and self.unconstrained_front:
            found.append(
                f"No model keeps the limits ({self.facts.limits}): shown is the front without them, and the nearest trials "
                "are the finalists."
            )
        if trained < planned and untrained_in_a_row(trials, self.facts.since) >= MAX_UNTRAINED:
            found.append(
                f"The search ended after {trained} of {planned} trials: {MAX_UNTRAINED} proposals in a row were over the "
                "limits or known already; widen the limits or the space."
            )
        if trials and not any(trial.scored for trial in trials):
            ends = Counter(trial.outcome for trial in trials)
            how = " ".join(f"{count:,} {outcome.value}." for outcome, count in ends.items())
            found.append(f"No trial of {len(trials):,} came to a score. {how}")
        for trial in trials:
            if trial.failed:
                found.append(f"Trial {trial.number} gave no model as a finalist, {trial.failed.of_finalist}.")
        finalists = [trial for trial in trials if trial.finalist]
        if any(not timing.quiet for trial in finalists if trial.finalist for timing in trial.finalist.timings):
            found.append(
                "The machine was busy while the finalists were timed: latencies that lie near each other may be in another "
                "order; the same command on a quiet machine, with --fresh, times them again."
            )
        missed = [str(trial.number) for trial in finalists if trial.finalist and trial.finalist.missed]
        if missed:
            found.append(
                f"The latency of {_are('trial', missed)} was predicted wrong by more than {MAX_PREDICTION_ERROR:.0%}; the "
                "front is of measured times."
            )
        if over:
            found.append(f"Proposals over the limits, which were not trained: {over:,}.")
        if known:
            found.append(f"Proposals of a plan that was known already, answered from the record: {known:,}.")
        return found


def _are(noun: str, names: Sequence[str]) -> str:
    return f"{noun} {names[0]}" if len(names) == 1 else f"{noun}s {', '.join(names[:-1])} and {names[-1]}"


def untrained_in_a_row(
    trials: Iterable[TrialRecord], since: int, *, waiting: Iterable[int] = (), running: Iterable[int] = ()
) -> int:
    """How many proposals since the last that was trained needed no training.

    Args:
        trials: those that have an answer.
        since: the number of the first that counts. What was proposed within other limits says nothing of these.
        waiting: numbers of those that wait for the answer to the same plan.
        running: numbers of those that are being trained.
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


def _with_measured(trial: TrialRecord) -> TrialRecord:
    if trial.finalist is None or trial.finalist.latency_ms is None:
        return trial
    return replace(trial, costs={**trial.costs, "latency": trial.finalist.latency_ms})


def yardstick(dense_score: float, scores: Iterable[float]) -> float:
    """The score that trials are measured against: the dense model's, or the best of theirs where none reaches it.

    What is small by the user's will, or trained from scratch for a few epochs, is not to be told apart by how far it is from
    the dense model.
    """
    return min(dense_score, max(scores, default=dense_score))


def front_of(trials: Sequence[TrialRecord], objectives: Objectives, limits: Limits = UNLIMITED) -> list[TrialRecord]:
    """The non-dominated trials within the limits by validation score and ratios, the largest first; each plan once.

    Once there are finalists within them only they compete: scores of long and of short fine-tuning do not compare.
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
    """One finalist: of that number, or the smallest of at least that validation score, or the best of at least that
    compression ratio; the knee of the front where nothing is asked for. One within the study's `limits` where there is one.
    Front, knee and size are meant by the study's `objectives`.

    Raises:
        StudyError: there are no finalists, or none is as asked.
    """
    finalists = {trial.number: trial for trial in trials if trial.finalist}
    if not finalists:
        if trials and not any(trial.scored for trial in trials):
            raise StudyError("A model must be a finalist to be taken home, but no trial came to a score; the report says why.")
        failed = sum(trial.failed is not None for trial in trials)
        known = f" ({failed} failed, as the report says)" if failed else ""
        raise StudyError(
            f"A model must be a finalist to be taken home, but there are none yet{known}; let the study end first."
        )
    if number is not None:
        if number not in finalists:
            names = ", ".join(map(str, sorted(finalists)))
            raise StudyError(f"Only finalists keep their weights, but trial {number} is none; they are {names}.")
        return finalists[number]
    # Not of the front alone, which may be of another cost than the compression ratio.
    whole = list(finalists.values())
    within = [trial for trial in whole if not limits.excess(trial, _score(trial))]
    if min_score is not None:
        fitting = [t for t in within if _score(t) >= min_score] or [t for t in whole if _score(t) >= min_score]
        if not fitting:
            best = max(map(_score, whole))
            raise StudyError(f"A model with a score of at least {min_score:g} is asked for, but the best has {best:.4f}.")
        return max(fitting, key=lambda trial: (objectives.ratio(trial), _score(trial)))
    if min_ratio is not None:
        fitting = [t for t in within if t.ratio >= min_ratio] or [t for t in whole if t.ratio >= min_ratio]
        if not fitting:
            most = max(trial.ratio for trial in whole)
            raise StudyError(f"A ratio of at least {min_ratio:g} is asked for, but the smallest model has {most:.1f}.")
        return max(fitting, key=lambda trial: (_score(trial), objectives.ratio(trial)))
    front = front_of(within or whole, objectives)
    return front[pareto.knee([objectives.point(_score(trial), trial) for trial in front])]


def _score(trial: TrialRecord) -> float:
    return trial.score_validation if trial.score_validation is not None else -math.inf
