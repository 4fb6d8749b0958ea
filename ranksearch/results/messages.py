"""What the driver of a study and its workers tell each other: jobs, points of learning curves, results. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from optuna.trial import TrialState

from ranksearch.plan import Plan


class Outcome(enum.Enum):
    """How a trial ended; the value is the sentence its user reads."""

    DONE = "done"
    DIVERGED = "diverged: the loss or the score became NaN or infinite; a lower finetune.learning_rate helps"
    NOT_SMALLER = "not smaller than dense: the plan saves no parameters, so it was not trained"
    OVER_BUDGET = (
        "over budget: larger or slower than search.min_ratio, search.max_params, search.max_macs or search.max_latency_ms "
        "allow, so it was not trained; a wider limit lets it in"
    )
    OUT_OF_MEMORY = "out of memory: a smaller finetune.batch_size or fewer --workers help"
    WORKER_LOST = "worker lost: its process ended before the trial did, most often for lack of memory; fewer --workers help"

    @property
    def state(self) -> TrialState:
        """The state that Optuna is told."""
        return _STATES.get(self, TrialState.PRUNED)

    @property
    def of_finalist(self) -> str:
        """The sentence where it was a finalist that ended so."""
        return self.value.replace("finetune.", "finalists.")


_STATES = {Outcome.DONE: TrialState.COMPLETE, Outcome.WORKER_LOST: TrialState.FAIL}


@dataclass(frozen=True)
class CurvePoint:
    """One point of a trial's curve: the validation score after so many epochs of fine-tuning."""

    epochs: float
    score: float


class Stage(enum.Enum):
    """What a job is for."""

    PROBE = "probe"
    """The validation loss before any fine-tuning."""
    TRIAL = "trial"
    FINALIST = "finalist"
    """Longer fine-tuning; also scored on the test split, and its weights kept."""


@dataclass(frozen=True)
class Job:
    """One plan to evaluate. `key` tells jobs apart."""

    key: int
    plan: Plan
    seed: int
    stage: Stage = Stage.TRIAL


@dataclass(frozen=True)
class Result:
    """How a job ended. `curve` holds every rung that was reached, `loss` a probe's; `weights` are safetensors bytes."""

    outcome: Outcome
    curve: tuple[CurvePoint, ...] = ()
    seconds: float = 0.0
    score_test: float | None = None
    weights: bytes | None = None
    loss: float | None = None
