"""The local workers: processes on this machine that live from the first job to the last, or this process itself.

A worker maps data, dense model and prepared factors into its memory (`shared_memory.py`) and then receives one job at a time
(`worker.py`). Each has its own pipe for learning-curve points and results, so a worker that dies loses only its job. A worker
ends when its driver ends for whatever reason, even in the middle of a job.

Unlike multiprocessing's, these workers do not import the script that calls `search()`: its definitions are pickled by value
(cloudpickle), so the script needs no `if __name__ == "__main__":`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import cloudpickle

from ranksearch.engines.base import Crash, Engine, Evaluate, Messages, Workers
from ranksearch.engines.shared_memory import Packed, pack
from ranksearch.errors import ModelError
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result
from ranksearch.support.cores import usable_cores

WORKER_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the driver handles Ctrl-C
from multiprocessing.connection import Connection
driver = Connection(int(sys.argv[1]))
try:
    sys.path[:] = driver.recv()
except EOFError:
    sys.exit(1)  # the driver is gone
from ranksearch.errors import described, unloadable
try:
    from ranksearch.engines.worker import serve
except Exception as error:
    driver.send(unloadable("a worker process", described(error)))
else:
    serve(driver, *map(int, sys.argv[2:]))
"""
"""The program of a worker. It imports torch only after the pipe is open, so that a failure can be reported to the driver."""


def engine(workers: int) -> Engine:
    """An engine with this many worker processes on this machine; with 0, jobs run in this process."""
    return Engine(_Pool(workers) if workers else _InProcess())


def threads_for(workers: int) -> int:
    """Threads for each worker. With more threads than cores in total, processes waste time waiting for each other's threads.

    On one core of two, a worker with two threads trained the digits LeNet two to seven times slower than with one.
    """
    return max(1, usable_cores() // max(1, workers))


class _InProcess(Workers):
    """This process as the only worker. An exception of a job is raised directly."""

    description = "in one process"

    def __init__(self) -> None:
        self._evaluate: Evaluate | None = None
        self._job: Job | None = None
        self._messages: Messages | None = None

    def load(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def idle(self) -> bool:
        return self._job is None

    def submit(self, job: Job) -> None:
        assert self._evaluate is not None, "`load` must be called before `submit`"
        self._job, self._messages = job, self._evaluate(job)

    def messages(self) -> Iterator[tuple[int, CurvePoint | Result]]:
        assert self._job is not None
        assert self._messages is not None
        key, message = self._job.key, next(self._messages)
        if isinstance(message, Result):
            self._job = None
        yield key, message

    def lost_reason(self) -> str:
        raise AssertionError("this process is not lost")

    def close(self) -> None:
        self._job = self._messages = None


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    job: Job | None = None

    def end(self) -> None:
        """Wait up to 5 seconds for the process to end, then kill it."""
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


class _Pool(Workers):
    def __init__(self, workers: int) -> None:
        self._threads = threads_for(workers)
        counts = ((workers, "worker"), (self._threads, "thread"))
        self.description = " of ".join(f"{count} {thing}{'s' if count > 1 else ''}" for count, thing in counts)
        self._limit = workers
        self._evaluate: Evaluate | None = None
        self._packed: Packed | None = None
        self._workers: list[_Worker] = []
        self._last_exit: int | None = None

    def load(self, evaluate: Evaluate) -> None:
        if evaluate is not self._evaluate:
            self.close()
            self._evaluate, self._packed = evaluate, pack(evaluate)

    def idle(self) -> bool:
        return len(self._busy()) < self._limit

    def submit(self, job: Job) -> None:
        worker = next((w for w in self._workers if w.job is None), None) or self._start()
        worker.job = job
        with suppress(OSError):  # the worker is already dead: `messages` finds its pipe closed and reports the job as lost
            worker.pipe.send_bytes(cloudpickle.dumps(job))  # cloudpickle, since a plan may use a method defined in a script

    def messages(self) -> Iterator[tuple[int, CurvePoint | Result | Crash]]:
        ready = wait([worker.pipe for worker in self._busy()])
        for worker in [w for w in self._busy() if w.pipe in ready]:
            assert worker.job is not None
            key = worker.job.key
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._workers.remove(worker)
                worker.pipe.close()
                worker.end()
                self._last_exit = worker.process.returncode
                message = Result(Outcome.WORKER_LOST)
            if isinstance(message, str):
                raise ModelError(message)
            if not isinstance(message, CurvePoint):
                worker.job = None
            yield key, message

    def lost_reason(self) -> str:
        return f"(last exit code {self._last_exit}); use fewer --workers, or --workers 0 to see the error in this process."

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        if self._packed is not None:
            self._packed.close()
        self._evaluate = self._packed = None

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    def _start(self) -> _Worker:
        assert self._packed is not None, "`load` must be called before `submit`"
        here, there = Pipe()
        descriptors = there.fileno(), self._packed.file.fileno()
        process = subprocess.Popen(
            # -P: without it, a file in the current folder could shadow a standard module before the driver's path arrives.
            [sys.executable, "-P", "-c", WORKER_PROGRAM, *map(str, (*descriptors, self._packed.start, self._threads))],
            # OpenMP reads this when the worker imports torch, so it must be set before.
            env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            pass_fds=descriptors,
            stdin=subprocess.PIPE,
        )
        there.close()
        worker = _Worker(process, here)
        self._workers.append(worker)
        with suppress(OSError):  # the worker died while starting: `messages` will report its first job as lost
            here.send(sys.path)
        return worker
