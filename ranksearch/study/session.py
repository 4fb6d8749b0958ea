"""One run of a study: what its steps share, the time they take, and how they run jobs on the engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna

from ranksearch.console import View
from ranksearch.engines.base import Engine
from ranksearch.results import attributes
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result, Stage
from ranksearch.results.trials import MAX_TRIES
from ranksearch.task.evaluation import Evaluator


@dataclass(frozen=True)
class Session:
    """One run of one study: its record, the engine that evaluates jobs, and the view. All steps share it."""

    study: optuna.Study
    engine: Engine
    view: View
    seconds: dict[str, float]
    """The wall time of each stage, in seconds, over all runs."""

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
                # Narrower nets are trained before the view has the facts, with the name of the score.
                if job.stage is not Stage.NARROW:
                    self.view.curve_point(job.name, message)
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
