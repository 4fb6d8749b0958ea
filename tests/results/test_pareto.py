"""Laws of the Pareto front: it equals brute force, and its hypervolume equals a count of cells."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.results import pareto

coordinates = st.integers(0, 6)
pairs = st.lists(st.tuples(coordinates, coordinates), max_size=25)
triples = st.lists(st.tuples(coordinates, coordinates, coordinates), max_size=25)
points = pairs | triples | st.lists(st.tuples(*[coordinates] * 4), max_size=15)


def dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


@given(points)
def test_the_front_equals_brute_force(cloud):
    chosen = [cloud[i] for i in pareto.front(cloud)]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) == {p for p in cloud if not any(dominates(q, p) for q in cloud)}
    assert [p[1] for p in chosen] == sorted(p[1] for p in chosen)


@given(points)
def test_ranks_peel_fronts(cloud):
    found, rest, rank = pareto.ranks(cloud), np.arange(len(cloud)), 0
    while len(rest):
        peeled = rest[pareto.front([cloud[i] for i in rest])]
        assert (found[peeled] == rank).all()
        rest, rank = np.setdiff1d(rest, peeled), rank + 1


@given(points)
def test_hypervolume_counts_the_cells_below_the_front(cloud):
    objectives = len(cloud[0]) if cloud else 3
    cells = sum(
        any(all(x > i for x, i in zip(point, cell, strict=True)) for point in cloud)
        for cell in itertools.product(range(6), repeat=objectives)
    )
    assert pareto.hypervolume(cloud, (0,) * objectives) == pytest.approx(cells)


@given(points.filter(bool), st.data())
def test_a_contribution_is_what_the_hypervolume_loses_without_the_point(cloud, data):
    cloud = [cloud[i] for i in pareto.front(cloud)]
    index = data.draw(st.integers(0, len(cloud) - 1))
    origin = (1,) * len(cloud[0])
    rest = cloud[:index] + cloud[index + 1 :]
    lost = pareto.hypervolume(cloud, origin) - pareto.hypervolume(rest, origin)
    assert pareto.contributions(cloud, origin)[index] == pytest.approx(lost)


def test_hypervolume_ignores_what_is_below_the_reference():
    assert pareto.hypervolume([(1, 5), (5, 1)], (2, 2)) == 0.0


def test_knee_is_the_elbow():
    assert pareto.knee([(1.0, 1.0), (0.95, 9.0), (0.2, 10.0), (0.5, 5.0)]) == 1


def test_knee_of_two_points_is_the_best_score():
    assert pareto.knee([(0.5, 9.0), (0.9, 1.0)]) == 1


def test_knee_needs_a_point():
    with pytest.raises(ValueError, match="a knee needs at least one point"):
        pareto.knee([])
