"""The predicted front: no plan is cheaper at any price, sensitivities rise, and a study starts with plans of that front."""

from __future__ import annotations

import itertools
import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch import search
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.console import Silent
from ranksearch.data import example
from ranksearch.plan import CP, SVD, Dense, Plan
from ranksearch.results import attributes
from ranksearch.results.record import Probe
from ranksearch.spec import Finalists, Search
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.predicted_front import Choice, Corner, predicted_front
from ranksearch.strategy.sensitivity import (
    MAX_LOSS_INCREASE,
    PROBED_ERRORS,
    Sensitivity,
    predict_front,
    rescuable,
    sensitivities,
    spread,
    values_to_probe,
)
from ranksearch.strategy.space import make_space
from ranksearch.study.options import Local, Options
from ranksearch.study.probing import MAX_PREDICTED_PLANS, WORST_LOSS
from ranksearch.study.study import Stopped, run_study
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import Task
from tests import nets
from tests.conftest import essence, small_spec, stored, tiny_spec

pytestmark = pytest.mark.usefixtures("bare")

DENSE = {"a": 100, "b": 60, "c": 9}
prices = [10.0 ** (exponent / 4) for exponent in range(-24, 9)]


@st.composite
def layers(draw):
    """By layer, some choices that are smaller than dense."""
    loss_increases = st.floats(-0.5, 3)
    return {
        name: [
            Choice(SVD(rank), draw(st.integers(1, params - 1)), draw(loss_increases))
            for rank in range(1, draw(st.integers(0, 4)) + 1)
        ]
        for name, params in DENSE.items()
    }


