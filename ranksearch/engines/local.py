"""The local engine: worker processes on this machine, kept warm from the first job to the last.

A worker receives the evaluator once (data, dense model, prepared factors) and then one job at a time. It reports every
rung and its answer through its own pipe, so a worker that dies takes nothing with it but its job. After a rung it waits
for the verdict; the end of the pipe, when the driver is gone, ends the worker too.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TypeAlias

import cloudpickle
import torch

from ranksearch.errors import StudyError
from ranksearch.record import Outcome, Rung
from ranksearch.strategy.trial import Answer, Job

Messages: TypeAlias = Generator[Rung | Answer, bool | None, None]
Evaluate: TypeAlias = Callable[[Job], Messages]
OnMessage: TypeAlias = Callable[[Job, Rung | Answer], bool]

MAX_LOST = 5
"""Workers lost in a row before the engine gives up: more than one plan is tried for, so the cause is not the plan."""


def run(
    jobs: Iterator[Job], evaluate: Evaluate, *, workers: int, on_message: OnMessage, should_stop: Callable[[], bool]
) -> None:
    """Evaluate jobs until there are no more, `workers` at a time; 0 runs them here, in this process.

    `jobs` is drawn from only when a worker is free, after every message received so far has been passed on: the next
    job may depend on them. A job whose worker dies is answered with `Outcome.WORKER_LOST`.

    Args:
        jobs: what to evaluate.
        evaluate: gives the messages of one job, an `Answer` last, and is sent what `on_message` returned for each; it must
            be picklable.
        workers: how many processes.
        on_message: receives every rung and every answer, in this process; returns for a rung whether the job goes on.
            What it returns for an answer changes nothing.
        should_stop: asked before each draw; True lets the running jobs end and draws no more.

    Raises:
        StudyError: workers die one after the other.
        Exception: whatever `evaluate` raised, with the worker's traceback; the other workers are ended first.
    """
    if workers == 0:
        while not should_stop() and (job := next(jobs, None)) is not None:
            _converse(evaluate(job), partial(on_message, job))
        return
    pool = _Pool(cloudpickle.dumps(evaluate), workers)
    try:
        _drive(pool, jobs, on_message, should_stop)
    finally:
        pool.close()


def threads_for(workers: int) -> int:
    """Threads for each worker. Several threads in several processes on the same cores spin at each other's barriers."""
    return max(1, (os.cpu_count() or 1) // max(1, workers))


def _converse(messages: Messages, tell: Callable[[Rung | Answer], bool]) -> None:
    """Tell every message of a job, and send the job what each was answered with."""
    go_on: bool | None = None  # the first `send` to a generator must be of None
    while True:
        try:
            message = messages.send(go_on)
        except StopIteration:
            return
        go_on = tell(message)


def _drive(pool: _Pool, jobs: Iterator[Job], on_message: OnMessage, should_stop: Callable[[], bool]) -> None:
    lost, open_ended = 0, True
    while True:
        while open_ended and pool.idle() and not should_stop():
            job = next(jobs, None)
            if job is None:
                open_ended = False
            else:
                pool.submit(job)
        if not pool.busy():
            return
        for worker, message in pool.messages():
            job = worker.job
            assert job is not None
            if isinstance(message, _Crash):
                raise message.error from RuntimeError(f"in a worker:\n{message.trace}")
            if isinstance(message, Answer):
                worker.job = None
                lost = lost + 1 if message.outcome is Outcome.WORKER_LOST else 0
            go_on = on_message(job, message)
            if isinstance(message, Rung):
                worker.answer(go_on)
            if lost >= MAX_LOST:
                raise StudyError(
                    f"Workers must outlive their trials, but {lost} in a row ended before (last exit code "
                    f"{worker.process.exitcode}); give fewer --workers, or --workers 0 to see what happens in this "
                    "process. A script that calls search() must do so under `if __name__ == '__main__':`."
                )


@dataclass(frozen=True)
class _Crash:
    """A bug in a job: not an answer, an exception to be raised where the user sees it."""

    error: Exception
    trace: str


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    job: Job | None = None

    def answer(self, go_on: bool) -> None:
        with suppress(OSError):  # dead since its rung: `messages` finds its pipe closed and answers for it
            self.pipe.send(go_on)


class _Pool:
    def __init__(self, payload: bytes, workers: int) -> None:
        self._payload = payload
        self._threads = threads_for(workers)
        self._context: SpawnContext = multiprocessing.get_context("spawn")
        self._limit = workers
        self._workers: list[_Worker] = []

    def idle(self) -> bool:
        return len(self.busy()) < self._limit

    def busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    def submit(self, job: Job) -> None:
        worker = next((w for w in self._workers if w.job is None), None) or self._start()
        worker.job = job
        with suppress(OSError):  # dead before its job: `messages` finds its pipe closed and answers for it
            worker.pipe.send(job)

    def messages(self) -> Iterator[tuple[_Worker, Rung | Answer | _Crash]]:
        """Waits for at least one message; a closed pipe reads as a lost worker."""
        ready = wait([worker.pipe for worker in self.busy()])
        for worker in [w for w in self.busy() if w.pipe in ready]:
            try:
                yield worker, worker.pipe.recv()
            except (EOFError, OSError):
                self._workers.remove(worker)
                worker.process.join(timeout=5)
                yield worker, Answer(Outcome.WORKER_LOST)

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(there, self._threads, sys.path), daemon=True)
        # Read by OpenMP when the child loads torch: later is too late.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        try:
            process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
        there.close()
        with suppress(OSError):  # it died while starting: its first job is answered as lost
            here.send_bytes(self._payload)
        worker = _Worker(process, here)
        self._workers.append(worker)
        return worker


def _work(pipe: Connection, threads: int, path: list[str]) -> None:
    """A worker's life. Ctrl-C is the driver's business; a closed pipe means that the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    torch.set_num_threads(threads)
    try:
        evaluate: Evaluate = cloudpickle.loads(pipe.recv_bytes())
        while True:
            job = pipe.recv()
            try:
                _converse(evaluate(job), partial(_report, pipe))
            except _DriverGone:
                return
            except Exception as error:
                pipe.send(_Crash(_portable(error), traceback.format_exc()))
    except (EOFError, OSError):
        return


class _DriverGone(Exception):
    """Nobody reads or answers any more; apart from the errors of a job, which may be of pipes and files as well."""


def _report(pipe: Connection, message: Rung | Answer) -> bool:
    """Send a message to the driver; whether the job goes on."""
    try:
        pipe.send(message)
        return pipe.recv() if isinstance(message, Rung) else True
    except (EOFError, OSError):
        raise _DriverGone from None


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the trip to the driver, else its words."""
    try:
        return error if isinstance(pickle.loads(pickle.dumps(error)), type(error)) else RuntimeError(repr(error))
    except Exception:
        return RuntimeError(repr(error))
