"""Trials and what is known of each: costs, scores, learning curves, latencies. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ranksearch.plan import Plan
from ranksearch.results.costs import Counts
from ranksearch.results.messages import CurvePoint, Difference, Outcome

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
    difference_validation: Difference | None = None
    """None if the score gave no number for most resampled inputs, and in records of earlier versions."""
    difference_test: Difference | None = None
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


def trial_with_measured(trial: TrialRecord) -> TrialRecord:
    """A trial with its measured latency among its costs, if it was timed."""
    if trial.finalist is None or trial.finalist.latency_ms is None:
        return trial
    return replace(trial, costs={**trial.costs, "latency": trial.finalist.latency_ms})
