"""The local workers: processes on this machine, kept warm from the first job to the last; or this process itself.

A worker receives the evaluator once (data, dense model, prepared factors) and then one job at a time. It reports every
rung and its answer through its own pipe, so a worker that dies takes nothing with it but its job. It ends with its driver,
however that ends, in the midst of a job too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess

import cloudpickle
import torch

from ranksearch.engines.base import Crash, Engine, Evaluate, Messages, Workers, packed
from ranksearch.record import Outcome, Rung
from ranksearch.strategy.trial import Answer, Job


def engine(workers: int) -> Engine:
    """An engine of so many processes on this machine; 0 evaluates in this process."""
    return Engine(_Pool(workers) if workers else _Here())


def threads_for(workers: int) -> int:
    """Threads for each worker. Several threads in several processes on the same cores spin at each other's barriers."""
    return max(1, (os.cpu_count() or 1) // max(1, workers))


class _Here(Workers):
    """This process, which does one job at a time; a bug is raised where it happens."""

    about = "in one process"

    def __init__(self) -> None:
        self._evaluate: Evaluate | None = None
        self._job: Job | None = None
        self._messages: Messages | None = None

    def load(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def idle(self) -> bool:
        return self._job is None

    def submit(self, job: Job) -> None:
        assert self._evaluate is not None, "loaded before it is given jobs"
        self._job, self._messages = job, self._evaluate(job)

    def messages(self) -> Iterator[tuple[int, Rung | Answer]]:
        assert self._job is not None
        assert self._messages is not None
        key, message = self._job.key, next(self._messages)
        if isinstance(message, Answer):
            self._job = None
        yield key, message

    def lost_words(self) -> str:
        raise AssertionError("this process is not lost")

    def close(self) -> None:
        self._job = self._messages = None


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    job: Job | None = None


class _Pool(Workers):
    def __init__(self, workers: int) -> None:
        self._threads = threads_for(workers)
        counts = ((workers, "worker"), (self._threads, "thread"))
        self.about = " of ".join(f"{count} {thing}{'s' if count > 1 else ''}" for count, thing in counts)
        self._context: SpawnContext = multiprocessing.get_context("spawn")
        self._limit = workers
        self._evaluate: Evaluate | None = None
        self._payload = b""
        self._workers: list[_Worker] = []
        self._last_exit: int | None = None

    def load(self, evaluate: Evaluate) -> None:
        if evaluate is not self._evaluate:
            self.close()
            self._evaluate, self._payload = evaluate, packed(evaluate)

    def idle(self) -> bool:
        return len(self._busy()) < self._limit

    def submit(self, job: Job) -> None:
        worker = next((w for w in self._workers if w.job is None), None) or self._start()
        worker.job = job
        with suppress(OSError):  # dead before its job: `messages` finds its pipe closed and answers for it
            worker.pipe.send(job)

    def messages(self) -> Iterator[tuple[int, Rung | Answer | Crash]]:
        ready = wait([worker.pipe for worker in self._busy()])
        for worker in [w for w in self._busy() if w.pipe in ready]:
            assert worker.job is not None
            key = worker.job.key
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._workers.remove(worker)
                worker.process.join(timeout=5)
                self._last_exit = worker.process.exitcode
                message = Answer(Outcome.WORKER_LOST)
            if not isinstance(message, Rung):
                worker.job = None
            yield key, message

    def lost_words(self) -> str:
        return (
            f"(last exit code {self._last_exit}); give fewer --workers, or --workers 0 to see what happens in this process. A "
            "script that calls search() must do so under `if __name__ == '__main__':`."
        )

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
        self._workers.clear()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None]

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
    threading.Thread(target=_end_with_driver, daemon=True).start()
    sys.path[:] = path
    torch.set_num_threads(threads)
    try:
        evaluate: Evaluate = cloudpickle.loads(pipe.recv_bytes())
        while True:
            job = pipe.recv()
            try:
                _report(evaluate(job), pipe)
            except _DriverGone:
                return
            except Exception as error:
                pipe.send(Crash.of(error))
    except (EOFError, OSError):
        return


def _end_with_driver() -> None:
    """A killed driver ends no one, and a job may be hours from the message that finds nobody there."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


class _DriverGone(Exception):
    """Nobody reads any more; apart from the errors of a job, which may be of pipes and files as well."""


def _report(messages: Messages, pipe: Connection) -> None:
    """Send the driver every message of a job."""
    for message in messages:
        try:
            pipe.send(message)
        except OSError:
            raise _DriverGone from None
