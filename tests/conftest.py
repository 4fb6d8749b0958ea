"""Shared fixtures: a small trained task, one small finished study; and a check of commands that must be refused."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import register_random
from xdist.scheduler import LoadFileScheduling

from ranksearch.cli import main
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.data import example
from ranksearch.errors import StudyError
from ranksearch.latency import runtimes, timing
from ranksearch.plan import CP, SVD, Plan, Tucker2
from ranksearch.results.attributes import read_trials
from ranksearch.results.messages import Outcome
from ranksearch.spec import Finalists, Recipe
from ranksearch.strategy.space import make_space
from ranksearch.study import folder
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from ranksearch.study_file import parse_spec
from ranksearch.task import training
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import Task
from tests import nets

RAY_FILES = ("tests/engines/test_cluster.py", "tests/engines/test_engines.py")
"""The files that start Ray. They must not run at once, since `--address auto` finds any Ray on this machine."""


class RayInOneProcess(LoadFileScheduling):
    """A process of pytest-xdist runs a file at a time; one of them runs all files that start Ray."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return RAY_FILES[0] if file in RAY_FILES else file


def pytest_xdist_make_scheduler(config, log):
    return RayInOneProcess(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    """The files that start Ray come first, since they take longest, then those with the most slow tests: so all processes end at
    about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (not item.nodeid.startswith(RAY_FILES), -slow[item.path]))


class TorchRandom:
    """torch's global generator with the interface that hypothesis needs to seed it before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # kept here, since hypothesis holds only a weak reference
register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _seeded():
    """Seed torch, so that no test depends on the tests before it."""
    torch.manual_seed(0)


PLAN = Plan.of({"conv1": CP(2), "conv2": Tucker2(4, 5), "fc1": SVD(6)})
"""A plan of the small net."""


@pytest.fixture(autouse=True)
def quick_timing(request, monkeypatch):
    """Finalists are timed in one short round, where times are not what is tested."""
    if "latency" not in request.node.path.parts:
        time_once(monkeypatch)


def small_spec(*overrides):
    """The small study of `tests.nets`, with overrides."""
    return parse_spec(nets.SMALL, source="small.toml", overrides=overrides)


def tiny_spec(*overrides):
    """The small study with next to no training, for tests in which scores do not matter."""
    return small_spec("dense.epochs=1", "search.trials=1", "finalists.count=1", *overrides)


def least_spec(*overrides):
    """The tiny study of one layer, for tests of what becomes of its files."""
    return tiny_spec("space.layers=['fc2']", *overrides)


def essence(trials):
    """The parts of trials that an interruption must not change: all but seconds, latency and Optuna's numbers."""
    return [
        (
            trial.index, trial.origin, trial.plan, trial.outcome, trial.params, trial.macs, trial.score, trial.curve, trial.seed,
            trial.finalist and (trial.finalist.score_validation, trial.finalist.score_test, trial.finalist.curve),
        )
        for trial in trials
        if trial.outcome is not Outcome.WORKER_LOST
    ]  # fmt: skip


def stored(out):
    return folder.open_study("small", folder.storage_url(out, None))


def finished_trials(out):
    """How many trials the record of a study that runs in another process holds now."""
    # Wait for the weights, which come after the tables: two processes must not make the tables at once.
    if not (out / "dense.safetensors").exists():
        return 0
    try:
        return len(read_trials(stored(out)))
    except StudyError:
        return 0  # not made yet, or just being written


def wait_for(condition, process, seconds=120):
    """Wait while another process makes progress."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the study made no progress"
        time.sleep(0.05)


@pytest.fixture
def unreported(monkeypatch):
    """Studies write no report, which would take as long as half a dozen trials; for tests that read only the record."""
    monkeypatch.setattr("ranksearch.study.study.write_report", lambda record, folder: folder / "report.html")


def make_bare(patch):
    """Let studies write no report and time no finalists, which takes as long as a report."""
    patch.setattr("ranksearch.study.study.write_report", lambda record, folder: folder / "report.html")
    patch.setattr("ranksearch.study.study.time_finalists", lambda *args: None)


def time_once(patch):
    """Let studies time their finalists in one short round instead of up to 30 longer ones."""
    patch.setattr(timing, "ROUNDS", 1)
    patch.setattr(timing, "SERIES", 1)
    patch.setattr(runtimes, "MIN_WINDOW_MS", 0.0)


@pytest.fixture
def bare(monkeypatch):
    make_bare(monkeypatch)


@pytest.fixture(scope="session")
def trained() -> Task:
    """The small net, trained for a few epochs; tests copy its model before they change it."""
    torch.manual_seed(0)
    task = Task(nets.small(), nets.few_digits())
    for _ in training.fit(
        task.model, task, training.Recipe(12, batch_size=32, learning_rate=1e-2), seed=0, device=torch.device("cpu")
    ):
        pass
    task.model.eval()
    return task


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, object]:
    """The folder and the record of one finished small study. Tests must not change them."""
    folder = tmp_path_factory.mktemp("finished") / "small"
    with pytest.MonkeyPatch.context() as patch:
        time_once(patch)
        return folder, run_study(small_spec(), folder, Options(Local(0)))


@pytest.fixture(scope="session")
def evaluator(trained):
    """A function that makes evaluators of the trained net, with two epochs for finalists."""
    found = inventory(trained.model, example(trained.data.train))
    space = make_space(found, ("tucker2", "cp", "svd"))
    prepared = profile(trained.model, found, {axis.layer.name: axis.methods for axis in space.axes})

    def make(*, scratch=False, unfinished=None, **finalists):
        longer = Finalists(2, learning_rate=3e-3, **finalists)
        return Evaluator(trained, prepared, Recipe(1), longer, "cpu", scratch=scratch, unfinished=unfinished)

    return make


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(nets.SMALL)
    return path


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def refuse(capsys, *arguments):
    """Run a command that must be refused, and return its message of one sentence."""
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ranksearch: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("ranksearch: ").rstrip("\n")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished study's folder, which a test may change."""
    return shutil.copytree(finished[0], tmp_path / "runs" / "small")
