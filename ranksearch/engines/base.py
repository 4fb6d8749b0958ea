"""The engine: draws jobs and passes their messages on, wherever the workers are."""

from __future__ import annotations

import abc
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import cloudpickle

from ranksearch.errors import ModelError, StudyError
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result

Messages: TypeAlias = Iterator[CurvePoint | Result]
Evaluate: TypeAlias = Callable[[Job], Messages]
OnMessage: TypeAlias = Callable[[Job, CurvePoint | Result], None]

MAX_LOST = 5
"""Workers lost in a row before the engine gives up: more than one plan is tried for, so the cause is not the plan."""


@dataclass(frozen=True)
class Crash:
    """A bug in a job: not an answer, an exception to be raised where the user sees it."""

    error: Exception
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        """The exception that is being handled, fit for the trip to the driver."""
        return cls(_portable(error), traceback.format_exc())


class Workers(abc.ABC):
    """What jobs run on. They stay warm from run to run, as long as they are to evaluate the same."""

    about: str
    """How many there are and of what kind, in few words for the report."""

    @abc.abstractmethod
    def load(self, evaluate: Evaluate) -> None:
        """What the next jobs are evaluated by, sent to each worker once."""

    @abc.abstractmethod
    def idle(self) -> bool:
        """Whether a worker is free for a job."""

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Give a free worker a job."""

    @abc.abstractmethod
    def messages(self) -> Iterable[tuple[int, CurvePoint | Result | Crash]]:
        """Waits for news, and gives what has come in with the keys of the jobs; nothing where a worker became free.

        A job whose worker is lost is answered with `Outcome.WORKER_LOST`.
        """

    @abc.abstractmethod
    def lost_words(self) -> str:
        """How the last worker was lost, and what helps, as the end of a sentence."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the workers, whatever they do; twice is no harm."""


class Engine:
    """Evaluates jobs on its workers; a context, which ends them."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.about = workers.about

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._workers.close()

    def run(self, jobs: Iterator[Job], evaluate: Evaluate, *, on_message: OnMessage, should_stop: Callable[[], bool]) -> None:
        """Evaluate jobs until there are no more.

        `jobs` is drawn from only when a worker is free, after every message received so far has been passed on: the next
        job may depend on them. A job whose worker dies is answered with `Outcome.WORKER_LOST`.

        Args:
            jobs: what to evaluate; no two that run at a time have the same key.
            evaluate: gives the messages of one job, an `Result` last. Workers elsewhere get it pickled.
            on_message: receives every rung and every answer, in this process.
            should_stop: asked before each draw; True lets the running jobs end and draws no more.

        Raises:
            StudyError: workers die one after the other, or cannot be had any more.
            Exception: whatever `evaluate` raised, with the worker's traceback; the other workers are ended first.
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
                    raise StudyError(
                        f"Workers must outlive their trials, but {lost} in a row ended before {workers.lost_words()}"
                    )


def packed(evaluate: Evaluate) -> bytes:
    """What travels to the workers of another machine, pickled.

    Raises:
        ModelError: something in it cannot be pickled.
    """
    with picklable():
        return cloudpickle.dumps(evaluate)


@contextmanager
def picklable() -> Iterator[None]:
    """What cannot be pickled within is told in a sentence."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"Model, data, loss and score must be picklable to reach the workers, but are not ({error}); mend that, or run the "
            "trials in this process with --workers 0."
        ) from error


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the trip to the driver, else its words."""
    try:
        return error if isinstance(pickle.loads(pickle.dumps(error)), type(error)) else RuntimeError(repr(error))
    except Exception:
        return RuntimeError(repr(error))
