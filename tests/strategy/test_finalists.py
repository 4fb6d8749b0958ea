"""Which trials become finalists."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ranksearch.results import pareto
from ranksearch.results.choosing import front_of
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.messages import Outcome
from ranksearch.strategy.finalists import MAX_FINALIST_SCORE_DROP, choose_finalists, floor_of
from tests.books import OBJECTIVES, finalist, trial

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


def test_trials_far_below_dense_are_finalists_only_without_better_ones():
    good, bad = trial(0, 0.95, 10.0), trial(1, 0.95 - MAX_FINALIST_SCORE_DROP - 0.01, 1000.0)
    assert choose_finalists([good, bad], 0.96, 2, UNLIMITED, OBJECTIVES) == [good]
    assert choose_finalists([bad], 0.96, 2, UNLIMITED, OBJECTIVES) == [bad]


@given(st.lists(st.floats(0.0, 1.0), min_size=1), st.floats(0.0, 1.0))
def test_the_best_trial_is_always_above_the_floor(scores, dense_score):
    """After a few epochs all nets may be far below the dense one: nets from scratch, or tiny ones by a limit."""
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
    """With the finalists' scores, a finished study that runs again would choose other finalists."""
    lifted = trial(0, 0.94, 10.0, finalist=finalist(0.97))
    sunk = trial(1, 0.96, 20.0, finalist=finalist(0.93))
    chosen = choose_finalists([lifted, sunk], 0.95, 1, Limits(min_score=0.95), OBJECTIVES)
    assert chosen == [sunk]
    assert front_of([lifted, sunk], OBJECTIVES, Limits(min_score=0.95)) == [lifted]


def test_trials_above_min_score_become_finalists_however_low():
    bad = trial(1, 0.5, 1000.0)
    assert choose_finalists([trial(0, 0.95, 10.0), bad], 0.96, 2, Limits(min_score=0.4), OBJECTIVES)[1] == bad


def test_only_trials_that_are_done_become_finalists():
    trials = [trial(0, None, 10.0, Outcome.DIVERGED), trial(1, None, 1.0, Outcome.NOT_SMALLER)]
    trials += [trial(2, 0.95, 20.0, Outcome.OUT_OF_MEMORY)]
    assert choose_finalists(trials, 0.9, 3, UNLIMITED, OBJECTIVES) == []
    assert front_of(trials, OBJECTIVES) == []
