"""The driver's side of the Ray workers: a separate process runs Ray and talks to the driver through a pipe.

Ray ends its own process when it loses the head node, waits forever for resources that the cluster does not have, and writes
to the screen. So it runs in a process of its own (`ray_process.py`, which alone
imports Ray), and the driver sees only messages, errors, or a closed pipe.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import cloudpickle

from ranksearch.engines.base import Crash, Engine, Evaluate, Workers
from ranksearch.engines.pickling import pickled
from ranksearch.errors import StudyError
from ranksearch.results.messages import CurvePoint, Job, Result

CONNECT_SECONDS = 24
"""How long to wait for a running cluster. It takes two seconds to start and one or two to connect, more on a busy machine."""
START_SECONDS = 120
"""How long to wait for a new local Ray."""
CLOSE_SECONDS = 15
HEAD_SECONDS = 30
"""Ray gives up after this long without its head node. Ray's own default is 60."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Let actors start in parallel; the searcher limits their number.
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",
    # Effectively never save Tune's own record of the experiment: the driver keeps the study's.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}


@dataclass(frozen=True)
class Cluster:
    """Where to run trials, and the resources of each.

    `address` is that of a Ray cluster, or None to start a local Ray. `workers` is the most trials at a time, or None for as
    many as the cluster holds. `cpus` (also its threads) and `gpus` (whole or a fraction) are for one trial.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    @property
    def name(self) -> str:
        """The cluster as the subject of a sentence."""
        return f"The Ray cluster at {self.address}" if self.address else "The local Ray"


@dataclass(frozen=True)
class Ready:
    """The Ray process is connected. `description` is the cluster in a few words."""

    description: str


@dataclass(frozen=True)
class SealedJob:
    """A pickled job. Only the worker unpickles it: its plan may use a class that the Ray process between them does not know."""

    key: int
    pickled: bytes


@dataclass(frozen=True)
class WorkerFree:
    """A worker is free. The driver replies with a `SealedJob`, with None (no job now), or with `NoMoreJobs`."""


@dataclass(frozen=True)
class JobMessage:
    """A message of the job with this key."""

    key: int
    message: CurvePoint | Result | Crash


@dataclass(frozen=True)
class NoMoreJobs:
    """No more jobs for the loaded `evaluate`."""


def engine(cluster: Cluster) -> Engine:
    """An engine on Ray. Connects to the cluster, or starts a local Ray, before it returns.

    Raises:
        StudyError: no Ray answers, the cluster has another version of Ray or Python, or no node is large enough for a trial.
    """
    return Engine(_Cluster(cluster))


class _Cluster(Workers):
    def __init__(self, cluster: Cluster) -> None:
        _check_address(cluster.address)
        self._cluster = cluster
        self._evaluate: Evaluate | None = None
        self._asked = False
        """Whether the Ray process waits for our reply to `WorkerFree`."""
        self._running = 0
        self._scratch = TemporaryDirectory(prefix="ranksearch-ray-")
        self._pipe, self._process = _start(cluster, self._scratch.name)
        seconds = CONNECT_SECONDS if cluster.address else START_SECONDS
        try:
            if not self._pipe.poll(seconds):
                raise StudyError(
                    f"{cluster.name} must answer within {seconds} s, but does not; check with `ray status` that it is running, "
                    "and run the driver on one of its nodes."
                )
            ready = self._receive()
            assert isinstance(ready, Ready)
            self.description = ready.description
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def load(self, evaluate: Evaluate) -> None:
        if evaluate is self._evaluate:
            return
        payload = pickled(evaluate)
        if self._evaluate is not None:
            if not self._asked:
                self._receive()
            self._reply(NoMoreJobs())
        self._evaluate = evaluate
        self._send(payload)

    def idle(self) -> bool:
        return self._asked

    def submit(self, job: Job) -> None:
        self._running += 1
        self._reply(SealedJob(job.key, cloudpickle.dumps(job)))

    def messages(self) -> Iterator[tuple[int, CurvePoint | Result | Crash]]:
        if self._asked:
            self._reply(None)
        news = self._receive()
        if isinstance(news, JobMessage):
            self._running -= not isinstance(news.message, CurvePoint)
            yield news.key, news.message
        else:
            self._asked = True

    def lost_reason(self) -> str:
        return (
            "(killed, out of memory, or lost with their nodes); see Ray's dashboard or /tmp/ray/session_latest/logs on a node."
        )

    def close(self) -> None:
        # Closing the pipe makes the process leave the cluster. It would not notice while it waits for trials, so kill it then.
        self._pipe.close()
        if self._running:
            self._process.kill()
        try:
            self._process.wait(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._running = 0
        self._scratch.cleanup()

    def _reply(self, result: SealedJob | NoMoreJobs | None) -> None:
        self._asked = False
        self._send(result)

    def _send(self, value: object) -> None:
        try:
            self._pipe.send(value)
        except OSError:
            raise self._gone() from None

    def _receive(self) -> Ready | WorkerFree | JobMessage:
        try:
            news = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(news, StudyError):
            raise news
        if isinstance(news, Crash):
            raise news.error from RuntimeError(f"in the process that holds Ray:\n{news.trace}")
        return news

    def _gone(self) -> StudyError:
        return StudyError(
            f"{self._cluster.name} must stay up while a study runs, but the connection to it was lost; all finished work is "
            "saved: run the same command again once the cluster is back."
        )


def _check_address(address: str | None) -> None:
    """Raise `StudyError` unless something listens at the address: Ray itself would wait for it."""
    if address is None or address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise StudyError(f"--address must be auto or HOST:PORT of a Ray cluster's head node, but got {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise StudyError(f"A Ray cluster must listen at --address {address}, but none does: {error}.") from None


def _start(cluster: Cluster, scratch: str) -> tuple[Connection, subprocess.Popen[bytes]]:
    here, there = Pipe()
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    environment.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEAD_SECONDS))
    process = subprocess.Popen(
        [sys.executable, "-c", "from ranksearch.engines.ray_process import main; main()", str(there.fileno()), scratch],
        env=environment,
        pass_fds=[there.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    there.close()
    here.send(cluster)
    return here, process
