"""Samplers: the sampler "rank", its expectation of plans, and a contract for every sampler."""

from __future__ import annotations

from statistics import NormalDist
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.plan import CP, Plan
from ranksearch.results import pareto
from ranksearch.results.limits import Limits
from ranksearch.results.messages import CurvePoint, Outcome, Result
from ranksearch.spec import SAMPLERS
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.predicted_front import Choice, predicted_front
from ranksearch.strategy.sampler import MAX_SCORE_DROP, MIN_TRIALS_FOR_SURROGATE, RankSampler, expected_gains
from ranksearch.strategy.space import size_of
from ranksearch.strategy.surrogate import Table, _log_weights, fit
from tests.books import DENSE_SCORE, FOUND, SPACE, TINY, Books, knowledge, made_up_choices

CHOICES = made_up_choices()
TABLE = Table(Bases.of(SPACE, FOUND), [CHOICES])
TOP, FLOOR = 0.91, 0.5

rows = st.tuples(*(st.integers(0, len(values) - 1) for values in TABLE.values))


def as_rows(*plans):
    return np.array(plans, dtype=np.intp).reshape(-1, len(TABLE.layers))


# --- the table ---


@given(rows)
def test_a_row_is_a_plan_and_its_size(row):
    plan = TABLE.plan(row)
    assert TABLE.row(plan) == row
    size = size_of(plan, FOUND)
    assert TABLE.sizes(as_rows(row)) == [size]
    assert TABLE.log_ratios(as_rows(row))[0] == pytest.approx(np.log10(size.ratio))


@given(st.lists(st.floats(0.1, 10), min_size=len(TABLE.layers), max_size=len(TABLE.layers)))
def test_a_weighted_predicted_front_is_that_of_weighted_loss_increases(weights):
    weighted = {
        name: [Choice(c.value, c.cost, c.loss_increase * weight) for c in CHOICES[name]]
        for name, weight in zip(TABLE.layers, weights, strict=True)
    }
    dense = {name: FOUND[name].params for name in TABLE.layers}
    assert [TABLE.plan(row) for row in TABLE.predicted_front(np.array(weights))] == [
        c.plan for c in predicted_front(dense, weighted)
    ]


def test_a_choice_outside_the_table_stands_as_the_nearest_of_its_method():
    layer = next(i for i, values in enumerate(TABLE.values) if sum(isinstance(v, CP) for v in values) > 1)
    inside = [value for value in TABLE.values[layer] if isinstance(value, CP)]
    largest = max(inside, key=lambda value: value.rank)
    row = TABLE.row(Plan.of({TABLE.layers[layer]: CP(10 * largest.rank)}))
    assert TABLE.values[layer][row[layer]] == largest
    assert sum(row) == row[layer]


# --- expected gains ---

ratios = st.floats(0.05, 2.0)
fronts = st.integers(1, 3).flatmap(
    lambda costs: st.tuples(
        st.lists(st.tuples(st.floats(0.3, 0.9), *[ratios] * costs), min_size=1, max_size=6), st.tuples(*[ratios] * costs)
    )
)
"""Trials as (score, log ratios), and the log ratios of a plan, in one to three costs."""


def expected_gain(front, mean, std):
    points, log_ratios = front
    (found,) = expected_gains(np.array([mean]), np.array([std]), np.array([log_ratios]), np.array(points), top=TOP, floor=FLOOR)
    return found


def gain(front, score):
    points, log_ratios = front
    reference = (FLOOR, *[0.0] * len(log_ratios))
    return pareto.hypervolume([*points, (score, *log_ratios)], reference) - pareto.hypervolume(points, reference)


@settings(deadline=None, max_examples=25)
@given(fronts, st.floats(-4, -1), st.floats(0.05, 0.6))
def test_the_expected_gain_is_the_mean_of_gains(front, mean, std):
    steps = 400
    drops = [NormalDist(mean, std).inv_cdf((step + 0.5) / steps) for step in range(steps)]
    gains = [gain(front, TOP - np.exp(drop)) for drop in drops]
    assert expected_gain(front, mean, std) == pytest.approx(np.mean(gains), abs=2e-3 * np.prod(front[1]))


