"""Ray as a user sees it: bad input is refused soon in one sentence; nodes are lost; the driver is killed."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import Pipe
from operator import itemgetter
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from ranksearch.cli import main
from ranksearch.console import Lines
from ranksearch.engines import ray, ray_process
from ranksearch.errors import ModelError, StudyError
from ranksearch.plan import Plan
from ranksearch.results.attributes import read_trials
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result
from ranksearch.study.options import Options, Ray
from ranksearch.study.study import run_study
from tests import ROOT
from tests.books import Books
from tests.conftest import essence, refuse, small_spec, snapshot, stored
from tests.engines.test_engines import REFUSED

KILLS = 1
"""How often the driver is killed. Ten kills passed too, in two minutes."""
SOON = 30
"""Seconds within which bad input must be refused."""

CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A lost node is known after one second instead of ten or more.
os.environ |= {f"RAY_health_check_{name}": value for name, value in [("period_ms", "250"), ("failure_threshold", "4")]}
import ray
import psutil  # which Ray brings
from ray.cluster_utils import Cluster

def kill(node):
    for worker in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        worker.kill()
    for processes in node.all_processes.values():
        for about in processes:
            about.process.kill()

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), "include_dashboard": False})
nodes = [cluster.head_node]
print(cluster.address, flush=True)
for line in sys.stdin:
    done = True
    match line.split():
        case ["add", cpus]:
            nodes.append(cluster.add_node(num_cpus=int(cpus)))
        case ["kill", node]:
            kill(nodes[int(node)])
        case ["lose", worker]:
            raylet = int(open(f"/proc/{worker}/stat").read().split(")")[1].split()[1])
            found = [node for node in nodes[1:] if node.all_processes["raylet"][0].process.pid == raylet]
            done = bool([kill(node) for node in found])
        case ["pretend", version]:
            import json
            from ray._raylet import GcsClient
            about = GcsClient(address=cluster.address)
            kept = json.loads(about.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster"))
            kept = json.dumps(kept | {"ray_version": version}).encode()
            about.internal_kv_put(b"CLUSTER_METADATA", kept, overwrite=True, namespace=b"cluster")
    print("done" if done else "no", flush=True)
os._exit(0)
"""


class Cluster:
    """A Ray cluster of several nodes on this machine, in its own process, since Ray may end the process that it runs in."""

    def __init__(self, cpus: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.address = self._process.stdout.readline().strip()

    def __enter__(self):
        return self

    def tell(self, words: str) -> bool:
        """Send a command: `add CPUS`, `kill NODE` (0 is the head), `pretend VERSION`, or `lose PID`, which kills the node of that
        worker and returns whether it did; it never kills the head."""
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip() == "done"

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="module")
def small_cluster():
    with Cluster(2) as cluster:
        yield cluster


