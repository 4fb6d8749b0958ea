"""Plans at the ranks that VBMF estimates."""

from __future__ import annotations

import pytest

from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.data import example
from ranksearch.errors import PlanError
from ranksearch.methods import METHODS
from ranksearch.plan import CP, CP4, Dense, Plan, Tucker2
from ranksearch.strategy.prior import RANK_SCALES, at_vbmf, vbmf_plans
from ranksearch.strategy.space import make_space


@pytest.fixture(scope="module")
def start(trained):
    found = inventory(trained.model, example(trained.data.train))
    space = make_space(found, ("tucker2", "cp", "svd"))
    layers = profile(trained.model, found, {axis.layer.name: axis.methods for axis in space.axes})
    return space, layers


def test_vbmf_plans_are_inside_the_space_and_differ(start):
    space, layers = start
    plans = list(vbmf_plans(space, layers.vbmf, RANK_SCALES))
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


def test_a_plan_outside_the_space_is_refused(start):
    space, _ = start
    with pytest.raises(PlanError, match=r"Layer 'conv1' may not be stored as CP-4 in this study; add it to space.methods"):
        space.params(Plan.of({"conv1": CP4(2)}))
    assert space.plan(space.params(Plan()))["conv1"] == Dense()
