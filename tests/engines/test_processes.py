"""Local processes: what they can load, how they end, and how many threads they have."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types

import pytest

from ranksearch.engines import processes
from ranksearch.errors import ModelError
from tests import ROOT
from tests.engines.jobs import REFUSED, Loads, answers, assert_ended, collect, its_workers, kill_me, perform


def refused_by_a_worker(work, capfd, workers=1):
    with processes.engine(workers) as engine, pytest.raises(ModelError) as caught:
        collect(3, engine, work=work)
    assert capfd.readouterr() == ("", "")
    return str(caught.value)


@pytest.mark.slow
def test_what_no_worker_can_load_is_refused_in_a_sentence(capfd):
    assert re.fullmatch(
        r"Every worker must be able to load the model and the data, but a worker process cannot \(ValueError: no weights here, in "
        r".*jobs\.py line \d+\); fix this, or install the missing package there, or run without workers by "
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
    told = refused_by_a_worker(perform, capfd, workers=2)
    assert f"cannot (OSError: libtorch.so: cannot open shared object file, in {tmp_path}/torch.py line 1); fix this" in told


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_loads_is_lost(capfd):
    with processes.engine(1) as engine:
        found = collect(1, engine, work=Loads(kill_me))
    assert answers(found) == [(0, "WORKER_LOST", ())]
    assert capfd.readouterr() == ("", "")


SCRIPT = """
from ranksearch.engines import processes
from ranksearch.results.messages import CurvePoint, Outcome, Result
from tests.engines.jobs import answers, collect

def evaluate(job):
    yield CurvePoint(0, offset + job.seed)
    yield Result(Outcome.DONE, (CurvePoint(0, offset + job.seed),))

offset = 3.0
with processes.engine(1) as engine:
    print(answers(collect(2, engine, work=evaluate)))
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


DRIVER = """
import os, signal, sys
from ranksearch.engines import processes
from tests.engines.jobs import jobs, long, perform

def on_message(job, message):
    if job.key == 1:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with processes.engine(1) as engine:
        engine.run(jobs(2, {1: long}), perform, on_message=on_message, should_stop=lambda: False)
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


@pytest.mark.slow
def test_no_worker_outlives_the_engine():
    with processes.engine(2) as engine:
        pids = its_workers(engine)
    assert_ended(pids)


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
