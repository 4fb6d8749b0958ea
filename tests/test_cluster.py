"""Ray as a user meets it: what is refused, in one sentence and soon; nodes that are lost, a driver that is killed."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranksearch.engines import ray
from tests import nets
from tests.test_cli import refuse, snapshot

SOON = 30
"""Seconds within which bad input must be told."""

CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), "include_dashboard": False})
nodes = [cluster.head_node]
print(cluster.address, flush=True)
for line in sys.stdin:
    match line.split():
        case ["add", cpus]:
            nodes.append(cluster.add_node(num_cpus=int(cpus)))
        case ["kill", node]:
            for processes in nodes[int(node)].all_processes.values():
                for about in processes:
                    about.process.kill()
        case ["pretend", version]:
            import json
            from ray._raylet import GcsClient
            about = GcsClient(address=cluster.address)
            kept = json.loads(about.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster"))
            kept = json.dumps(kept | {"ray_version": version}).encode()
            about.internal_kv_put(b"CLUSTER_METADATA", kept, overwrite=True, namespace=b"cluster")
    print("done", flush=True)
os._exit(0)
"""


class Cluster:
    """A Ray cluster of several nodes on this machine, in a process of its own, where Ray may die as it likes."""

    def __init__(self, cpus: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.address = self._process.stdout.readline().strip()

    def __enter__(self):
        return self

    def tell(self, words: str) -> None:
        """`add CPUS`, `kill NODE` (0 is the head), `pretend VERSION`."""
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "done"

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(nets.SMALL)
    return path


@pytest.fixture(scope="module")
def small_cluster():
    with Cluster(2) as cluster:
        yield cluster


def refused(capsys, *more):
    """The one sentence that a study on Ray is refused with, soon and before anything is written."""
    before, start = snapshot(Path.cwd()), time.monotonic()
    told = refuse(capsys, "study", "small.toml", "--engine", "ray", *more)
    assert time.monotonic() - start < SOON
    assert snapshot(Path.cwd()) == before
    return told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "localhost"], "--address must be auto or HOST:PORT of a Ray cluster's head node, but got 'localhost'."),
        (["--address", "ray://head:10001"], "--address must be auto or HOST:PORT of a Ray cluster's head node, but got 'ray://head"),
        (["--address", "127.0.0.1:1"], "A Ray cluster must listen at --address 127.0.0.1:1, but none does: [Errno 111]"),
        (["--gpus-per-trial", "1"], "A node must hold a trial of --cpus-per-trial 1 and --gpus-per-trial 1, but the most that a node"),
        (["--workers", "0"], "--workers must be at least 1 for --engine ray, but got 0."),
        (["--cpus-per-trial", "0"], "--cpus-per-trial must be at least 1, but got 0."),
        (["--gpus-per-trial", "1.5"], "--gpus-per-trial must be whole or a fraction of one, but got 1.5."),
        (["--gpus-per-trial", "1", "--device", "cpu"], "--gpus-per-trial must be 0 for --device cpu, but got 1."),
        (["--engine", "local", "--address", "auto"], "--address, --cpus-per-trial and --gpus-per-trial are for --engine ray, but the"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(study_file, capsys, arguments, message):
    assert refused(capsys, *arguments).startswith(message)


def test_no_ray_on_this_machine(study_file, capsys, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(Path.cwd()))  # where Ray looks for what runs
    told = refused(capsys, "--address", "auto")
    assert told.startswith("A Ray cluster must listen at --address auto, but none does: Could not find any running Ray")


def test_something_else_listens(study_file, capsys, monkeypatch):
    """Ray would wait for it; the driver does not."""
    monkeypatch.setattr(ray, "CONNECT_SECONDS", 5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = refused(capsys, "--address", address)
    assert told.startswith(f"The Ray cluster at {address} must answer within 5 s, but does not; `ray status`")


def test_a_trial_that_no_node_holds(study_file, capsys, small_cluster):
    told = refused(capsys, "--address", small_cluster.address, "--cpus-per-trial", "3")
    assert told == (
        "A node must hold a trial of --cpus-per-trial 3 and --gpus-per-trial 0, but the most that a node of the cluster has is 2 "
        "CPUs and 0 GPUs."
    )


def test_another_version(study_file, capsys):
    with Cluster(1) as cluster:
        cluster.tell("pretend 2.0.0")
        told = refused(capsys, "--address", cluster.address)
    assert re.search(
        r"Driver and cluster must have the same versions of Ray and Python, but .* Ray: 2\.0\.0 .*; install the", told
    )


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_model_that_cannot_be_pickled(study_file, capsys, engine):
    told = refused(capsys, "--engine", engine, "--set", "task.model=tests.nets:unpicklable")
    assert told.startswith("Model, data, loss and score must be picklable to reach the workers, but are not (cannot pickle")
