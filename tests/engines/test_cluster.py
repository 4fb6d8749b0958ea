"""Ray as a user sees it: bad input is refused soon in one sentence; nodes are lost; the driver is killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path

import pytest

from ranksearch.cli import main
from ranksearch.console import Lines
from ranksearch.engines import ray
from ranksearch.results.attributes import read_study, read_trials
from ranksearch.results.messages import CurvePoint, Outcome, Result
from tests import ROOT
from tests.books import Books
from tests.conftest import essence, finished_trials, refuse, snapshot, stored, wait_for

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
def started():
    """A stack that ends the clusters of this file, and the one that is up now, if any."""
    with ExitStack() as stack:
        yield stack, []


@pytest.fixture
def cluster(started):
    """A cluster whose head has one CPU, shared by the tests until one of them kills the head."""
    stack, up = started
    if not up:
        up.append(stack.enter_context(Cluster(1)))
    return up[0]


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
@pytest.mark.parametrize(("cpus", "gpus"), [(3, 0), (1, 1)])
def test_a_trial_that_no_node_holds(study_file, capsys, cluster, cpus, gpus):
    told = refused(capsys, "--address", cluster.address, "--cpus-per-trial", cpus, "--gpus-per-trial", gpus)
    assert told == (
        f"A node must have room for a trial of --cpus-per-trial {cpus} and --gpus-per-trial {gpus}, but the most that a node of the "
        "cluster has is 1 CPUs and 0 GPUs."
    )


@pytest.mark.slow
def test_another_version(study_file, capsys, cluster):
    cluster.tell("pretend 2.0.0")
    told = refused(capsys, "--address", cluster.address)
    cluster.tell(f"pretend {version('ray')}")
    assert re.search(
        r"Driver and cluster must have the same versions of Ray and Python, but .* Ray: 2\.0\.0 .*; install the", told
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_model_that_cannot_be_pickled(study_file, capsys, engine):
    told = refused(capsys, "--engine", engine, "--set", "task.model=tests.nets:unpicklable")
    assert told.startswith("Model, data, loss and score must be picklable to reach the workers, but are not (cannot pickle")


@dataclass(frozen=True)
class Gated:
    """A learning curve of three points. The first score is the worker's process id; the rest waits while there is no file `gate`."""

    gate: Path

    def __call__(self, job):
        yield CurvePoint(0, float(os.getpid()))
        for epoch in (1, 2):
            time.sleep(0.1)
            while not self.gate.exists():
                time.sleep(0.05)
            yield CurvePoint(epoch, job.seed / 100)
        yield Result(Outcome.DONE, (CurvePoint(2, job.seed / 100),))


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_its_loss_costs_no_trial(cluster, tmp_path):
    """Jobs wait until the new node takes some. Then a worker is killed, and the node, once it takes jobs again: every trial is
    completed once, with the plans of an undisturbed run."""
    quiet, torn = Books(), Books()
    quiet.run(20)
    ledger, running, most, answers, lost, killed, node_lost = torn.ledger(), {}, [], [], [], 0, False
    gate = tmp_path / "gate"
    with ray.engine(ray.Cluster(cluster.address)) as engine:
        assert engine.description == "Ray on 1 node, 1 trials at a time, 1 CPU each"

        def on_message(job, message):
            nonlocal killed, node_lost
            if isinstance(message, Result):
                running.pop(job.key, None)
                found = ledger.receive(job, message)
                (lost if found.outcome is Outcome.WORKER_LOST else answers).append(found)
            elif message.epochs == 0:
                running[job.key] = int(message.score)
                if len(answers) >= 4 and not killed:
                    killed = running[job.key]
                    os.kill(killed, signal.SIGKILL)
            if not most:
                cluster.tell("add 2")
            elif len(running) == 3 > max(most):
                gate.touch()
            most.append(len(running))
            if len(answers) >= 8 and killed and not node_lost:
                gate.unlink(missing_ok=True)
                node_lost = any(cluster.tell(f"lose {pid}") for pid in running.values() if pid != killed)
                if node_lost:
                    gate.touch()

        while ledger.finished() < 20:
            engine.run(ledger.jobs(20), Gated(gate), on_message=on_message, should_stop=lambda: False)
    assert most[0] == 1
    assert max(most) == 3
    assert node_lost
    assert 1 < len(lost) <= 5, "the killed worker's trial, and those of the node"
    assert sorted(((record.index, record.plan) for record in answers), key=itemgetter(0)) == [
        (r.index, r.plan) for r in quiet.trained
    ]
    states = [trial.state.name for trial in torn.study.get_trials()]
    assert states.count("FAIL") == len(lost)
    assert not {"RUNNING", "WAITING"} & set(states)


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_and_gives_the_record_of_one_process(bare, finished, study_file, cluster):
    """The driver is killed in the midst of the trials while the cluster stays. Probes, trials and finalists have equal scores."""
    out = Path("runs/small")
    code = "import sys; from ranksearch.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["study", "small.toml", "--engine", "ray", "--address", cluster.address, "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: finished_trials(out) >= 3, process)
        process.kill()
    trained = {trial.index for trial in read_trials(stored(out)) if trial.trained}
    assert 3 <= len(trained) < 8
    assert main(words) == 0
    assert essence(read_study(stored(out)).trials) == essence(finished[1].trials)
    assert not {"RUNNING", "WAITING"} & {trial.state.name for trial in stored(out).trials}


@pytest.mark.slow
def test_a_head_that_is_gone_ends_the_study_in_one_sentence(bare, study_file, capsys, monkeypatch, cluster, started):
    """Finished trials are in the record, and the same command resumes."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    before = Lines.trial

    def kill(self, record, trials):
        before(self, record, trials)
        if len(trials) == 3 and cluster in started[1]:
            started[1].remove(cluster)
            cluster.tell("kill 0")

    monkeypatch.setattr(Lines, "trial", kill)
    told = refuse(capsys, "study", "small.toml", "--engine", "ray", "--address", cluster.address, "--workers", "1")
    assert told == (
        f"The Ray cluster at {cluster.address} must stay up while a study runs, but the connection to it was lost; all finished "
        "work is saved: run the same command again once the cluster is back."
    )
    assert main(["study", "small.toml", "--workers", "0"]) == 0
    assert "3 of them done by an earlier run" in capsys.readouterr().out
    assert sorted(trial.index for trial in read_trials(stored(Path("runs/small")))) == list(range(8))