def refused(capsys, *more):
    """Run a study on Ray that must be refused soon and before anything is written; its message of one sentence."""
    before, start = snapshot(Path.cwd()), time.monotonic()
    told = refuse(capsys, "study", "small.toml", "--engine", "ray", *more)
    assert time.monotonic() - start < SOON
    assert snapshot(Path.cwd()) == before
    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "localhost"], "--address must be auto or HOST:PORT of a Ray cluster's head node, but got 'localhost'."),
        (["--address", "ray://head:10001"], "--address must be auto or HOST:PORT of a Ray cluster's head node, but got 'ray://head"),
        (["--address", "127.0.0.1:1"], "A Ray cluster must listen at --address 127.0.0.1:1, but none does: [Errno 111]"),
        (["--gpus-per-trial", "1"], "A node must have room for a trial of --cpus-per-trial 1 and --gpus-per-trial 1, but the most that"),
        (["--workers", "0"], "--workers must be at least 1 on Ray, but got 0."),
        (["--cpus-per-trial", "0"], "--cpus-per-trial must be at least 1, but got 0."),
        (["--gpus-per-trial", "1.5"], "--gpus-per-trial must be whole or a fraction of one, but got 1.5."),
        (["--device", "cuda"], "--gpus-per-trial must be above 0 for --device cuda on Ray, but got 0."),
        (["--gpus-per-trial", "1", "--device", "cpu"], "--gpus-per-trial must be 0 for --device cpu, but got 1."),
        (["--engine", "local", "--address", "auto"], "--address, --cpus-per-trial and --gpus-per-trial are for --engine ray, but the"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(study_file, capsys, arguments, message):
    assert refused(capsys, *arguments).startswith(message)


@pytest.mark.slow
def test_no_ray_on_this_machine(study_file, capsys, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(Path.cwd()))  # where Ray looks for running clusters
    told = refused(capsys, "--address", "auto")
    assert told.startswith("A Ray cluster must listen at --address auto, but none does: Could not find any running Ray")


@pytest.mark.slow
def test_something_else_listens(study_file, capsys, monkeypatch):
    """Ray itself would wait for an answer without a bound."""
    monkeypatch.setattr(ray, "CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = refused(capsys, "--address", address)
    assert told.startswith(f"The Ray cluster at {address} must answer within 1 s, but does not; check with `ray status`")


@pytest.mark.slow
def test_a_trial_that_no_node_holds(study_file, capsys, small_cluster):
    told = refused(capsys, "--address", small_cluster.address, "--cpus-per-trial", "3")
    assert told == (
        "A node must have room for a trial of --cpus-per-trial 3 and --gpus-per-trial 0, but the most that a node of the cluster has is 2 "
        "CPUs and 0 GPUs."
    )


@pytest.mark.slow
def test_another_version(study_file, capsys):
    with Cluster(1) as cluster:
        cluster.tell("pretend 2.0.0")
        told = refused(capsys, "--address", cluster.address)
    assert re.search(
        r"Driver and cluster must have the same versions of Ray and Python, but .* Ray: 2\.0\.0 .*; install the", told
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_model_that_cannot_be_pickled(study_file, capsys, engine):
    told = refused(capsys, "--engine", engine, "--set", "task.model=tests.nets:unpicklable")
    assert told.startswith("Model, data, loss and score must be picklable to reach the workers, but are not (cannot pickle")


def slow(job):
    """A learning curve of three points, half a second in all. The first score is the worker's process id."""
    yield CurvePoint(0, float(os.getpid()))
    for epoch in (1, 2):
        time.sleep(0.25)
        yield CurvePoint(epoch, job.seed / 100)
    yield Result(Outcome.DONE, (CurvePoint(2, job.seed / 100),))


@pytest.mark.slow
def test_thirty_trials_on_three_nodes_two_of_which_are_lost():
    """A worker and a whole node are killed: every trial is completed once, with the plans of an undisturbed run."""
    quiet, torn = Books(), Books()
    quiet.run(30)
    ledger, answers, lost, node_lost = torn.ledger(), [], [], False
    with Cluster(2) as cluster:
        cluster.tell("add 2")
        cluster.tell("add 2")
        with ray.engine(ray.Cluster(cluster.address)) as engine:
            assert engine.description == "Ray on 3 nodes, 6 trials at a time, 1 CPU each"

            def on_message(job, message):
                nonlocal node_lost
                if isinstance(message, Result):
                    found = ledger.receive(job, message)
                    (lost if found.outcome is Outcome.WORKER_LOST else answers).append(found)
                elif message.epochs == 0 and len(answers) >= 6 and not lost:
                    os.kill(int(message.score), signal.SIGKILL)
                elif message.epochs == 0 and len(answers) >= 12 and not node_lost:
                    node_lost = cluster.tell(f"lose {message.score:.0f}")

            while ledger.finished() < 30:
                engine.run(ledger.jobs(30), slow, on_message=on_message, should_stop=lambda: False)
    assert node_lost
    assert 1 < len(lost) <= 5, "the killed worker's trial, and those of the node"
    assert sorted(((record.index, record.plan) for record in answers), key=itemgetter(0)) == [
        (r.index, r.plan) for r in quiet.trained
    ]
    states = [trial.state.name for trial in torn.study.get_trials()]
    assert states.count("FAIL") == len(lost)
    assert not {"RUNNING", "WAITING"} & set(states)


@pytest.mark.slow
def test_a_node_that_joins_is_used():
    with Cluster(1) as cluster, ray.engine(ray.Cluster(cluster.address)) as engine:
        running, most = set(), []

        def on_message(job, message):
            (running.discard if isinstance(message, Result) else running.add)(job.key)
            most.append(len(running))
            if isinstance(message, Result) and job.key == 0:
                cluster.tell("add 2")

        jobs = (Job(key, Plan(), seed=key) for key in itertools.takewhile(lambda key: max(most, default=0) < 3, range(300)))
        engine.run(jobs, slow, on_message=on_message, should_stop=lambda: False)
    assert most[0] == 1
    assert max(most) == 3


@pytest.mark.slow
def test_a_head_that_is_gone_ends_the_study_in_one_sentence(bare, study_file, capsys, monkeypatch):
    """Finished trials are in the record, and the same command resumes."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    before, killed = Lines.trial, []
    with Cluster(2) as cluster:

        def kill(self, record, trials):
            before(self, record, trials)
            if len(trials) == 3 and not killed:
                killed.append(cluster.tell("kill 0"))

        monkeypatch.setattr(Lines, "trial", kill)
        told = refuse(capsys, "study", "small.toml", "--engine", "ray", "--address", cluster.address)
    assert told == (
        f"The Ray cluster at {cluster.address} must stay up while a study runs, but the connection to it was lost; all finished "
        "work is saved: run the same command again once the cluster is back."
    )
    assert main(["study", "small.toml", "--workers", "0"]) == 0
    assert "3 of them done by an earlier run" in capsys.readouterr().out
    assert sorted(trial.index for trial in read_trials(stored(Path("runs/small")))) == list(range(8))


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_by_the_same_command(study_file, tmp_path, small_cluster):
    """The driver is killed at random times while the cluster stays: exactly the requested trials, and every record is readable."""
    moments = random.Random(0)
    code = "import sys; from ranksearch.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["study", "small.toml", "--engine", "ray", "--address", small_cluster.address, "--trials", "20"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for seconds in [*(moments.uniform(6, 12) for _ in range(KILLS)), None]:
        process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    out = tmp_path / "runs" / "small"
    trained = [trial for trial in read_trials(stored(out)) if trial.trained]
    assert len(trained) == 20
    assert len({trial.index for trial in trained}) == 20
    assert not {"RUNNING", "WAITING"} & {trial.state.name for trial in stored(out).trials}
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_both_engines_give_the_same_records(bare, finished, tmp_path):
    """Probes, trials and finalists of a whole study have equal scores."""
    record = run_study(small_spec(), tmp_path / "small", Options(Ray(workers=1)))
    assert essence(record.trials) == essence(finished[1].trials)


def refused_by_a_node(evaluate):
    with pytest.raises(ModelError) as caught:
        next(ray_process._unpacked(evaluate)(Job(0, Plan(), seed=0)))
    return str(caught.value)


def test_a_node_that_cannot_load_the_model():
    lacks = refused_by_a_node(b"cpackage_of_the_user\nnet\n.")  # the pickle of a function, by its module and name
    assert re.match(
        r"Every worker must be able to load the model and the data, but the node \S+ cannot \(ModuleNotFoundError: No module "
        r"named 'package_of_the_user'\); fix this, or install the missing package there",
        lacks,
    )
    raises = refused_by_a_node(pickle.dumps(REFUSED))
    assert re.search(r"the node \S+ cannot \(ValueError: no weights here, in .*test_engines\.py line \d+\); fix this", raises)


class Ended:
    """A stand-in for a trial of Tune whose actor ended with an error."""

    trial_id = "1"

    def __init__(self, path, error):
        self.pickled_error_file = str(path / "error.pkl") if error else None
        if error:
            (path / "error.pkl").write_bytes(pickle.dumps(error))


PAGE = """The actor died because of an error raised in its creation task, ray::ResourceTrainable.__init__() (pid=7, ip=10.0.0.7)
RuntimeError: The actor with name ResourceTrainable failed to import on the worker.

ray::ResourceTrainable.__init__() (pid=7, ip=10.0.0.7, actor_id=1)
ModuleNotFoundError: No module named 'ranksearch'
"""


def test_a_node_that_lacks_this_package_is_refused_and_a_killed_worker_is_lost(tmp_path):
    """With the error text of Ray 2.60 on a node whose workers cannot import ranksearch."""
    here, there = Pipe()
    board = ray_process._RunningJobs(there)
    scheduler = ray_process._Scheduler(board)
    for error in (RayActorError(error_msg=PAGE, actor_init_failed=True), RayActorError(error_msg="killed"), None):
        here.send(ray.SealedJob(5, b""))
        board.draw("1")
        scheduler.on_trial_error(None, Ended(tmp_path, error))
        assert isinstance(here.recv(), ray.WorkerFree)
        said = here.recv()
        assert said.key == 5
        if error and error.actor_init_failed:
            assert str(said.message.error).startswith(
                "Every worker must be able to load the model and the data, but the node 10.0.0.7 cannot (ModuleNotFoundError: No "
                "module named 'ranksearch'); fix this, or install the missing package there, or run"
            )
        else:
            assert said.message == Result(Outcome.WORKER_LOST)


@pytest.mark.parametrize(
    ("gpus", "each", "trials"), [(1, 0.1, 10), (1, 0.3, 3), (2, 0.6, 2), (2, 0.5, 4), (4, 1, 4), (5, 2, 2), (0, 0.5, 0)]
)
def test_a_trial_lies_on_one_gpu_or_on_whole_ones(monkeypatch, gpus, each, trials):
    node = {"Alive": True, "Resources": {"CPU": 64, "GPU": gpus}}
    monkeypatch.setattr(ray_process.ray, "nodes", lambda: [node])
    assert ray_process._slots(ray.Cluster("head:6379", cpus=2, gpus=each)) == trials


def test_a_cluster_without_nodes_is_waited_for_and_given_up(monkeypatch):
    clock, nodes = iter(range(0, 1000, 50)), iter([1, 0, 0, 2, 0, 0, 0])
    monkeypatch.setattr(ray_process, "_slots", lambda cluster: next(nodes))
    monkeypatch.setattr(ray_process.time, "monotonic", lambda: float(next(clock)))
    searcher = ray_process._Searcher(ray_process._RunningJobs(None), ray.Cluster("head:6379"))
    assert [searcher._places() for _ in range(6)] == [1, 0, 0, 2, 0, 0]
    words = r"The Ray cluster at head:6379 must have a node that can run a trial, but has had none for 120 s; run the same"
    with pytest.raises(StudyError, match=words):
        searcher._places()