def everything(choices):
    """(saved cost, loss increase) of every possible plan."""
    options = [[(0, 0.0), *((DENSE[n] - c.cost, max(0.0, c.loss_increase)) for c in choices[n])] for n in DENSE]
    for chosen in itertools.product(*options):
        yield sum(saved for saved, _ in chosen), sum(loss_increase for _, loss_increase in chosen)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_at_every_price_the_predicted_front_holds_a_cheapest_plan(choices):
    corners, plans = predicted_front(DENSE, choices), list(everything(choices))
    for price in prices:
        least = min(loss_increase - price * saved for saved, loss_increase in plans)
        assert min(corner.loss_increase - price * corner.saved for corner in corners) == pytest.approx(least, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_a_corner_has_the_figures_of_its_plan(choices):
    corners = predicted_front(DENSE, choices)
    assert corners[0] == Corner(Plan(), 0, 0.0)
    for corner in corners:
        taken = [(name, next(c for c in choices[name] if c.value == value)) for name, value in corner.plan]
        assert corner.saved == sum(DENSE[name] - choice.cost for name, choice in taken)
        assert corner.loss_increase == pytest.approx(sum(max(0.0, choice.loss_increase) for _, choice in taken))
    slopes = [
        (after.loss_increase - before.loss_increase) / (after.saved - before.saved) for before, after in pairwise(corners)
    ]
    assert all(before.saved < after.saved for before, after in pairwise(corners))
    assert all(before <= after + 1e-9 for before, after in pairwise(slopes))


def test_rounding_does_not_reorder_the_edges_of_one_layer():
    for seed in range(200):
        draw = random.Random(seed)
        slope = draw.random()
        near = [Choice(SVD(k), 1000 - 50 * k, slope * 50 * k * (1 + draw.choice((-1, 0, 1)) * 2**-52)) for k in range(1, 15)]
        for corner in predicted_front({"a": 1000}, {"a": near})[1:]:
            ((_, value),) = corner.plan
            assert corner.saved == 50 * value.rank


def test_choices_without_a_loss_increase_come_first():
    corners = predicted_front(
        {"a": 10, "b": 10}, {"a": [Choice(SVD(1), 4, 0.0), Choice(SVD(2), 6, 0.1)], "b": [Choice(CP(1), 1, 0.5)]}
    )
    assert [corner.plan for corner in corners[1:]] == [Plan.of({"a": SVD(1)}), Plan.of({"a": SVD(1), "b": CP(1)})]


measured = st.lists(st.tuples(st.floats(0.05, 1.2), st.floats(-0.1, 5)), max_size=5)


@given(measured, st.floats(0, 2), st.floats(0, 2))
def test_a_sensitivity_starts_at_nothing_and_never_falls(pairs, one, other):
    curve = Sensitivity.of(pairs)
    low, high = sorted((one, other))
    assert curve.loss_increase(0.0) == 0
    assert 0 <= curve.loss_increase(low) <= curve.loss_increase(high) + 1e-9
    assert math.isfinite(curve.loss_increase(high))


def test_a_sensitivity_goes_through_its_probes_and_on_beyond_them():
    curve = Sensitivity.of([(0.8, 2.0), (0.4, 0.5)])
    assert (curve.loss_increase(0.4), curve.loss_increase(0.8)) == (0.5, 2.0)
    assert curve.loss_increase(math.sqrt(0.4)) == pytest.approx(0.5 + 1.5 * (0.4 - 0.16) / (0.64 - 0.16))
    assert curve.loss_increase(1.0) == pytest.approx(2.0 + 1.5 * 0.36 / 0.48)
    assert Sensitivity.of([(0.4, 0.5), (0.8, 0.1)]).loss_increase(0.8) == 0.5
    assert Sensitivity.of([]).loss_increase(0.5) == 0.25


@given(st.lists(st.integers(1, 998), min_size=1, max_size=30, unique=True).map(sorted), st.integers(1, 9))
def test_a_spread_is_of_the_predicted_front_with_its_middle_first(savings, count):
    corners = [Corner(Plan(), 0, 0.0), *(Corner(Plan.of({"a": SVD(s)}), s, float(s)) for s in savings)]
    chosen = spread(corners, 1000, count)
    assert 1 <= len(chosen) <= count
    assert len({corner.saved for corner in chosen}) == len(chosen)
    assert set(chosen) <= set(corners[1:])
    ordered = sorted(corner.saved for corner in chosen)
    assert chosen[0].saved == ordered[len(ordered) // 2]
    if count > 1:
        assert {savings[0], savings[-1]} <= set(ordered)


@pytest.mark.parametrize(
    ("loss_increases", "kept"),
    [
        ([0.0, 0.1, MAX_LOSS_INCREASE - 0.1, MAX_LOSS_INCREASE, MAX_LOSS_INCREASE + 9], 3),  # below the bound
        (
            [0.0, MAX_LOSS_INCREASE + 3, MAX_LOSS_INCREASE + 4, 2 * MAX_LOSS_INCREASE + 2.9, 2 * MAX_LOSS_INCREASE + 3],
            4,
        ),  # none is below the bound: relative to the largest plan
        ([0.0, MAX_LOSS_INCREASE + 3], 2),
        ([0.0], 1),
    ],
)
def test_initial_plans_are_those_that_training_may_make_good(loss_increases, kept):
    corners = [
        Corner(Plan.of({"a": SVD(9 - place)} if place else {}), place, loss_increase)
        for place, loss_increase in enumerate(loss_increases)
    ]
    assert rescuable(corners) == corners[:kept]


def test_an_empty_predicted_front_has_no_spread():
    assert spread([Corner(Plan(), 0, 0.0)], 10, 4) == []
    free = Corner(Plan.of({"a": SVD(1)}), 5, 0.0)
    assert spread([Corner(Plan(), 0, 0.0), free], 10, 4) == [free]


@pytest.fixture(scope="module")
def layered(trained):
    found = inventory(trained.model, example(trained.data.train))
    space = make_space(found, ("tucker2", "cp", "svd"))
    return found, space, profile(trained.model, found, {axis.layer.name: axis.methods for axis in space.axes})


def test_probes_are_candidates_near_the_errors_asked_for(layered):
    _, _, layers = layered
    for layer in layers.layers.values():
        known = {candidate.value: candidate.error for candidate in layer.candidates()}
        probed = values_to_probe(layer)
        assert probed
        assert len(set(probed)) == len(probed) <= len(PROBED_ERRORS)
        for wanted in PROBED_ERRORS:
            nearest = min(abs(error - wanted) for error in known.values())
            assert min(abs(known[value] - wanted) for value in probed) <= nearest + 0.1


def test_a_sensitive_layer_is_spared(layered):
    found, space, layers = layered
    probes = [
        Probe(name, value, 1.0 + (50.0 if name == "conv2" else 0.01))
        for name, layer in layers.layers.items()
        for value in values_to_probe(layer)
    ]
    assert sensitivities(layers, probes, 1.0)["conv2"].loss_increase(0.5) > 1
    corners = predict_front(Bases.of(space, found), [layers], probes, {1.0: 1.0})
    half = next(corner for corner in corners if corner.saved > found.params / 2)
    assert half.plan["conv2"] == Dense()
    assert all(space.plan(space.params(corner.plan)) == corner.plan for corner in corners)


@pytest.mark.slow
def test_a_study_tries_the_predicted_front_before_vbmf_and_probes_once(finished, copied):
    whole = finished[1]
    origins = [trial.origin for trial in whole.trials]
    assert 1 <= (many := origins.count("frontier")) <= MAX_PREDICTED_PLANS
    assert origins[:many] == ["frontier"] * many
    assert origins[many : many + 2] == ["vbmf tucker2 x1", "vbmf cp x1"]
    assert set(origins[many + 3 :]) == {"rank"}
    losses, probes = attributes.read_probes(stored(copied))
    assert losses == {1.0: pytest.approx(min([losses[1.0], *(probe.loss for probe in probes)]), abs=0.2)}
    assert {probe.layer for probe in probes} == {"conv1", "conv2", "fc1", "fc2"}
    assert "probes" in whole.seconds
    # A run with more trials repeats no probe and keeps the same initial plans.
    more = run_study(small_spec("search.trials=10", "finalists.count=1"), copied, Options(Local(0)))
    assert [trial.plan for trial in more.trials][:8] == [trial.plan for trial in whole.trials]
    assert attributes.read_probes(stored(copied)) == (losses, probes)


@pytest.mark.slow
def test_the_initial_plans_are_chosen_once(tmp_path, monkeypatch):
    spec = small_spec("search.trials=3", "finalists.count=1")
    run_study(spec, tmp_path / "small", Options(Local(0)))
    kept = attributes.read_initial_plans(stored(tmp_path / "small"))
    assert kept
    monkeypatch.setattr("ranksearch.study.probing.predict_front", lambda *args: pytest.fail("chosen again"))
    again = run_study(small_spec("search.trials=5", "finalists.count=1"), tmp_path / "small", Options(Local(0)))
    assert [(trial.origin, trial.plan) for trial in again.trials] == kept[:5]


@pytest.mark.slow
def test_a_lost_probe_is_told_and_looked_for_again(tmp_path, monkeypatch):
    told, loss = [], Evaluator._loss

    class View(Silent):
        def step(self, what=""):
            told.append(what)

    def failing(self, model, seed):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Evaluator, "_loss", failing)
    run_study(tiny_spec("search.trials=2"), tmp_path / "small", Options(Local(0)), view=View())
    assert sum("out of memory" in what for what in told) > 4
    assert attributes.read_probes(stored(tmp_path / "small")) == ({}, [])
    assert all(origin.startswith("vbmf") for origin, _ in attributes.read_initial_plans(stored(tmp_path / "small")))
    monkeypatch.setattr(Evaluator, "_loss", loss)
    run_study(tiny_spec("search.trials=2"), tmp_path / "small", Options(Local(0)))
    assert len(attributes.read_probes(stored(tmp_path / "small"))[1]) > 4


@pytest.mark.slow
def test_probes_go_on_where_they_were_stopped(finished, tmp_path, monkeypatch):
    whole_out, whole = finished
    write = attributes.write_probes

    def stopping(study, dense, probes):
        write(study, dense, probes)
        if len(probes) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("ranksearch.results.attributes.write_probes", stopping)
    with pytest.raises(Stopped) as stopped:
        run_study(small_spec(), tmp_path / "small", Options(Local(0)))
    assert stopped.value.record.trials == ()
    assert len(attributes.read_probes(stored(tmp_path / "small"))[1]) == 5
    monkeypatch.setattr("ranksearch.results.attributes.write_probes", write)
    again = run_study(small_spec(), tmp_path / "small", Options(Local(0)))
    assert attributes.read_probes(stored(tmp_path / "small")) == attributes.read_probes(stored(whole_out))
    assert essence(again.trials) == essence(whole.trials)


@pytest.mark.slow
def test_a_loss_that_is_no_number_counts_as_the_worst(tmp_path):
    def loss(outputs, targets):
        whole = len(outputs) == 100  # only the validation split has 100 inputs; training batches are smaller
        return outputs.mean() * (float("nan") if whole else 1.0)

    splits = nets.few_digits()
    task = Task(nets.small(), splits, loss=loss)
    search(task, out=tmp_path / "small", search=Search(trials=2), finalists=Finalists(12, count=1), engine=Local(0))
    losses, probes = attributes.read_probes(stored(tmp_path / "small"))
    assert losses == {1.0: WORST_LOSS}
    assert {probe.loss for probe in probes} == {WORST_LOSS}
