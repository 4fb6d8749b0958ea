"""The local workers: processes on this machine, kept warm from the first job to the last; or this process itself.

A worker maps what jobs are evaluated by (data, dense model, prepared factors; `shared.py`) and then receives one job at a
time (`worker.py`). It reports every rung and its answer through its own pipe, so a worker that dies takes nothing with it but
its job. It ends with its driver, however that ends, in the midst of a job too.

Workers do not import the script that calls `search()`, as those of multiprocessing do: what is defined there travels by value
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
from ranksearch.engines.shared import Packed, pack
from ranksearch.errors import ModelError
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result

START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
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
"""What a worker runs; it imports torch only where a failure can be told to the driver."""


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

    def messages(self) -> Iterator[tuple[int, CurvePoint | Result]]:
        assert self._job is not None
        assert self._messages is not None
        key, message = self._job.key, next(self._messages)
        if isinstance(message, Result):
            self._job = None
        yield key, message

    def lost_words(self) -> str:
        raise AssertionError("this process is not lost")

    def close(self) -> None:
        self._job = self._messages = None


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    job: Job | None = None

    def end(self) -> None:
        """Wait for its end, not for long."""
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
        self.about = " of ".join(f"{count} {thing}{'s' if count > 1 else ''}" for count, thing in counts)
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
        with suppress(OSError):  # dead before its job: `messages` finds its pipe closed and answers for it
            worker.pipe.send_bytes(cloudpickle.dumps(job))  # its plan may hold values of a method defined in a script

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

    def lost_words(self) -> str:
        return f"(last exit code {self._last_exit}); give fewer --workers, or --workers 0 to see what happens in this process."

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
        assert self._packed is not None, "loaded before it is given jobs"
        here, there = Pipe()
        given = there.fileno(), self._packed.file.fileno()
        process = subprocess.Popen(
            # -P: a file of the current folder must not stand in for a module of Python's before the driver's path is there.
            [sys.executable, "-P", "-c", START, *map(str, (*given, self._packed.start, self._threads))],
            # Read by OpenMP when the worker loads torch: later is too late.
            env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            pass_fds=given,
            stdin=subprocess.PIPE,
        )
        there.close()
        worker = _Worker(process, here)
        self._workers.append(worker)
        with suppress(OSError):  # it died while starting: its first job is answered as lost
            here.send(sys.path)
        return worker
