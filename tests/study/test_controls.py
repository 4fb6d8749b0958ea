"""Controls: narrower nets from random weights, trained after the finalists and compared with the front."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from ranksearch.compress.inventory import count_macs, count_params
from ranksearch.compress.widths import scale_width_
from ranksearch.console import Silent
from ranksearch.data import example
from ranksearch.plan import Plan
from ranksearch.report import summary
from ranksearch.results.attributes import read_shares, write_control
from ranksearch.results.messages import Job, Outcome, Result, Stage
from ranksearch.spec import Recipe
from ranksearch.study.controls import control_recipe
from ranksearch.study.options import Local, Options
from ranksearch.study.study import Stopped, run_study
from ranksearch.task import checkpoint
from ranksearch.task.evaluation import Evaluator
from tests import nets
from tests.conftest import essence, small_spec, stored, time_once, tiny_spec

HERE = Options(Local(0))
SPEC = ("search.trials=3", "finalists.count=2", "dense.epochs=4", "controls=3")
INPUTS = example(nets.few_digits().train)


def outcome(record):
    """All of the controls that an interruption must not change."""
    return [replace(control, seconds=0.0, timings=(), costs=control.costs | {"latency": 0.0}) for control in record.controls]


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """The folder and the record of a study with three controls."""
    out = tmp_path_factory.mktemp("controlled") / "small"
    with pytest.MonkeyPatch.context() as patch:
        time_once(patch)
        return out, run_study(small_spec(*SPEC), out, HERE)


class Watching(Silent):
    """A view that keeps its notes and the points of learning curves, and raises Ctrl-C at a point of this name and epoch."""

    def __init__(self, stop_at=None):
        self.stop_at, self.points, self.notes, self.stages = stop_at, [], [], {}

    def stage(self, name, total, done=0):
        self.stages[name] = (total, done)

    def note(self, text):
        self.notes.append(text)

    def curve_point(self, name, curve_point):
        self.points.append((name, curve_point.epochs))
        if self.points[-1] == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.slow
class TestStudy:
    def test_controls_are_trained_as_long_as_dense_net_and_finalist_together(self, controlled):
        _, record = controlled
        assert [control.number for control in record.controls] == [1, 2, 3]
        for control in record.controls:
            assert [point.epochs for point in control.curve] == [0, 1, 2, 3, 4, 5]
            assert control.score_validation == control.curve[-1].score

    def test_their_costs_cover_those_of_the_front(self, controlled):
        _, record = controlled
        smallest, dense = min(trial.params for trial in record.front), record.facts.dense.params
        costs = [control.params for control in record.controls]
        assert smallest <= costs[-1] < costs[1] < costs[0] < dense
        assert costs[-1] < 1.5 * smallest

    def test_costs_are_those_of_the_narrow_net(self, controlled):
        for control in controlled[1].controls:
            net = scale_width_(nets.small(), INPUTS, control.share)
            assert (control.params, control.macs) == (count_params(net), count_macs(net, INPUTS))
            assert control.ratio == controlled[1].facts.dense.params / control.params

    def test_they_are_timed_with_the_finalists(self, controlled):
        _, record = controlled
        ways = [(timing.runtime, timing.batch) for timing in record.facts.dense.timings]
        for control in record.controls:
            assert [(timing.runtime, timing.batch) for timing in control.timings] == ways
            assert control.costs["latency"] == control.latency_ms

    def test_the_folder_shows_them(self, controlled):
        out, record = controlled
        assert len(json.loads((out / "front.json").read_text())["controls"]) == 3
        assert (out / "controls.csv").exists()
        assert summary.against_controls(record) in (out / "report.md").read_text().replace("\\", "")
        assert not (out / "unfinished").exists()
        assert record.seconds["controls"] > 0

    def test_a_finished_study_trains_none_again(self, controlled):
        out, record = controlled
        view = Watching()
        assert run_study(small_spec(*SPEC), out, HERE, view=view).controls == record.controls
        assert view.points == []

    def test_the_same_seed_gives_the_same_controls_on_another_engine(self, controlled, bare, tmp_path):
        _, record = controlled  # in one thread, as each of two workers has
        assert outcome_untimed(run_study(small_spec(*SPEC), tmp_path / "small", Options(Local(2)))) == outcome_untimed(record)

    def test_controls_change_no_trial(self, controlled, bare, tmp_path):
        _, record = controlled
        plain = run_study(small_spec(*SPEC[:-1]), tmp_path / "small", HERE)
        assert essence(plain.trials) == essence(record.trials)
        assert plain.controls == ()
        later = run_study(small_spec(*SPEC), tmp_path / "small", HERE)
        assert outcome_untimed(later) == outcome_untimed(record)

    def test_a_larger_number_adds_controls_and_a_smaller_one_keeps_them(self, controlled, bare, tmp_path):
        out = shutil.copytree(controlled[0], tmp_path / "small")
        more = run_study(small_spec(*SPEC, "controls=4"), out, HERE)
        assert outcome(more)[:3] == outcome(controlled[1])
        assert len(more.controls) == 4
        assert len(run_study(small_spec(*SPEC, "controls=1"), out, HERE).controls) == 4

    def test_lost_latencies_are_measured_again_together(self, controlled, unreported, tmp_path):
        out = shutil.copytree(controlled[0], tmp_path / "small")
        write_control(stored(out), replace(controlled[1].controls[1], timings=()))
        again = run_study(small_spec(*SPEC), out, HERE)
        assert all(control.latency_ms for control in again.controls)


def outcome_untimed(record):
    return [replace(control, costs={}) for control in outcome(record)]


@pytest.mark.slow
def test_resumed_equals_uninterrupted(controlled, bare, tmp_path, monkeypatch):
    """Stopped within the second control, which continues from its checkpoint."""
    monkeypatch.setattr(checkpoint, "MIN_SECONDS_BETWEEN", 0.0)
    out, view = tmp_path / "small", Watching(stop_at=("control 2", 3))
    with pytest.raises(Stopped) as stopped:
        run_study(small_spec(*SPEC), out, HERE, view=view)
    assert [control.number for control in stopped.value.record.controls] == [1]
    shares = read_shares(stored(out))
    again = Watching()
    record = run_study(small_spec(*SPEC), out, HERE, view=again)
    assert outcome_untimed(record) == outcome_untimed(controlled[1])
    assert again.points[:2] == [("control 2", 3), ("control 2", 4)]
    assert again.stages["controls"] == (3, 1)
    assert read_shares(stored(out)) == shares
    assert not (out / "unfinished").exists()


@pytest.mark.slow
def test_a_net_that_cannot_be_narrowed_has_no_controls(bare, tmp_path):
    view = Watching()
    spec = tiny_spec("controls=2", "task.model=tests.study.test_controls:rigid")
    record = run_study(spec, tmp_path / "small", HERE, view=view)
    assert record.controls == ()
    (note,) = record.notes
    assert note.startswith("There are no controls: ")
    assert view.notes == [f"no controls: {note.removeprefix('There are no controls: ')}"]
    assert record.front


def rigid():
    """A net whose weights cannot be drawn anew."""
    model = nets.small()
    model.conv1.bias.requires_grad_(False)
    return model


@pytest.mark.slow
def test_a_control_that_diverges_is_told_and_not_trained_again(bare, tmp_path, monkeypatch):
    spec, out = tiny_spec("controls=2"), tmp_path / "small"
    monkeypatch.setattr("ranksearch.study.study.control_recipe", lambda spec, layers: Recipe(1, learning_rate=1e30))
    first, again = Watching(), Watching()
    record = run_study(spec, out, HERE, view=first)
    assert record.controls == ()
    sentence = "diverged: the loss or the score became NaN or infinite; a lower dense.learning_rate helps"
    assert record.notes == [f"Control {number} failed, {sentence}." for number in (1, 2)]
    assert first.notes == [f"control {number}: {sentence}" for number in (1, 2)]
    assert run_study(spec, out, HERE, view=again).notes == record.notes
    assert again.notes == again.points == []


@pytest.mark.slow
def test_a_control_that_runs_out_of_memory_is_trained_by_the_next_run(bare, tmp_path, monkeypatch):
    spec, out = tiny_spec("controls=1"), tmp_path / "small"
    score = Evaluator._score

    def short_of_memory(self, model, split):
        if model[0].out_channels < 8:
            raise torch.OutOfMemoryError
        return score(self, model, split)

    monkeypatch.setattr(Evaluator, "_score", short_of_memory)
    assert run_study(spec, out, HERE).notes == [f"Control 1 failed, {Outcome.OUT_OF_MEMORY.of_control}."]
    monkeypatch.setattr(Evaluator, "_score", score)
    record = run_study(spec, out, HERE)
    assert record.notes == []
    assert len(record.controls) == 1


@pytest.mark.slow
def test_a_study_without_a_front_has_no_controls(bare, tmp_path):
    spec = tiny_spec("finetune.learning_rate=1e30", "finalists.learning_rate=1e30", "controls=2")
    record = run_study(spec, tmp_path / "small", HERE)
    assert record.controls == ()
    assert not any("controls" in note for note in record.notes)


def test_a_control_knows_nothing_of_the_dense_weights(evaluator):
    make = replace(evaluator(), controls=Recipe(1))
    other = replace(make, task=replace(make.task, model=nets.small()))

    def curve(evaluate, seed):
        *_, result = evaluate(Job(1, Plan(), seed, Stage.CONTROL, 0.3))
        assert isinstance(result, Result)
        assert result.weights is None
        return result.curve, result.score_test

    assert curve(make, 0) == curve(other, 0)
    assert curve(make, 0) != curve(make, 1)


@pytest.mark.parametrize(("schedule", "epochs"), [("one-shot", 13), ("layerwise", 12 + 4)])
def test_the_recipe_is_that_of_the_dense_net(schedule, epochs):
    spec = small_spec(f"finalists.schedule={schedule}", "finalists.batch_size=7")
    assert control_recipe(spec, 4) == Recipe(epochs, batch_size=32, learning_rate=1e-2)
