"""The process that runs Ray. The driver starts it and talks to it through a pipe.

Ray Tune runs the trials: `_Searcher` hands it the driver's jobs, `_Scheduler` passes learning-curve points and results on, and
each `_Trial` is an actor that holds data, dense model and factors from its first job to its last. The driver decides
everything, and this process stores nothing.
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
from ranksearch.engines.ray import Cluster, JobMessage, NoMoreJobs, Ready, SealedJob, WorkerFree
from ranksearch.errors import ModelError, StudyError, described, unloadable
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result
from ranksearch.support.cores import usable_cores

NO_NODE_SECONDS = 120
"""How long a study waits for a node that can run a trial, once all such nodes are gone."""


def main() -> None:
    """Connect to Ray, then run the jobs of each `evaluate` that the driver sends, until it closes the pipe."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    driver = Connection(int(sys.argv[1]))
    try:
        cluster: Cluster = driver.recv()
        _connect(cluster)
        driver.send(Ready(_describe(cluster)))
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
    """Exit when the driver ends, for whatever reason: standard input is a pipe from the driver that nobody writes to."""
    sys.stdin.read()
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    os._exit(1)


def _connect(cluster: Cluster) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": False}
    if cluster.address is None:
        cpus = (cluster.workers * cluster.cpus) if cluster.workers else max(cluster.cpus, usable_cores())
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(address=cluster.address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise StudyError(
                f"A Ray cluster must listen at --address {cluster.address}, but none does: {_one_line(error)}"
            ) from None
        except RuntimeError as error:
            if "Version mismatch" not in str(error):
                raise
            raise StudyError(
                f"Driver and cluster must have the same versions of Ray and Python, but the cluster at {cluster.address} "
                f"differs: {_one_line(error)}; install the same on both."
            ) from None
    if not _slots(cluster):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = [f"{max((node.get(kind, 0) for node in nodes), default=0):g}" for kind in ("CPU", "GPU")]
        raise StudyError(
            f"A node must have room for a trial of --cpus-per-trial {cluster.cpus} and --gpus-per-trial {cluster.gpus:g}, but "
            f"the most that a node of the cluster has is {most[0]} CPUs and {most[1]} GPUs."
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _describe(cluster: Cluster) -> str:
    nodes = sum(node["Alive"] for node in ray.nodes())
    trial = f"{cluster.cpus} {'CPU' if cluster.cpus == 1 else 'CPUs'}" + (
        f" and {cluster.gpus:g} {'GPU' if cluster.gpus <= 1 else 'GPUs'}" if cluster.gpus else ""
    )
    return f"Ray on {nodes} {'node' if nodes == 1 else 'nodes'}, {_slots(cluster)} trials at a time, {trial} each"


def _slots(cluster: Cluster) -> int:
    """How many trials the nodes that are alive now can run at a time."""
    slots = 0
    for node in ray.nodes():
        if node["Alive"]:
            cpus, gpus = (node["Resources"].get(kind, 0) for kind in ("CPU", "GPU"))
            held = cpus // cluster.cpus
            slots += int(min(held, _trials_on_gpus(gpus, cluster.gpus)) if cluster.gpus else held)
    return slots if cluster.workers is None else min(slots, cluster.workers)


def _trials_on_gpus(gpus: float, each: float) -> int:
    """How many trials fit on a node's GPUs. A trial that takes a fraction stays on one GPU; 1e-6, since 1 // 0.1 is 9."""
    return int(gpus) * int(1 / each + 1e-6) if each < 1 else int(gpus // each)


def _run(driver: Connection, cluster: Cluster, evaluate: bytes) -> None:
    """Run one Tune experiment, with a trial for each job of the driver."""
    running_jobs = _RunningJobs(driver)
    trainable = tune.with_resources(
        tune.with_parameters(_Trial, evaluate=evaluate, threads=cluster.cpus), {"cpu": cluster.cpus, "gpu": cluster.gpus}
    )
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(running_jobs, cluster),
            scheduler=_Scheduler(running_jobs),
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


class _RunningJobs:
    """Keeps the running jobs by Tune's trial ids, and passes their messages to the driver."""

    def __init__(self, driver: Connection) -> None:
        self._driver = driver
        self._running: dict[str, SealedJob] = {}

    def running(self) -> int:
        return len(self._running)

    def draw(self, trial: str) -> SealedJob | NoMoreJobs | None:
        """Ask the driver for a job for this Tune trial."""
        self._driver.send(WorkerFree())
        job = self._driver.recv()
        if isinstance(job, SealedJob):
            self._running[trial] = job
        return job

    def send(self, trial: str, message: CurvePoint | Result | Crash) -> None:
        """Pass a message on. A trial ends with its first message that is not a learning-curve point."""
        job = self._running[trial] if isinstance(message, CurvePoint) else self._running.pop(trial)
        self._driver.send(JobMessage(job.key, message))


class _Searcher(Searcher):
    """Gives Tune a job whenever a worker is free and the driver has a job."""

    def __init__(self, running_jobs: _RunningJobs, cluster: Cluster) -> None:
        super().__init__()
        self._running_jobs, self._cluster = running_jobs, cluster
        self._limit, self._counted_at, self._had_nodes = 0, -1.0, time.monotonic()

    def suggest(self, trial_id: str) -> Any:
        """A configuration that holds the job, None if there is no job now, or FINISHED."""
        if self._running_jobs.running() >= self._places():
            return None
        job = self._running_jobs.draw(trial_id)
        return {"job": job} if isinstance(job, SealedJob) else job and self.FINISHED

    def _places(self) -> int:
        """How many trials may run now. Nodes come and go, so this is counted anew every second."""
        now = time.monotonic()
        if now - self._counted_at > 1:
            self._limit, self._counted_at = _slots(self._cluster), now
            if self._limit:
                self._had_nodes = now
            elif now - self._had_nodes > NO_NODE_SECONDS:
                raise StudyError(
                    f"{self._cluster.name} must have a node that can run a trial, but has had none for {NO_NODE_SECONDS} s; "
                    "run the same command again once it has one."
                )
        return self._limit

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Does nothing: the scheduler handles the end of a trial."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the driver keeps the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: the driver keeps the record."""


class _Scheduler(TrialScheduler):
    """Passes the messages of trials to the driver."""

    def __init__(self, running_jobs: _RunningJobs) -> None:
        super().__init__()
        self._running_jobs = running_jobs
        self._chosen: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self._running_jobs.send(trial.trial_id, result["message"])
        return self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._running_jobs.send(trial.trial_id, result["message"])
        del trial.last_result["message"]  # Tune keeps each trial's last result, and a finalist's message holds its weights

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Report a worker that died or could not start because its node lacks this package or a dependency.

        Exceptions of jobs do not come here: `_Trial.step` sends them as messages.
        """
        kept = trial.pickled_error_file  # `get_pickled_error()` would look where Tune copies this file only later
        error = cloudpickle.loads(Path(kept).read_bytes()) if kept else None
        message: Result | Crash = Result(Outcome.WORKER_LOST)
        if isinstance(error, RayActorError) and error.actor_init_failed:
            message = _start_failure(error)
        self._running_jobs.send(trial.trial_id, message)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A pending trial that was not chosen before.

        If a chosen trial, whose actor is still starting, were chosen again, Tune would give it the next free actor and end the
        starting one. With short trials, a new node would then never get to work.
        """
        for trial in tune_controller.get_live_trials():
            if trial.status == Trial.PENDING and trial.trial_id not in self._chosen:
                self._chosen.add(trial.trial_id)
                return trial
        return None

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Does nothing: the searcher counts the running trials."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Does nothing: no trial is paused."""

    def debug_string(self) -> str:
        return "the driver decides"


def _start_failure(error: RayActorError) -> Crash:
    """A `ModelError` for a worker that could not start. Ray's text is a page that names the node and ends with the error."""
    page = str(error).strip()
    node = re.search(r"ip=([^,)]+)", page)
    words = unloadable(f"the node {node[1]}" if node else "a node", page.splitlines()[-1].strip())
    return Crash(ModelError(words), page)


class _Trial(tune.Trainable):
    """An actor that runs one job at a time and yields one message per step."""

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
    """Unpickle `evaluate`. If this node cannot, return a function that raises a `ModelError` at the first step of any job."""
    try:
        return cloudpickle.loads(evaluate)
    except Exception as error:
        words = unloadable(f"the node {platform.node()}", described(error))

    def refuse(job: Job) -> Messages:
        raise ModelError(words)
        yield

    return refuse
