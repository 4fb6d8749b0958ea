"""Where the search starts and what it keeps: VBMF plans, samplers, finalists."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.data import example
from ranksearch.errors import PlanError, StudyError
from ranksearch.methods import METHODS
from ranksearch.plan import CP, CP4, Dense, Plan, Tucker2
from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import Finalist, TrialRecord, choose, front_of
from ranksearch.strategy.finalists import MAX_FINALIST_SCORE_DROP, choose_finalists, floor_of
from ranksearch.strategy.prior import WEAKENINGS, at_vbmf, vbmf_plans
from ranksearch.strategy.space import make_space

OBJECTIVES = Objectives(dense={"params": 100, "macs": 1000})


def trial(number, score, ratio, outcome=Outcome.DONE, finalist=None, same_as=None):
    """A trial of a plan that no other number has; `same_as` names the trial whose plan it shares."""
    plan = Plan.of({"conv1": CP(1 + (number if same_as is None else same_as))})
    return TrialRecord(
        number=number, index=number, origin="tpe", plan=plan, outcome=outcome, costs={"params": 100 / ratio, "macs": 100}, ratio=ratio,
        score=score, finalist=finalist, same_as=same_as,
    )  # fmt: skip


def finalist(validation, test=0.5):
    return Finalist(score_validation=validation, score_test=test, curve=(CurvePoint(0, validation),), seconds=1.0)


@pytest.fixture(scope="module")
def start(trained):
    found = inventory(trained.model, example(trained.data.train))
    space = make_space(found, ("tucker2", "cp", "svd"))
    layers = profile(trained.model, found, {axis.layer.name: axis.methods for axis in space.axes})
    return space, layers


def test_vbmf_plans_are_inside_the_space_and_differ(start):
    space, layers = start
    plans = list(vbmf_plans(space, layers.vbmf, WEAKENINGS))
    assert len({plan for _, plan in plans}) == len(plans) >= 4
    for _, plan in plans:
        assert plan.layers
        assert space.plan(space.params(plan)) == plan


def test_the_first_plan_is_the_one_shot_tucker_of_kim(start):
    space, layers = start
    origin, plan = next(vbmf_plans(space, layers.vbmf))
    assert origin == "vbmf tucker2 x1"
    for axis in space.axes:
        value, (rank_in, rank_out) = plan[axis.layer.name], layers.layers[axis.layer.name].vbmf
        if isinstance(value, Tucker2) and rank_in and rank_out:
            assert (value.rank_in, value.rank_out) == (rank_in, rank_out)
    assert any(isinstance(value, Tucker2) for _, value in plan)


def test_cp_takes_the_larger_estimate_as_the_thesis_does(start):
    space, layers = start
    _, plan = next((origin, plan) for origin, plan in vbmf_plans(space, layers.vbmf) if origin == "vbmf cp x1")
    found = [(name, value) for name, value in plan if isinstance(value, CP)]
    assert found
    for name, value in found:
        assert value.rank == max(rank or 0 for rank in layers.layers[name].vbmf)


def test_a_layer_without_an_estimate_has_no_ranks(start):
    space, _ = start
    axis = space.axes[0]
    assert at_vbmf(axis.methods[0], axis.layer, (None, None)) is None
    (rank,) = at_vbmf(METHODS[CP], axis.layer, (None, 3))
    assert rank == 3


clouds = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=25)


@given(clouds, st.integers(1, 8))
def test_finalists_are_the_front_first(cloud, count):
    trials = [trial(i, 0.9 + score / 200, 1.0 + ratio) for i, (score, ratio) in enumerate(cloud)]
    chosen = choose_finalists(trials, 0.95, count, UNLIMITED, OBJECTIVES)
    points = [(t.score, math.log10(t.ratio)) for t in trials]
    front = {trials[i].number for i in pareto.front(points)}
    numbers = {t.number for t in chosen}
    assert len(numbers) == len(chosen) == min(count, len(trials))
    assert numbers <= front if len(front) >= count else front <= numbers
    assert [t.ratio for t in chosen] == sorted(t.ratio for t in chosen)


def test_what_lost_too_much_is_no_finalist_while_there_is_better():
    good, bad = trial(0, 0.95, 10.0), trial(1, 0.95 - MAX_FINALIST_SCORE_DROP - 0.01, 1000.0)
    assert choose_finalists([good, bad], 0.96, 2, UNLIMITED, OBJECTIVES) == [good]
    assert choose_finalists([bad], 0.96, 2, UNLIMITED, OBJECTIVES) == [bad]


@given(st.lists(st.floats(0.0, 1.0), min_size=1), st.floats(0.0, 1.0))
def test_some_trial_is_always_worth_something(scores, dense_score):
    """Nets from scratch, or that a limit makes tiny, may all be far below the dense one after a few epochs."""
    floor = floor_of(dense_score, scores, UNLIMITED)
    assert floor < max(scores)
    assert floor <= dense_score - MAX_FINALIST_SCORE_DROP
    assert floor_of(dense_score, scores, Limits(min_score=0.7)) == 0.7


def test_where_none_reaches_the_dense_score_finalists_are_told_apart_by_the_best():
    best, near, far = (
        trial(0, 0.5, 10.0),
        trial(1, 0.5 - MAX_FINALIST_SCORE_DROP + 0.01, 100.0),
        trial(2, 0.5 - MAX_FINALIST_SCORE_DROP - 0.01, 1000.0),
    )
    assert choose_finalists([best, near, far], 0.96, 3, UNLIMITED, OBJECTIVES) == [best, near]


limits_of_scores = st.none() | st.floats(0.89, 1.01)
limits_of_ratios = st.none() | st.floats(0.5, 25.0)


@given(clouds, limits_of_scores, limits_of_ratios)
def test_the_feasible_front_is_the_front_of_the_feasible_trials(cloud, min_score, min_ratio):
    trials = [trial(i, 0.9 + score / 200, 1.0 + ratio) for i, (score, ratio) in enumerate(cloud)]
    feasible = [t for t in trials if t.score >= (min_score or 0) and t.ratio >= (min_ratio or 0)]
    assert front_of(trials, OBJECTIVES, Limits(min_score=min_score, min_ratio=min_ratio)) == front_of(feasible, OBJECTIVES)


@given(clouds, limits_of_scores, limits_of_ratios, st.integers(1, 8))
def test_finalists_keep_the_limits_first_and_then_come_near_them(cloud, min_score, min_ratio, count):
    trials = [trial(i, 0.9 + score / 200, 1.0 + ratio) for i, (score, ratio) in enumerate(cloud)]
    trials += [replace(t, number=t.number + 100, same_as=t.number) for t in trials]
    limits = Limits(min_score=min_score, min_ratio=min_ratio)
    chosen = choose_finalists(trials, 0.95, count, limits, OBJECTIVES)
    feasible = [t for t in trials if t.same_as is None and not limits.excess(t, t.score)]
    inside = [t for t in chosen if not limits.excess(t, t.score)]
    assert len(inside) == min(count, len(feasible))
    assert len({t.plan for t in chosen}) == len(chosen) > 0
    farthest = max((limits.excess(t, t.score) for t in chosen), default=0)
    if len(inside) < len(chosen):
        sized = [t for t in trials if not limits.excess(t)] or trials
        left = {t.plan for t in sized} - {t.plan for t in chosen}
        assert all(limits.excess(t, t.score) >= farthest for t in sized if t.plan in left)


def test_a_finalist_is_chosen_by_the_score_of_the_search():
    """Else a finished study that is run again would go on to other finalists."""
    lifted = trial(0, 0.94, 10.0, finalist=finalist(0.97))
    sunk = trial(1, 0.96, 20.0, finalist=finalist(0.93))
    chosen = choose_finalists([lifted, sunk], 0.95, 1, Limits(min_score=0.95), OBJECTIVES)
    assert chosen == [sunk]
    assert front_of([lifted, sunk], OBJECTIVES, Limits(min_score=0.95)) == [lifted]


def test_what_the_user_asks_for_is_worth_taking_home_however_low():
    bad = trial(1, 0.5, 1000.0)
    assert choose_finalists([trial(0, 0.95, 10.0), bad], 0.96, 2, Limits(min_score=0.4), OBJECTIVES)[1] == bad


def test_only_trials_that_are_done_become_finalists():
    trials = [trial(0, None, 10.0, Outcome.DIVERGED), trial(1, None, 1.0, Outcome.NOT_SMALLER)]
    trials += [trial(2, 0.95, 20.0, Outcome.OUT_OF_MEMORY)]
    assert choose_finalists(trials, 0.9, 3, UNLIMITED, OBJECTIVES) == []
    assert front_of(trials, OBJECTIVES) == []


def test_the_front_is_of_finalists_once_there_are_any():
    short = trial(0, 0.99, 50.0)
    long = trial(1, 0.95, 20.0, finalist=finalist(0.97))
    assert front_of([short], OBJECTIVES) == [short]
    assert front_of([short, long], OBJECTIVES) == [long]


def front():
    scores, ratios = (0.97, 0.965, 0.80), (10.0, 60.0, 100.0)
    return [trial(i, s - 0.01, r, finalist=finalist(s)) for i, (s, r) in enumerate(zip(scores, ratios, strict=True))]


@pytest.mark.parametrize(
    ("wish", "number"),
    [({}, 1), ({"number": 2}, 2), ({"min_score": 0.9}, 1), ({"min_score": 0.969}, 0), ({"min_ratio": 20}, 1), ({"min_ratio": 61}, 2)],
)  # fmt: skip
def test_choosing(wish, number):
    assert choose(front(), OBJECTIVES, **wish).number == number


def test_choosing_keeps_the_studys_limits_where_it_can():
    limits = Limits(min_score=0.96, most={"params": 1000})
    assert choose(front(), OBJECTIVES, limits=Limits(min_score=0.966)).number == 0
    assert choose(front(), OBJECTIVES, min_ratio=20, limits=limits).number == 1
    assert choose(front(), OBJECTIVES, min_ratio=61, limits=limits).number == 2
    assert choose(front(), OBJECTIVES, limits=Limits(min_score=0.99)).number == 1
    with pytest.raises(StudyError, match=r"A ratio of at least 101 is asked for, but the smallest model has 100.0"):
        choose(front(), OBJECTIVES, min_ratio=101, limits=limits)


def test_choosing_by_the_compression_ratio_where_the_front_is_of_another_cost():
    """The front of multiply-accumulates holds the first alone."""
    few, small = trial(0, 0.97, 10.0, finalist=finalist(0.97)), trial(1, 0.96, 50.0, finalist=finalist(0.96))
    trials = [replace(each, costs={**each.costs, "macs": macs}) for each, macs in ((few, 100), (small, 200))]
    objectives = OBJECTIVES.only("macs")
    assert front_of(trials, objectives) == trials[:1]
    assert choose(trials, objectives, min_ratio=30).number == 1
    assert choose(trials, objectives, min_ratio=5).number == 0


def test_choosing_before_there_is_a_finalist():
    with pytest.raises(StudyError, match="A model must be a finalist to be taken home, but there are none yet"):
        choose([replace(t, finalist=None) for t in front()], OBJECTIVES)


def test_a_plan_outside_the_space_is_refused(start):
    space, _ = start
    with pytest.raises(PlanError, match=r"Layer 'conv1' may not be stored as CP-4 in this study; add it to space.methods"):
        space.params(Plan.of({"conv1": CP4(2)}))
    assert space.plan(space.params(Plan()))["conv1"] == Dense()
