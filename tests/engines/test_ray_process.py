"""The process that runs Ray, without a cluster: places for trials, and errors of nodes."""

from __future__ import annotations

import pickle
import re
from multiprocessing import Pipe

import pytest

from ranksearch.engines import ray
from ranksearch.errors import ModelError, StudyError
from ranksearch.plan import Plan
from ranksearch.results.messages import Job, Outcome, Result
from tests.engines.jobs import REFUSED


@pytest.fixture(scope="module")
def ray_process():
    """The module, imported here: Ray takes seconds, which only one of pytest's processes should spend."""
    from ranksearch.engines import ray_process

    return ray_process


def refused_by_a_node(evaluate, ray_process):
    with pytest.raises(ModelError) as caught:
        next(ray_process._unpacked(evaluate)(Job(0, Plan(), seed=0)))
    return str(caught.value)


def test_a_node_that_cannot_load_the_model(ray_process):
    lacks = refused_by_a_node(b"cpackage_of_the_user\nnet\n.", ray_process)  # the pickle of a function, by its module and name
    assert re.match(
        r"Every worker must be able to load the model and the data, but the node \S+ cannot \(ModuleNotFoundError: No module "
        r"named 'package_of_the_user'\); fix this, or install the missing package there",
        lacks,
    )
    raises = refused_by_a_node(pickle.dumps(REFUSED), ray_process)
    assert re.search(r"the node \S+ cannot \(ValueError: no weights here, in .*jobs\.py line \d+\); fix this", raises)


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


def test_a_node_that_lacks_this_package_is_refused_and_a_killed_worker_is_lost(ray_process, tmp_path):
    """With the error text of Ray 2.60 on a node whose workers cannot import ranksearch."""
    from ray.exceptions import RayActorError

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
def test_a_trial_lies_on_one_gpu_or_on_whole_ones(ray_process, monkeypatch, gpus, each, trials):
    node = {"Alive": True, "Resources": {"CPU": 64, "GPU": gpus}}
    monkeypatch.setattr(ray_process.ray, "nodes", lambda: [node])
    assert ray_process._slots(ray.Cluster("head:6379", cpus=2, gpus=each)) == trials


def test_a_cluster_without_nodes_is_waited_for_and_given_up(ray_process, monkeypatch):
    clock, nodes = iter(range(0, 1000, 50)), iter([1, 0, 0, 2, 0, 0, 0])
    monkeypatch.setattr(ray_process, "_slots", lambda cluster: next(nodes))
    monkeypatch.setattr(ray_process.time, "monotonic", lambda: float(next(clock)))
    searcher = ray_process._Searcher(ray_process._RunningJobs(None), ray.Cluster("head:6379"))
    assert [searcher._places() for _ in range(6)] == [1, 0, 0, 2, 0, 0]
    words = r"The Ray cluster at head:6379 must have a node that can run a trial, but has had none for 120 s; run the same"
    with pytest.raises(StudyError, match=words):
        searcher._places()
