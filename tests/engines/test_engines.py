"""The contract of an engine: every job gets one result, whatever happens to its worker."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ranksearch.engines import processes, ray
from ranksearch.errors import ModelError, PlanError, StudyError
from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result, Stage
from tests import ROOT


@dataclass(frozen=True)
class Work:
    """An evaluation that returns twice the seed. At a given seed it kills its worker (always, or once while the file `mark`
    exists), or raises."""

    dies_at: int = -1
    always: bool = False
    raises_at: int = -1
    error: Exception = PlanError("no such layer")  # noqa: RUF009
    mark: str = ""

    def __call__(self, job):
        yield CurvePoint(0, float(job.seed))
        if job.seed == self.dies_at and (self.always or Path(self.mark).exists()):
            if not self.always:
                Path(self.mark).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if job.seed == self.raises_at:
            raise self.error
        yield Result(Outcome.DONE, (CurvePoint(0, float(job.seed)), CurvePoint(1, 2.0 * job.seed)))


WORK = Work()
"""One value for all tests, since workers stay warm only for the same evaluation."""


def jobs(count):
    return iter([Job(key, Plan(), seed=key) for key in range(count)])


@pytest.fixture(scope="module")
def kept():
    """A function that returns the engine of a kind, made once for all tests; engines with processes survive a bug in a test."""
    with ExitStack() as stack:
        made = {}

        def get(which):
            if which not in made:
                fresh = ray.engine(ray.Cluster(workers=2)) if which == "ray" else processes.engine(which)
                made[which] = stack.enter_context(fresh)
            return made[which]

        yield get


@pytest.fixture
def engine(request, kept):
    """The engine of a test: with a number of local processes, or with two workers on Ray."""
    return kept(request.param)


def engines(*which, fast=(0,)):
    found = [pytest.param(each, marks=() if each in fast else pytest.mark.slow) for each in which]
    return pytest.mark.parametrize("engine", found, indirect=True, ids=str)


ALL = engines(0, 1, 2, "ray", fast=(0, 1))


def collect(work, count, engine, should_stop=lambda: False):
    """Run `count` jobs; every message with the key of its job."""
    found = []

    def on_message(job, message):
        found.append((job.key, message))

    engine.run(jobs(count), work, on_message=on_message, should_stop=should_stop)
    return found


def answers(found):
    return sorted((key, message.outcome.name, message.curve) for key, message in found if isinstance(message, Result))


@ALL
def test_every_job_has_one_result_after_its_learning_curve(engine):
    found = collect(WORK, 5, engine)
    assert answers(found) == [(key, "DONE", (CurvePoint(0, key), CurvePoint(1, 2.0 * key))) for key in range(5)]
    for key in range(5):
        assert [type(message) for k, message in found if k == key] == [CurvePoint, Result]


def echo(job):
    yield Result(Outcome.DONE, weights=pickle.dumps(job))


@ALL
def test_a_job_arrives_whole(engine):
    sent = Job(3, Plan(), seed=7, stage=Stage.CONTROL, share=0.25)
    arrived = []
    engine.run(iter([sent]), echo, on_message=lambda job, message: arrived.append(message), should_stop=lambda: False)
    assert [pickle.loads(message.weights) for message in arrived] == [sent]


@engines(2, "ray")
def test_a_job_is_drawn_only_when_a_worker_is_free(engine):
    drawn, open_jobs, most = [], set(), []

    def lazily():
        for job in jobs(6):
            drawn.append(job.key)
            open_jobs.add(job.key)
            most.append(len(open_jobs))
            yield job

    def on_message(job, message):
        if isinstance(message, Result):
            open_jobs.remove(job.key)

    engine.run(lazily(), WORK, on_message=on_message, should_stop=lambda: False)
    assert drawn == list(range(6))
    assert max(most) == 2


@engines(1, 2, "ray")
def test_a_dead_worker_loses_its_job_and_no_other(engine, tmp_path):
    mark = tmp_path / "mark"
    mark.touch()
    found = answers(collect(Work(dies_at=1, mark=str(mark)), 4, engine))
    assert [(key, outcome) for key, outcome, _ in found] == [(0, "DONE"), (1, "WORKER_LOST"), (2, "DONE"), (3, "DONE")]


def always():
    while True:
        yield Job(0, Plan(), seed=7)


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run(monkeypatch):
    monkeypatch.setattr("ranksearch.engines.base.MAX_LOST", 2)
    words = r"Workers must survive their trials, but 2 in a row died .*last exit code -9.*--workers 0"
    with processes.engine(1) as engine, pytest.raises(StudyError, match=words):
        engine.run(always(), Work(dies_at=7, always=True), on_message=lambda job, m: None, should_stop=lambda: False)


@engines(0, 1)
def test_a_bug_is_raised_where_the_user_sees_it(engine):
    with pytest.raises(PlanError, match="no such layer"):
        collect(Work(raises_at=2), 4, engine)


@engines(0, 1)
@pytest.mark.parametrize("error", [EOFError("data.bin ends too soon"), BrokenPipeError("the loader's"), OSError("no space")])
def test_a_bug_that_looks_like_a_lost_driver_is_raised_too(engine, error):
    with pytest.raises(type(error), match=str(error)):
        collect(Work(raises_at=0, error=error), 2, engine)


def its_process(job):
    """A learning-curve point whose score is the worker's process id, then the result."""
    yield CurvePoint(0, float(os.getpid()))
    yield Result(Outcome.DONE)


def long_second(job):
    """Like `its_process`, but the job of key 1 takes long."""
    yield CurvePoint(0, float(os.getpid()))
    time.sleep(600 if job.key == 1 else 0)
    yield Result(Outcome.DONE)


