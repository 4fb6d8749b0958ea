"""Messages between the driver of a study and its workers: jobs, learning-curve points, results. Without torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from optuna.trial import TrialState

from ranksearch.plan import Plan


class Outcome(enum.Enum):
    """How a trial ended; the value is the sentence that the user reads."""

    DONE = "done"
    DIVERGED = "diverged: the loss or the score became NaN or infinite; a lower finetune.learning_rate helps"
    NOT_SMALLER = "not smaller than dense: the plan saves no parameters, so it was not trained"
    OVER_BUDGET = (
        "over budget: too large or too slow for search.min_ratio, search.max_params, search.max_macs or "
        "search.max_latency_ms, so it was not trained; relax the limit to admit it"
    )
    OUT_OF_MEMORY = "out of memory: a smaller finetune.batch_size or fewer --workers help"
    WORKER_LOST = "worker lost: its process ended before the trial did, most often for lack of memory; fewer --workers help"

    @property
    def state(self) -> TrialState:
        """The Optuna state of a trial with this outcome."""
        return _STATES.get(self, TrialState.PRUNED)

    @property
    def of_finalist(self) -> str:
        """The sentence for a finalist with this outcome: it names the settings of `finalists`."""
        return self.value.replace("finetune.", "finalists.")

    @property
    def of_control(self) -> str:
        """The sentence for a control with this outcome: it names the settings of `dense`, whose recipe trains controls."""
        return self.value.replace("finetune.", "dense.")


_STATES = {Outcome.DONE: TrialState.COMPLETE, Outcome.WORKER_LOST: TrialState.FAIL}


@dataclass(frozen=True)
class CurvePoint:
    """One point of a learning curve: the validation score after `epochs` epochs of fine-tuning."""

    epochs: float
    score: float


@dataclass(frozen=True)
class Difference:
    """A model's score minus the dense model's on one split, with a 95 % interval and a standard error for other inputs."""

    value: float
    low: float
    high: float
    standard_error: float


class Stage(enum.Enum):
    """The purpose of a job."""

    PROBE = "probe"
    """Measure the loss, on a sample of the validation split, without fine-tuning."""
    NARROW = "narrow"
    """Train a narrower net that plans start from, and keep its weights."""
    TRIAL = "trial"
    FINALIST = "finalist"
    """Fine-tune for longer, score on the test split too, and keep the weights."""
    CONTROL = "control"
    """Train a narrower net from random weights, and score it on the test split too."""


@dataclass(frozen=True)
class Job:
    """One plan to evaluate, or one control. `key` identifies the job."""

    key: int
    plan: Plan
    seed: int
    stage: Stage = Stage.TRIAL
    share: float = 1.0
    """The share of the channels that each layer of a control keeps."""

    @property
    def name(self) -> str:
        """The job as people read it: `trial 5`, `control 2`."""
        return f"{self.stage.value} {self.key}"


@dataclass(frozen=True)
class Result:
    """Result of a job: `curve` is its learning curve, `loss` the loss of a probe, `weights` a safetensors file as bytes."""

    outcome: Outcome
    curve: tuple[CurvePoint, ...] = ()
    seconds: float = 0.0
    score_test: float | None = None
    difference_validation: Difference | None = None
    """Of a finalist, as `difference_test`."""
    difference_test: Difference | None = None
    weights: bytes | None = None
    loss: float | None = None