@given(fronts, st.floats(0.3, 0.9))
def test_without_uncertainty_the_expected_gain_is_the_gain(front, score):
    assert expected_gain(front, np.log(TOP - score), 1e-9) == pytest.approx(gain(front, score), abs=1e-6)


def test_a_floor_above_every_score_leaves_nothing_to_gain():
    plans = np.array([[1.0]])
    assert expected_gains(np.array([-3.0]), np.array([0.2]), plans, np.array([(0.8, 1.0)]), top=TOP, floor=TOP + 0.01) == [0.0]


# --- the surrogate ---


def surrogate(plans, scores, seed=0):
    return fit(TABLE, as_rows(*plans), np.array(scores, dtype=float), dense_score=0.9, noise=0.01, floor=FLOOR, seed=seed)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(rows, st.floats(0, 1)), min_size=4, max_size=12), st.lists(rows, min_size=1, max_size=5))
def test_an_expectation_is_a_number_and_follows_the_seed(tried, asked):
    plans, scores = zip(*tried, strict=True)
    first, again = (surrogate(plans, scores).expect(as_rows(*asked)) for _ in range(2))
    assert all(np.isfinite(part).all() for part in first)
    assert (first[1] > 0).all()
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))


@pytest.mark.parametrize("score", [0.0, 0.9, 1.0])
def test_scores_that_are_all_alike(score):
    mean, std = surrogate([(0,) * len(TABLE.layers)] * 4, [score] * 4).expect(as_rows((1,) * len(TABLE.layers)))
    assert np.isfinite(mean).all()
    assert (std > 0).all()


def test_a_plan_that_was_tried_is_known_better_than_one_that_was_not():
    corners = TABLE.predicted_front(np.ones(len(TABLE.layers)))
    tried, far = corners[1::2], corners[-1:]
    known = surrogate(tried[:-1], np.linspace(0.88, 0.6, len(tried) - 1))
    assert known.expect(tried[:1])[1][0] < known.expect(far)[1][0]


def test_a_larger_loss_increase_means_a_lower_expected_score():
    corners = TABLE.predicted_front(np.ones(len(TABLE.layers)))
    known = surrogate(corners, 0.9 - 0.05 * TABLE.loss_increases_of(corners).sum(1))
    mean, _ = known.expect(corners[[1, -1]])
    assert mean[0] < mean[1]


