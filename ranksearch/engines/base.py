"""The engine draws jobs, hands them to workers of any kind, and passes the workers' messages on."""

from __future__ import annotations

import abc
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

from ranksearch.errors import StudyError
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result

Messages: TypeAlias = Iterator[CurvePoint | Result]
Evaluate: TypeAlias = Callable[[Job], Messages]
OnMessage: TypeAlias = Callable[[Job, CurvePoint | Result], None]

MAX_LOST = 5
"""The engine gives up after this many lost workers in a row. It exceeds the tries of one plan, so the plan is not the cause."""


@dataclass(frozen=True)
class Crash:
    """An exception that a job raised, that is, a bug. The driver raises it again, where the user sees it."""

    error: Exception
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Wrap the exception that is being handled, in a form that can be pickled."""
        return cls(_portable(error), traceback.format_exc())


class Workers(abc.ABC):
    """The processes that run jobs. They stay alive between calls of `Engine.run` with the same `evaluate`."""

    description: str
    """The number and kind of the workers, in a few words for the report."""

    @abc.abstractmethod
    def load(self, evaluate: Evaluate) -> None:
        """Set the function that evaluates the next jobs. Each worker receives it once."""

    @abc.abstractmethod
    def idle(self) -> bool:
        """Whether a worker is free for a job."""

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Give a job to a free worker."""

    @abc.abstractmethod
    def messages(self) -> Iterable[tuple[int, CurvePoint | Result | Crash]]:
        """Wait for messages, and yield pairs (key of the job, message); none if a worker only became free.

        A job whose worker is lost ends with `Outcome.WORKER_LOST`.
        """

    @abc.abstractmethod
    def lost_reason(self) -> str:
        """How the last worker was lost, and the remedy, as the end of a sentence."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the workers, even busy ones. A second call does no harm."""


class Engine:
    """Evaluates jobs on its workers. A context manager that ends the workers on exit."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.description = workers.description

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._workers.close()

    def run(self, jobs: Iterator[Job], evaluate: Evaluate, *, on_message: OnMessage, should_stop: Callable[[], bool]) -> None:
        """Evaluate jobs until there are no more.

        The next job is drawn only when a worker is free and every message received so far was passed on, since the choice
        of the next job may depend on them. A job whose worker dies ends with `Outcome.WORKER_LOST`.

        Args:
            jobs: the jobs; two that run at the same time must have different keys.
            evaluate: yields the messages of one job, a `Result` last. It is pickled for workers in other processes.
            on_message: called in this process with every learning-curve point and every result.
            should_stop: asked before each draw; True lets the running jobs end and draws no more.

        Raises:
            StudyError: `MAX_LOST` workers in a row died, or the workers are gone for good.
            Exception: whatever `evaluate` raised, with the worker's traceback. All workers are ended first.
        """
        try:
            self._workers.load(evaluate)
            self._drive(jobs, on_message, should_stop)
        except BaseException:
            self._workers.close()
            raise

    def _drive(self, jobs: Iterator[Job], on_message: OnMessage, should_stop: Callable[[], bool]) -> None:
        workers, running, lost, open_ended = self._workers, dict[int, Job](), 0, True
        while True:
            while open_ended and workers.idle() and not should_stop():
                job = next(jobs, None)
                if job is None:
                    open_ended = False
                else:
                    running[job.key] = job
                    workers.submit(job)
            if not running and (not open_ended or should_stop()):
                return
            for key, message in workers.messages():
                if isinstance(message, Crash):
                    raise message.error from RuntimeError(f"in a worker:\n{message.trace}")
                job = running[key]
                if isinstance(message, Result):
                    del running[key]
                    lost = lost + 1 if message.outcome is Outcome.WORKER_LOST else 0
                on_message(job, message)
                if lost >= MAX_LOST:
                    raise StudyError(f"Workers must survive their trials, but {lost} in a row died {workers.lost_reason()}")


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, otherwise a `RuntimeError` with its text."""
    try:
        return error if isinstance(pickle.loads(pickle.dumps(error)), type(error)) else RuntimeError(repr(error))
    except Exception:
        return RuntimeError(repr(error))
