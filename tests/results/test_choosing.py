"""The front of a record, and the choice of one model from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.errors import StudyError
from ranksearch.results.choosing import choose, front_of
from ranksearch.results.limits import Limits
from tests.books import OBJECTIVES, finalist, measured, trial

clouds = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=25)
limits_of_scores = st.none() | st.floats(0.89, 1.01)
limits_of_ratios = st.none() | st.floats(0.5, 25.0)


@given(clouds, limits_of_scores, limits_of_ratios)
def test_the_feasible_front_is_the_front_of_the_feasible_trials(cloud, min_score, min_ratio):
    trials = [trial(i, 0.9 + score / 200, 1.0 + ratio) for i, (score, ratio) in enumerate(cloud)]
    feasible = [t for t in trials if t.score >= (min_score or 0) and t.ratio >= (min_ratio or 0)]
    assert front_of(trials, OBJECTIVES, Limits(min_score=min_score, min_ratio=min_ratio)) == front_of(feasible, OBJECTIVES)


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
    assert choose(front(), OBJECTIVES, dense_score=0.98, **wish).number == number


def test_choosing_keeps_the_studys_limits_where_it_can():
    limits = Limits(min_score=0.96, max_costs={"params": 1000})
    assert choose(front(), OBJECTIVES, dense_score=0.98, limits=Limits(min_score=0.966)).number == 0
    assert choose(front(), OBJECTIVES, dense_score=0.98, min_ratio=20, limits=limits).number == 1
    assert choose(front(), OBJECTIVES, dense_score=0.98, min_ratio=61, limits=limits).number == 2
    assert choose(front(), OBJECTIVES, dense_score=0.98, limits=Limits(min_score=0.99)).number == 1
    with pytest.raises(StudyError, match=r"No finalist has a compression ratio of at least 101; the smallest model has 100.0"):
        choose(front(), OBJECTIVES, dense_score=0.98, min_ratio=101, limits=limits)


def test_choosing_by_the_compression_ratio_where_the_front_is_of_another_cost():
    """On the front against multiply-accumulates only the first trial remains."""
    few, small = trial(0, 0.97, 10.0, finalist=finalist(0.97)), trial(1, 0.96, 50.0, finalist=finalist(0.96))
    trials = [replace(each, costs={**each.costs, "macs": macs}) for each, macs in ((few, 100), (small, 200))]
    objectives = OBJECTIVES.only("macs")
    assert front_of(trials, objectives) == trials[:1]
    assert choose(trials, objectives, dense_score=0.98, min_ratio=30).number == 1
    assert choose(trials, objectives, dense_score=0.98, min_ratio=5).number == 0


def test_choosing_before_there_is_a_finalist():
    with pytest.raises(StudyError, match="Only finalists can be exported, but there are none yet"):
        choose([replace(t, finalist=None) for t in front()], OBJECTIVES, dense_score=0.98)


def test_a_smaller_model_is_passed_over_if_it_may_owe_its_score_to_luck():
    sure, lucky = measured(0, -0.004, 0.004, 20), measured(1, -0.009, 0.008, 60)
    assert choose([sure, lucky], OBJECTIVES, dense_score=0.98, within=0.01) is sure
    assert choose([sure, lucky], OBJECTIVES, dense_score=0.98, within=0.02) is lucky


def test_choosing_within_a_margin_that_no_finalist_keeps():
    with pytest.raises(
        StudyError, match=r"No finalist is within 0.01 of the dense net's score with a chance of at least 70 %; the"
    ):
        choose([measured(0, -0.02, 0.004, 20)], OBJECTIVES, dense_score=0.98, within=0.01)
