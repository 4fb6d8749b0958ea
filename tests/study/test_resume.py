"""A killed and resumed study equals an uninterrupted one: nothing is lost or half written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
from safetensors.torch import load_file

from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.whitening import inputs_wanted
from ranksearch.console import Silent
from ranksearch.data import example, sample_inputs
from ranksearch.results.attributes import (
    has_facts,
    read_facts,
    read_initial_plans,
    read_probes,
    read_study,
    read_trials,
    write_finalist,
)
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import CurvePoint, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import DEFAULT_STANDARD_ERROR
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.prior import vbmf_plans
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.space import make_space
from ranksearch.study.options import Local, Options
from ranksearch.study.study import Stopped, run_study
from tests import ROOT, nets
from tests.conftest import essence, finished_trials, small_spec, stored, tiny_spec, wait_for


@pytest.mark.slow
def test_resumed_equals_uninterrupted(bare, finished, tmp_path):
    """Stop after the first trial and before each that is chosen in another way, then resume by the same command."""
    _, whole = finished
    out, origins = tmp_path / "small", [trial.origin for trial in whole.trials]
    stops = {1, *map(origins.index, origins)} - {0}
    assert len(stops) > 3
    for trials in (*sorted(stops), 8):
        record = run_study(small_spec(f"search.trials={trials}", "finalists.count=1"), out, Options(Local(0)))
    searched = [replace(trial, finalist=None) for trial in record.trials]
    assert essence(searched) == essence(replace(trial, finalist=None) for trial in whole.trials)


@pytest.mark.slow
def test_an_orphan_is_queued_again_in_its_place(bare, finished, tmp_path):
    """SIGKILL leaves a trial that is running in the storage only, with all of its parameters or some."""
    _, whole = finished
    stopped = tmp_path / "small"
    for stop_at in (2, 6):
        run_study(small_spec(f"search.trials={stop_at}", "finalists.count=1"), stopped, Options(Local(0)))
        out = shutil.copytree(stopped, tmp_path / str(stop_at) / "small")
        orphan(out, stop_at)
        record = run_study(small_spec("finalists.count=1"), out, Options(Local(0)))
        assert essence(replace(t, finalist=None) for t in record.trials) == essence(
            replace(t, finalist=None) for t in whole.trials
        )
        states = [trial.state.name for trial in stored(out).trials]
        assert states.count("FAIL") == 1
        assert states.count("COMPLETE") + states.count("PRUNED") == 8
        assert "RUNNING" not in states
        assert "WAITING" not in states


def ledger_of(study, dense=None, cache=None, *, initial_plans=None):
    """A ledger as a run of the small study makes it."""
    data, model, spec = nets.few_digits(), nets.small(), small_spec()
    if dense:
        model.load_state_dict(load_file(dense))
    found = inventory(model, example(data.train))
    space = make_space(found, spec.space.methods)
    inputs = sample_inputs(data.train, inputs_wanted(found.macs), seed=spec.seed)
    layers = profile(model, found, {a.layer.name: a.methods for a in space.axes}, inputs=inputs, cache=cache)
    if initial_plans is None:
        initial_plans = read_initial_plans(study) or list(vbmf_plans(space, layers.vbmf))
    dense_losses, probes = read_probes(study)
    bases = Bases.of(space, found)
    dense_net = read_facts(study).dense if has_facts(study) else None
    score, noise = (dense_net.score_validation, dense_net.standard_error) if dense_net else (0.65, DEFAULT_STANDARD_ERROR)
    return Ledger(
        study, bases, initial_plans, sampler="rank", seed=0, dense_score=score,
        limits=UNLIMITED, objectives=Objectives(dense=found.costs),
        knowledge=Knowledge.of(
            bases, [layers], probes, dense_losses=dense_losses, dense_score=score, noise=noise, limits=UNLIMITED,
            minimize=("params",),
        ),
    )  # fmt: skip


def orphan(out, stop_at):
    """Ask for the next trial as a run does, and tell no result."""
    next(ledger_of(stored(out), out / "dense.safetensors", out / "profile").jobs(stop_at + 1))


def test_a_plan_that_keeps_losing_its_worker_is_given_up():
    ledger = ledger_of(optuna.create_study(directions=["maximize", "maximize"]))
    indices = []
    for job in ledger.jobs(2):
        found = ledger.receive(job, Result(Outcome.WORKER_LOST if len(indices) < 3 else Outcome.DONE, (CurvePoint(0, 0.5),)))
        indices.append(found.index)
    assert indices == [0, 0, 0, 1, 2]


SCRIPT = """
import sys
from pathlib import Path
from ranksearch.study.options import Local, Options
from ranksearch.study.study import Stopped, run_study
from tests.conftest import small_spec
run_study(small_spec("search.trials=9"), Path(sys.argv[1]), Options(Local(2)))
"""


@pytest.mark.slow
def test_sigkill_loses_no_completed_trial(bare, tmp_path):
    """Killed with two trials running."""
    out = tmp_path / "small"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for(lambda: finished_trials(out) >= 3, process)
        process.kill()
    before = essence(read_trials(stored(out)))
    assert 3 <= len(before) < 9
    record = run_study(small_spec("search.trials=9", "finalists.count=1"), out, Options(Local(0))).trials
    now = {trial[0]: trial[:9] for trial in essence(record)}
    assert all(now[trial[0]] == trial[:9] for trial in before)
    indices = [trial.index for trial in record if trial.outcome is not Outcome.WORKER_LOST]
    assert sorted(indices) == list(range(9))


@pytest.mark.slow
def test_a_worker_that_dies_loses_its_trial_and_not_the_study(bare, tmp_path, monkeypatch):
    mark = tmp_path / "deadly"
    monkeypatch.setenv("DEADLY", str(mark))
    spec = tiny_spec("task.model=tests.nets:deadly", "search.trials=4")
    out = tmp_path / "small"
    run_study(replace(spec, search=replace(spec.search, trials=1)), out, Options(Local(0)))
    mark.touch()
    record = run_study(spec, out, Options(Local(1)))
    outcomes = [trial.outcome for trial in record.trials]
    assert outcomes.count(Outcome.WORKER_LOST) == 1
    assert outcomes.count(Outcome.DONE) == 4
    assert sorted(t.index for t in record.trials if t.outcome is Outcome.DONE) == [0, 1, 2, 3]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running(tmp_path, request):
    class Impatient(Silent):
        def trial(self, record, trials):
            if len(trials) == 3:
                raise KeyboardInterrupt

    out = tmp_path / "small"
    with pytest.raises(Stopped) as caught:
        run_study(small_spec(), out, Options(Local(2)), view=Impatient())
    assert len(caught.value.record.trials) == 3
    states = [trial.state.name for trial in stored(out).trials]
    assert "RUNNING" not in states
    assert (out / "report.html").exists()
    request.getfixturevalue("bare")
    record = run_study(small_spec(), out, Options(Local(0)))
    assert sorted(t.index for t in record.trials if t.outcome is Outcome.DONE) == list(range(8))


@pytest.mark.slow
def test_seconds_are_kept_after_each_trial(bare, tmp_path):
    """So a kill does not reset `search.minutes`."""
    out, seen = tmp_path / "small", []

    class Watching(Silent):
        def trial(self, record, trials):
            seen.append(read_study(stored(out)).seconds.get("trials", 0.0))

    run_study(tiny_spec("search.trials=3"), out, Options(Local(0)), view=Watching())
    assert seen[0] == 0
    assert 0 < seen[1] < seen[2]


@pytest.mark.slow
def test_a_trial_that_is_no_longer_a_finalist_needs_no_weights(bare, tmp_path):
    out = tmp_path / "small"
    before = run_study(tiny_spec("search.trials=3", "finalists.count=3"), out, Options(Local(0)))
    shutil.rmtree(out / "models")
    again = run_study(tiny_spec("search.trials=3"), out, Options(Local(0)))
    assert essence(again.trials) == essence(before.trials)
    assert len(list((out / "models").iterdir())) == 1


@pytest.mark.slow
def test_latencies_lost_by_a_kill_are_measured_again(unreported, tmp_path):
    out, spec = tmp_path / "small", tiny_spec("search.trials=2")
    record = run_study(spec, out, Options(Local(0)))
    number = next(trial.number for trial in record.trials if trial.finalist)
    finalist = next(trial.finalist for trial in record.trials if trial.finalist)
    write_finalist(stored(out), number, replace(finalist, timings=()))
    again = run_study(spec, out, Options(Local(0)))
    assert all(trial.finalist.latency_ms > 0 for trial in again.trials if trial.finalist)
