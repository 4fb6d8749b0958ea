"""The chance that a finalist is within a margin of the dense model: laws, and that it holds as often as it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from ranksearch.results.certainty import MIN_SPREAD, MIN_STANDARD_ERROR, chances_within, shrunk
from tests.books import OBJECTIVES, measured, trial


def chance(value, margin, error=0.004):
    return chances_within([measured(0, value, error, 10)], margin, 0.98, OBJECTIVES)[0]


@given(st.floats(-0.1, 0.1), st.floats(0, 0.05), st.floats(0, 0.05))
def test_the_chance_rises_with_score_and_margin_and_is_one_half_at_the_margin(value, margin, more):
    assert 0 <= chance(value, margin) <= min(chance(value + more, margin), chance(value, margin + more)) <= 1
    assert chance(-margin, margin) == pytest.approx(0.5, abs=1e-3)


def test_a_model_that_errs_where_the_dense_one_errs_is_within_any_margin():
    assert chance(0.0, 0.0, error=0.0) == pytest.approx(0.5, abs=1e-4)
    assert chance(0.0, 10 * MIN_STANDARD_ERROR, error=0.0) == pytest.approx(1)


def test_without_an_interval_the_score_alone_decides():
    chances = chances_within([trial(0, 0.97, 10), trial(1, 0.9699, 10), trial(2, None, 10)], 0.01, 0.98, OBJECTIVES)
    assert chances == {0: 1.0, 1: 0.0}


def test_a_score_far_above_those_of_other_models_is_believed_only_in_part():
    sizes, values, errors = np.arange(5.0), np.array([-0.01, -0.01, 0.01, -0.01, -0.01]), np.full(5, 0.01)
    expected = shrunk(sizes, values, errors)
    assert -0.01 < expected[2] < 0
    assert expected[4] == pytest.approx(-0.01)


def test_exact_differences_are_believed():
    sizes, values = np.arange(6.0), np.array([0.0, -0.02, 0.01, -0.05, 0.0, -0.01])
    assert shrunk(sizes, values, np.full(6, MIN_SPREAD / 100)) == pytest.approx(values, abs=1e-4)


@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=2))
def test_few_finalists_say_nothing_of_each_other(values):
    values = np.array(values)
    assert shrunk(np.arange(float(len(values))), values, np.full(len(values), 0.01)) == pytest.approx(values)


def test_of_models_chosen_for_their_size_as_many_keep_the_margin_as_their_chances_say():
    """Ten models whose true differences fall with the ratio, measured with noise; the smallest that is sure enough is chosen."""
    draw, sizes, error = np.random.default_rng(0), np.linspace(3, 6, 10), 0.006
    said, held, naive = [], [], []
    for _ in range(400):
        true = -0.004 * (sizes - 3) - np.abs(draw.normal(0, 0.003, 10))
        values = true + draw.normal(0, error, 10)
        chances = norm.cdf((shrunk(sizes, values, np.full(10, error)) + 0.01) / error)
        sure, near = np.flatnonzero(chances >= 0.7), np.flatnonzero(values >= -0.01)
        if len(sure):
            said.append(chances[sure[-1]])
            held.append(true[sure[-1]] >= -0.01)
        naive.append(true[near[-1]] >= -0.01)
    assert np.mean(held) == pytest.approx(np.mean(said), abs=0.06)
    assert np.mean(naive) < np.mean(held) - 0.2
