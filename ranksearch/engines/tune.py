"""The process that holds Ray, started by the driver, which is at the other end of its pipe.

Ray Tune runs the trials. `_Searcher` gives it the jobs that the driver asks for, `_Scheduler` passes rungs and answers on, and
a `_Trial` is an actor that holds data, dense model and factors from its first job to its last. None decides anything, and
nothing is kept here.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import ray
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from ranksearch.engines.base import Crash, Evaluate, Messages
from ranksearch.engines.ray import Cluster, End, Free, Ready, Said, Sealed
from ranksearch.errors import ModelError, StudyError, described, unloadable
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result

NO_NODE_SECONDS = 120
"""So long a study waits for a node that can run a trial, after all that could are gone."""


def main() -> None:
    """Connect, then run what the driver sends until it closes the pipe."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    driver = Connection(int(sys.argv[1]))
    try:
        cluster: Cluster = driver.recv()
        _connect(cluster)
        driver.send(Ready(_about(cluster)))
        while True:
            _run(driver, cluster, driver.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except StudyError as error:
        driver.send(error)
    except Exception as error:
        driver.send(Crash.of(error))
    finally:
        ray.shutdown()


def _end_with_driver() -> None:
    """The standard input is a pipe that nobody writes to: it ends when the driver does, however that was."""
    sys.stdin.read()
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    os._exit(1)


def _connect(cluster: Cluster) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": False}
    if cluster.address is None:
        cpus = (cluster.workers * cluster.cpus) if cluster.workers else max(cluster.cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(address=cluster.address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise StudyError(
                f"A Ray cluster must listen at --address {cluster.address}, but none does: {_line(error)}"
            ) from None
        except RuntimeError as error:
            if "Version mismatch" not in str(error):
                raise
            raise StudyError(
                f"Driver and cluster must have the same versions of Ray and Python, but the cluster at {cluster.address} "
                f"differs: {_line(error)}; install the same on both."
            ) from None
    if not _slots(cluster):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = [f"{max((node.get(kind, 0) for node in nodes), default=0):g}" for kind in ("CPU", "GPU")]
        raise StudyError(
            f"A node must hold a trial of --cpus-per-trial {cluster.cpus} and --gpus-per-trial {cluster.gpus:g}, but the most "
            f"that a node of the cluster has is {most[0]} CPUs and {most[1]} GPUs."
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _about(cluster: Cluster) -> str:
    nodes = sum(node["Alive"] for node in ray.nodes())
    trial = f"{cluster.cpus} {'CPU' if cluster.cpus == 1 else 'CPUs'}" + (
        f" and {cluster.gpus:g} {'GPU' if cluster.gpus <= 1 else 'GPUs'}" if cluster.gpus else ""
    )
    return f"Ray on {nodes} {'node' if nodes == 1 else 'nodes'}, {_slots(cluster)} trials at a time, {trial} each"


def _slots(cluster: Cluster) -> int:
    """How many trials the nodes that are there now hold at a time."""
    found = 0
    for node in ray.nodes():
        if node["Alive"]:
            cpus, gpus = (node["Resources"].get(kind, 0) for kind in ("CPU", "GPU"))
            held = cpus // cluster.cpus
            found += int(min(held, _share(gpus, cluster.gpus)) if cluster.gpus else held)
    return found if cluster.workers is None else min(found, cluster.workers)


def _share(gpus: float, each: float) -> int:
    """How many trials so many GPUs hold; one that takes a fraction lies on one GPU. 1 // 0.1 is 9."""
    return int(gpus) * int(1 / each + 1e-6) if each < 1 else int(gpus // each)


def _run(driver: Connection, cluster: Cluster, evaluate: bytes) -> None:
    """One experiment of Tune: as many trials as the driver has jobs for."""
    board = _Board(driver)
    trainable = tune.with_resources(
        tune.with_parameters(_Trial, evaluate=evaluate, threads=cluster.cpus), {"cpu": cluster.cpus, "gpu": cluster.gpus}
    )
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(board, cluster),
            scheduler=_Scheduler(board),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=sys.argv[2],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


class _Board:
    """The jobs that run, by Tune's trial, and what is said of them to the driver."""

    def __init__(self, driver: Connection) -> None:
        self._driver = driver
        self._running: dict[str, Sealed] = {}

    def running(self) -> int:
        return len(self._running)

    def draw(self, trial: str) -> Sealed | End | None:
        """The job for a trial of Tune's."""
        self._driver.send(Free())
        job = self._driver.recv()
        if isinstance(job, Sealed):
            self._running[trial] = job
        return job

    def say(self, trial: str, message: CurvePoint | Result | Crash) -> None:
        """Pass a message on; a trial ends with what is no rung."""
        job = self._running[trial] if isinstance(message, CurvePoint) else self._running.pop(trial)
        self._driver.send(Said(job.key, message))


class _Searcher(Searcher):
    """Has a job for Tune whenever a worker is free and the driver has one."""

    def __init__(self, board: _Board, cluster: Cluster) -> None:
        super().__init__()
        self._board, self._cluster = board, cluster
        self._limit, self._looked, self._had_nodes = 0, -1.0, time.monotonic()

    def suggest(self, trial_id: str) -> Any:
        """A configuration that holds the job, None for not now, or FINISHED."""
        if self._board.running() >= self._places():
            return None
        job = self._board.draw(trial_id)
        return {"job": job} if isinstance(job, Sealed) else job and self.FINISHED

    def _places(self) -> int:
        """How many trials may run, as of the last second: nodes come and go."""
        now = time.monotonic()
        if now - self._looked > 1:
            self._limit, self._looked = _slots(self._cluster), now
            if self._limit:
                self._had_nodes = now
            elif now - self._had_nodes > NO_NODE_SECONDS:
                raise StudyError(
                    f"{self._cluster.name} must have a node that can run a trial, but has had none for {NO_NODE_SECONDS} s; "
                    "the same command goes on once it has one."
                )
        return self._limit

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler hears of it first, and sees what Tune keeps."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record is the driver's."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the record is the driver's."""


class _Scheduler(TrialScheduler):
    """Passes on what trials report."""

    def __init__(self, board: _Board) -> None:
        super().__init__()
        self._board = board
        self._chosen: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self._board.say(trial.trial_id, result["message"])
        return self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._board.say(trial.trial_id, result["message"])
        del trial.last_result["message"]  # Tune keeps every result, and a finalist's holds its weights

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """What a job raises is a message. An error to Tune is a worker that is gone, or that could not begin: its node lacks
        this package, or one that it needs."""
        kept = trial.pickled_error_file  # not `get_pickled_error()`, which looks where Tune copies this file later
        error = cloudpickle.loads(Path(kept).read_bytes()) if kept else None
        message: Result | Crash = Result(Outcome.WORKER_LOST)
        if isinstance(error, RayActorError) and error.actor_init_failed:
            message = _unable(error)
        self._board.say(trial.trial_id, message)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A trial that was not chosen yet. To one that was, whose actor is starting, Tune would give the next actor that
        becomes free and end the one that starts: where trials are short, a new node would never come to work."""
        for trial in tune_controller.get_live_trials():
            if trial.status == Trial.PENDING and trial.trial_id not in self._chosen:
                self._chosen.add(trial.trial_id)
                return trial
        return None

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: the searcher counts what runs."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: no trial is paused."""

    def debug_string(self) -> str:
        return "the driver decides"


def _unable(error: RayActorError) -> Crash:
    """Ray's words for a worker that could not begin are a page, which names the node and ends with the error."""
    page = str(error).strip()
    node = re.search(r"ip=([^,)]+)", page)
    words = unloadable(f"the node {node[1]}" if node else "a node", page.splitlines()[-1].strip())
    return Crash(ModelError(words), page)


class _Trial(tune.Trainable):
    """An actor: one job at a time, a message a step."""

    def setup(self, config: dict[str, Any], evaluate: bytes = b"", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self._evaluate = _unpacked(evaluate)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._messages = self._evaluate(cloudpickle.loads(new_config["job"].pickled))
        return True

    def step(self) -> dict[str, Any]:
        message: CurvePoint | Result | Crash
        try:
            message = next(self._messages)
        except Exception as error:
            message = Crash.of(error)
        return {"message": message, "done": not isinstance(message, CurvePoint)}


def _unpacked(evaluate: bytes) -> Evaluate:
    """What the driver packed; where this node cannot load it, what says so at the first step of any job."""
    try:
        return cloudpickle.loads(evaluate)
    except Exception as error:
        words = unloadable(f"the node {platform.node()}", described(error))

    def refuse(job: Job) -> Messages:
        raise ModelError(words)
        yield

    return refuse
