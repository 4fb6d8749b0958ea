"""The Ray workers, seen from the driver: a process of their own holds Ray and speaks with us through a pipe.

Ray ends the process that it runs in when it loses its head node, waits without a bound for what the cluster does not have,
and writes to the screen. So it gets a process (`tune.py`): what happens there reaches the study as a message, as a sentence,
or as the end of the pipe. No other module of ours imports Ray.
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

from ranksearch.engines.base import Crash, Engine, Evaluate, Workers, packed
from ranksearch.errors import StudyError
from ranksearch.results.messages import CurvePoint, Job, Result

CONNECT_SECONDS = 24
"""For a cluster that is up: two seconds to start, one or two to connect, more on a busy machine."""
START_SECONDS = 120
"""For a Ray of our own."""
CLOSE_SECONDS = 15
HEAD_SECONDS = 30
"""After so long without its head node Ray gives up; 60 by its own default."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Actors start side by side; how many there are is the searcher's business.
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",
    # Tune's own record of the experiment is of no use here: the study's is the driver's.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}


@dataclass(frozen=True)
class Cluster:
    """Where to run trials, and what each takes: `address` of a Ray cluster, or None for a Ray of our own on this machine;
    how many at a time, None for as many as the cluster holds; CPUs (also threads) and GPUs, whole or a fraction, of each."""

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    @property
    def name(self) -> str:
        """The cluster in a sentence."""
        return f"The Ray cluster at {self.address}" if self.address else "The local Ray"


@dataclass(frozen=True)
class Ready:
    """The Ray process is connected; `about` is what the cluster has."""

    about: str


@dataclass(frozen=True)
class Sealed:
    """A job for the worker alone to unpickle: its plan may hold values of a class that only driver and workers know."""

    key: int
    pickled: bytes


@dataclass(frozen=True)
class Free:
    """A worker is free. Answered with a sealed job, with None (not now), or with `End`."""


@dataclass(frozen=True)
class Said:
    """A job's message."""

    key: int
    message: CurvePoint | Result | Crash


@dataclass(frozen=True)
class End:
    """No more jobs for what was loaded."""


def engine(cluster: Cluster) -> Engine:
    """An engine on Ray; its workers are there, or are refused, once this returns.

    Raises:
        StudyError: no Ray answers, or another version of it, or it has no node for a trial.
    """
    return Engine(_Cluster(cluster))


class _Cluster(Workers):
    def __init__(self, cluster: Cluster) -> None:
        _check_address(cluster.address)
        self._cluster = cluster
        self._evaluate: Evaluate | None = None
        self._asked = False
        """Whether the Ray process waits for our answer to `Free`."""
        self._running = 0
        self._scratch = TemporaryDirectory(prefix="ranksearch-ray-")
        self._pipe, self._process = _start(cluster, self._scratch.name)
        seconds = CONNECT_SECONDS if cluster.address else START_SECONDS
        try:
            if not self._pipe.poll(seconds):
                raise StudyError(
                    f"{cluster.name} must answer within {seconds} s, but does not; `ray status` says whether it is up, and the "
                    "driver must run on one of its nodes."
                )
            ready = self._receive()
            assert isinstance(ready, Ready)
            self.about = ready.about
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def load(self, evaluate: Evaluate) -> None:
        if evaluate is self._evaluate:
            return
        payload = packed(evaluate)
        if self._evaluate is not None:
            if not self._asked:
                self._receive()
            self._reply(End())
        self._evaluate = evaluate
        self._send(payload)

    def idle(self) -> bool:
        return self._asked

    def submit(self, job: Job) -> None:
        self._running += 1
        self._reply(Sealed(job.key, cloudpickle.dumps(job)))

    def messages(self) -> Iterator[tuple[int, CurvePoint | Result | Crash]]:
        if self._asked:
            self._reply(None)
        news = self._receive()
        if isinstance(news, Said):
            self._running -= not isinstance(news.message, CurvePoint)
            yield news.key, news.message
        else:
            self._asked = True

    def lost_words(self) -> str:
        return (
            "(killed, out of memory, or their nodes gone); Ray's dashboard and /tmp/ray/session_latest/logs on its nodes say "
            "why."
        )

    def close(self) -> None:
        # With its end of the pipe closed the process leaves the cluster, unless it waits for trials.
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

    def _reply(self, result: Sealed | End | None) -> None:
        self._asked = False
        self._send(result)

    def _send(self, value: object) -> None:
        try:
            self._pipe.send(value)
        except OSError:
            raise self._gone() from None

    def _receive(self) -> Ready | Free | Said:
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
            f"{self._cluster.name} must be there as long as a study runs, but the connection to it is lost; what was finished "
            "is in the record, and the same command goes on once it is back."
        )


def _check_address(address: str | None) -> None:
    """Whether something listens there; Ray itself would wait for it."""
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
        [sys.executable, "-c", "from ranksearch.engines.tune import main; main()", str(there.fileno()), scratch],
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
