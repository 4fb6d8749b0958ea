"""One run of a study: the state that its steps share, the time they take, and how they run jobs on the engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from ranksearch.compress.inventory import Inventory
from ranksearch.console import View
from ranksearch.engines.base import Engine
from ranksearch.errors import StudyError
from ranksearch.plan import Plan
from ranksearch.results import attributes
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result
from ranksearch.results.record import MAX_TRIES
from ranksearch.spec import StudySpec
from ranksearch.strategy.space import Space
from ranksearch.study import folder
from ranksearch.study.options import Options
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import Task


@dataclass
class Run:
    """One run of one study. `example` is a batch of one input on `device`; `user_plans` holds the user's plans to try first."""

    spec: StudySpec
    out: Path
    options: Options
    device: torch.device
    task: Task
    example: Any
    inventory: Inventory
    space: Space
    user_plans: Sequence[Plan]
    study: optuna.Study
    engine: Engine
    view: View
    seconds: dict[str, float] = field(init=False)
    """The wall time of each stage, in seconds, over all runs."""

    def __post_init__(self) -> None:
        self.seconds = attributes.read_seconds(self.study)

    @property
    def unfinished(self) -> Path:
        """The folder of checkpoints."""
        return self.out / folder.UNFINISHED

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], None]]:
        """Accumulate the stage's wall time over all runs, and save it at the end and after Ctrl-C.

        Call the yielded function to save it early.
        """
        before, start = self.seconds.get(name, 0.0), time.monotonic()

        def save() -> None:
            self.seconds[name] = before + time.monotonic() - start
            attributes.write_seconds(self.study, self.seconds)

        try:
            yield save
        except KeyboardInterrupt:
            save()
            raise
        save()  # not after an error: the storage itself may have failed

    def run_jobs(
        self, stage: str, jobs: Callable[[], Iterator[Job]], evaluate: Evaluator, on_result: Callable[[Job, Result], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Evaluate the jobs that `jobs()` yields, and call it again after workers were lost, for the jobs that are left.

        A job is given up after its worker was lost `MAX_TRIES` times. The stage's time is saved after each result.
        """
        losses, again = Counter[int](), True

        def on_message(job: Job, message: CurvePoint | Result) -> None:
            nonlocal again
            if isinstance(message, CurvePoint):
                self.view.curve_point(job.key, message)
                return
            if message.outcome is Outcome.WORKER_LOST:
                losses[job.key] += 1
                again = again or losses[job.key] < MAX_TRIES
            on_result(job, message)
            save()

        with self.stage(stage) as save:
            while again:
                again = False
                left = (job for job in jobs() if losses[job.key] < MAX_TRIES)
                self.engine.run(left, evaluate, on_message=on_message, should_stop=should_stop)


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` means CUDA if there is a GPU, otherwise the CPU.

    Raises:
        StudyError: torch finds no such device.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
    if name not in there and not (name == "cuda" and cuda):
        raise StudyError(f"--device must be one that torch finds on this machine ({', '.join(there)}), but got {name}.")
    return torch.device(name)