@engines(1, "ray")
def test_a_worker_that_dies_after_a_curve_point_loses_its_job_alone(engine):
    found = []

    def on_message(job, message):
        found.append((job.key, message))
        if isinstance(message, CurvePoint) and job.key == 1:
            os.kill(int(message.score), signal.SIGKILL)

    engine.run(jobs(3), long_second, on_message=on_message, should_stop=lambda: False)
    assert [outcome for _, outcome, _ in answers(found)] == ["DONE", "WORKER_LOST", "DONE"]


DRIVER = """
import os, signal, sys
from ranksearch.engines import processes, ray
from tests.engines.test_engines import jobs, long_second

def on_message(job, message):
    if job.key == 1:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with processes.engine(1) as engine:
        engine.run(jobs(2), long_second, on_message=on_message, should_stop=lambda: False)
"""


@pytest.mark.slow
def test_a_driver_that_dies_leaves_no_worker_behind(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    # The worker inherits this pipe, so `run` returns only once driver and worker are gone, long before the job would end.
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


def children():
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture
def no_child_more():
    """Assert that the processes that a test starts end soon after it."""
    before = children()
    yield
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() <= before


@pytest.mark.slow
def test_a_bug_in_the_driver_ends_its_workers(no_child_more):
    def on_message(job, message):
        raise PlanError("in the driver")

    with processes.engine(2) as engine, pytest.raises(PlanError, match="in the driver"):
        engine.run(jobs(2), WORK, on_message=on_message, should_stop=lambda: False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: processes.engine(1), lambda: ray.engine(ray.Cluster(workers=1))], ids=["local", "ray"]
)
def test_a_bug_in_a_worker_carries_its_traceback(make):
    with make() as engine, pytest.raises(PlanError, match="no such layer") as caught:
        collect(Work(raises_at=0), 1, engine)
    assert "in a worker" in str(caught.value.__cause__)
    assert "__call__" in str(caught.value.__cause__)


class Loads:
    """A value that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refuse_to_load():
    raise ValueError("no weights here\nand more")


REFUSED = Loads(refuse_to_load)


def refused_by_a_worker(work, capfd):
    with processes.engine(2) as engine, pytest.raises(ModelError) as caught:
        collect(work, 3, engine)
    assert capfd.readouterr() == ("", "")
    return str(caught.value)


@pytest.mark.slow
def test_what_no_worker_can_load_is_refused_in_a_sentence(capfd):
    assert re.fullmatch(
        r"Every worker must be able to load the model and the data, but a worker process cannot \(ValueError: no weights here, in "
        r".*test_engines\.py line \d+\); fix this, or install the missing package there, or run without workers by "
        r"--engine local --workers 0\.",
        refused_by_a_worker(REFUSED, capfd),
    )


@pytest.mark.slow
def test_a_module_that_only_the_driver_has(capfd, monkeypatch):
    module = types.ModuleType("package_of_the_user")
    exec("def evaluate(job): yield", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    told = refused_by_a_worker(module.evaluate, capfd)
    assert "a worker process cannot (ModuleNotFoundError: No module named 'package_of_the_user'); fix this" in told


@pytest.mark.slow
def test_torch_that_a_worker_cannot_import(capfd, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    told = refused_by_a_worker(WORK, capfd)
    assert f"cannot (OSError: libtorch.so: cannot open shared object file, in {tmp_path}/torch.py line 1); fix this" in told


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_loads_is_lost(capfd):
    with processes.engine(1) as engine:
        found = collect(Loads(kill_me), 1, engine)
    assert answers(found) == [(0, "WORKER_LOST", ())]
    assert capfd.readouterr() == ("", "")


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


SCRIPT = """
from ranksearch.engines import processes
from ranksearch.results.messages import CurvePoint, Outcome, Result
from tests.engines.test_engines import answers, collect

def evaluate(job):
    yield CurvePoint(0, offset + job.seed)
    yield Result(Outcome.DONE, (CurvePoint(0, offset + job.seed),))

offset = 3.0
with processes.engine(1) as engine:
    print(answers(collect(evaluate, 2, engine)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["file", "standard input"])
def test_a_script_needs_no_main_guard(tmp_path, by):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "signal.py").write_text("raise AssertionError('a file of the user, not a module of Python')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "script.py").open() as script:
        done = subprocess.run(
            [sys.executable, "-P", tmp_path / "script.py" if by == "file" else "-"],
            stdin=script, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "[(0, 'DONE', (CurvePoint(epochs=0, score=3.0),)), (1, 'DONE', (CurvePoint(epochs=0, score=4.0),))]\n"


@engines(0, 1, "ray")
def test_nothing_is_drawn_after_the_stop(engine):
    done = []

    def on_message(job, message):
        if isinstance(message, Result):
            done.append(job.key)

    engine.run(jobs(50), WORK, on_message=on_message, should_stop=lambda: len(done) >= 3)
    assert sorted(done)[:3] == [0, 1, 2]
    assert len(done) <= 4, "with two workers one more job may have been running"


@engines(1, 2, "ray")
def test_workers_stay_warm_from_run_to_run(engine):
    """On Ray at least one of them, since Tune keeps one idle worker between two runs."""
    first, second = ({m.score for _, m in collect(its_process, 4, engine) if isinstance(m, CurvePoint)} for _ in range(2))
    assert first & second


@pytest.mark.slow
def test_no_worker_outlives_the_engine(no_child_more):
    with processes.engine(2) as engine:
        collect(WORK, 3, engine)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_only_cores_that_this_process_may_use_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert processes.threads_for(1) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_workers_fill_the_cores_with_one_thread_each(monkeypatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 8)
    assert [processes.threads_for(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