@pytest.mark.parametrize("floor", [FLOOR, 0.93])
def test_scores_above_the_dense_one_are_told_apart(floor):
    """The dense net scores 0.9 and trials up to 0.97, with and without a minimum score of 0.93."""
    corners = TABLE.predicted_front(np.ones(len(TABLE.layers)))
    scores = 0.97 - 0.05 * TABLE.loss_increases_of(corners).sum(1)
    known = fit(TABLE, corners, scores, dense_score=0.9, noise=0.01, floor=floor, seed=0)
    mean, std = known.expect(corners)
    assert known.top > scores.max()
    assert mean[0] < mean[len(mean) // 2] < mean[-1]
    gains = expected_gains(mean, std, TABLE.log_ratios(corners), np.array([(0.95, 0.01)]), top=known.top, floor=floor)
    assert gains.max() > 0


def test_a_score_above_every_other_can_still_be_sought():
    corners = TABLE.predicted_front(np.ones(len(TABLE.layers)))
    known = fit(
        TABLE, corners, 0.9 - 0.05 * TABLE.loss_increases_of(corners).sum(1), dense_score=0.9, noise=0.01, floor=0.95, seed=0
    )
    mean, std = known.expect(corners)
    gains = expected_gains(mean, std, TABLE.log_ratios(corners), np.array([(0.9, 0.01)]), top=known.top, floor=0.95)
    assert known.top > 0.95
    assert gains.max() > 0


# --- proposals ---


def test_no_plan_is_proposed_twice_nor_the_dense_one():
    books = Books(sampler="rank", seed=1)
    books.run(25)
    plans = [trial.plan for trial in books.ledger().records()]
    assert len(set(plans)) == len(plans)
    assert Plan() not in plans


@pytest.mark.slow
@patch("ranksearch.strategy.ledger.MAX_UNTRAINED", 15)
def test_a_space_of_a_handful_is_exhausted_and_the_search_ends():
    books = Books(TINY, sampler="rank")
    books.run(50)
    assert 0 < len({trial.plan for trial in books.trained}) < 50


@pytest.mark.parametrize(
    "sampler", [pytest.param(each, marks=pytest.mark.slow if each in ("gp", "rank") else ()) for each in SAMPLERS]
)
def test_a_proposal_follows_from_the_record_and_the_seed(sampler):
    def proposals(seed, *, rebuilt):
        books = Books(sampler=sampler, seed=seed)
        for count in range(1, 13) if rebuilt else [12]:
            books.run(count)
        return [trial.plan for trial in books.trained]

    whole = proposals(0, rebuilt=False)
    assert whole == proposals(0, rebuilt=True)
    assert whole != proposals(1, rebuilt=False)
    assert all(SPACE.plan(SPACE.params(plan)) == plan for plan in whole)


def test_running_trials_spread_the_proposals():
    books = Books(sampler="rank")
    books.run(8)
    running = [job.plan for _, job in zip(range(4), books.ledger().jobs(12), strict=False)]
    assert len(set(running)) == 4


@pytest.mark.slow
@settings(deadline=None, max_examples=3)
@given(st.floats(2, 12), st.integers(0, 9))
def test_proposals_keep_to_the_limits(min_ratio, seed):
    books = Books(sampler="rank", seed=seed, limits=Limits(min_ratio=min_ratio))
    books.run(15)
    assert all(trial.ratio >= min_ratio for trial in books.trained)
    assert not any(trial.outcome is Outcome.OVER_BUDGET for trial in books.untrained)


def test_suggestions_are_among_the_plans_to_choose_from_until_they_are_tried():
    wanted = tuple(min(3, len(values) - 1) for values in TABLE.values)
    sampler = RankSampler(knowledge(suggested=[TABLE.plan(wanted)]), seed=0)
    weights = np.ones((1, len(TABLE.layers)))
    assert list(wanted) in sampler._plans(as_rows(), weights, set()).tolist()
    assert list(wanted) not in sampler._plans(as_rows(), weights, {wanted}).tolist()


def test_scores_count_from_below_the_best_where_none_reaches_the_dense_one():
    known = knowledge()
    assert known.floor(np.array([])) == known.floor(np.array([0.95])) == pytest.approx(known.dense_score - MAX_SCORE_DROP)
    assert known.floor(np.array([0.3, 0.5])) == pytest.approx(0.5 - MAX_SCORE_DROP)


def test_a_score_out_of_reach_is_climbed_to():
    """With all gains zero, the sampler would propose the smallest plans instead."""
    books = Books(sampler="rank", limits=Limits(min_score=0.99))
    ledger, scores = books.ledger(), []
    for job in ledger.jobs(14):
        loss_increases = TABLE.loss_increases_of(as_rows(TABLE.row(job.plan))).sum()
        scores.append(DENSE_SCORE - 0.1 - 0.4 * loss_increases)
        ledger.receive(job, Result(Outcome.DONE, (CurvePoint(1, scores[-1]),)))
    assert min(scores[MIN_TRIALS_FOR_SURROGATE:]) > np.median(scores[:MIN_TRIALS_FOR_SURROGATE])
    assert max(scores[MIN_TRIALS_FOR_SURROGATE:]) > max(scores[:MIN_TRIALS_FOR_SURROGATE])
    known = knowledge(limits=Limits(min_score=0.6))
    assert known.floor(np.array([0.3, 0.5])) == 0.5
    assert known.floor(np.array([0.3, 0.7])) == known.floor(np.array([])) == 0.6


def test_sums_that_differ_by_rounding_give_finite_weights():
    loss_increases = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.0, 0.1, 0.1], [0.1, 0.1, 0.0], [0.05, 0.0, 0.1]])
    assert loss_increases[0].sum() != loss_increases[1].sum()
    for found in _log_weights(loss_increases, np.log([0.3, 0.1, 0.05, 0.04, 0.02])):
        assert np.isfinite(found).all()
