"""The contract of an engine: every job gets one result, whatever happens to its worker."""

from __future__ import annotations

import os
import pickle
import signal
from contextlib import ExitStack

import pytest

from ranksearch.engines import processes, ray
from ranksearch.errors import PlanError, StudyError
from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Result, Stage
from tests.engines.jobs import (
    Raises,
    Work,
    answers,
    assert_ended,
    collect,
    dies,
    echo,
    its_process,
    its_workers,
    jobs,
    long,
    perform,
)


@pytest.fixture(scope="module")
def kept():
    """A function that returns the engine of a kind, made once for all tests. Local ones survive a bug in a job."""
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


@ALL
def test_every_job_has_one_result_after_its_learning_curve(engine):
    found = collect(5, engine)
    assert answers(found) == [(key, "DONE", (CurvePoint(0, key), CurvePoint(1, 2.0 * key))) for key in range(5)]
    for key in range(5):
        assert [type(message) for k, message in found if k == key] == [CurvePoint, Result]


@ALL
def test_a_job_arrives_whole(engine):
    sent = Work(3, Plan(), seed=7, stage=Stage.CONTROL, share=0.25, act=echo)
    arrived = []
    engine.run(iter([sent]), perform, on_message=lambda job, message: arrived.append(message), should_stop=lambda: False)
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

    engine.run(lazily(), perform, on_message=on_message, should_stop=lambda: False)
    assert drawn == list(range(6))
    assert max(most) == 2


@engines(2, "ray")
def test_a_dead_worker_loses_its_job_and_no_other(engine):
    found = answers(collect(4, engine, {1: dies}))
    assert [(key, outcome) for key, outcome, _ in found] == [(0, "DONE"), (1, "WORKER_LOST"), (2, "DONE"), (3, "DONE")]


@engines(1)
def test_a_worker_that_is_killed_in_the_midst_of_a_job_loses_it_alone(engine):
    found = []

    def on_message(job, message):
        found.append((job.key, message))
        if isinstance(message, CurvePoint) and job.key == 1:
            os.kill(int(message.score), signal.SIGKILL)

    engine.run(jobs(3, {1: long}), perform, on_message=on_message, should_stop=lambda: False)
    assert [outcome for _, outcome, _ in answers(found)] == ["DONE", "WORKER_LOST", "DONE"]


def always():
    while True:
        yield Work(0, Plan(), seed=7, act=dies)


@engines(1, fast=())
def test_workers_that_keep_dying_end_the_run(engine, monkeypatch):
    monkeypatch.setattr("ranksearch.engines.base.MAX_LOST", 2)
    words = r"Workers must survive their trials, but 2 in a row died .*last exit code -9.*--workers 0"
    with pytest.raises(StudyError, match=words):
        engine.run(always(), perform, on_message=lambda job, m: None, should_stop=lambda: False)


@engines(0, 1)
@pytest.mark.parametrize(
    "error", [PlanError("no such layer"), EOFError("data.bin ends too soon"), BrokenPipeError("the loader's")], ids=repr
)
def test_a_bug_is_raised_where_the_user_sees_it(engine, error):
    """Even one that looks like a lost driver. One of a worker carries the worker's traceback."""
    with pytest.raises(type(error), match=str(error)) as caught:
        collect(4, engine, {2: Raises(error)})
    cause = str(caught.value.__cause__)
    assert ("in a worker" in cause and "__call__" in cause) == (engine.description != "in one process")


@engines(2)
def test_a_bug_in_the_driver_ends_its_workers(engine):
    pids = its_workers(engine)

    def on_message(job, message):
        raise PlanError("in the driver")

    with pytest.raises(PlanError, match="in the driver"):
        engine.run(jobs(2), perform, on_message=on_message, should_stop=lambda: False)
    assert_ended(pids)


@engines(0, 1, "ray")
def test_nothing_is_drawn_after_the_stop(engine):
    done = []

    def on_message(job, message):
        if isinstance(message, Result):
            done.append(job.key)

    engine.run(jobs(50), perform, on_message=on_message, should_stop=lambda: len(done) >= 3)
    assert sorted(done)[:3] == [0, 1, 2]
    assert len(done) <= 4, "with two workers one more job may have been running"


@engines(1, "ray")
def test_workers_stay_warm_from_run_to_run(engine):
    """On Ray at least one of them, since Tune keeps one idle worker between two runs."""
    acts = dict.fromkeys(range(4), its_process)
    first, second = ({m.score for _, m in collect(4, engine, acts) if isinstance(m, CurvePoint)} for _ in range(2))
    assert first & second


@engines("ray")
def test_a_bug_on_ray_carries_its_traceback(engine):
    """The last test on Ray, whose engine a bug ends."""
    with pytest.raises(PlanError, match="no such layer") as caught:
        collect(1, engine, {0: Raises(PlanError("no such layer"))})
    assert "in a worker" in str(caught.value.__cause__)
    assert "__call__" in str(caught.value.__cause__)
