"""Optuna's parameters and plans correspond one to one over a static space."""

import itertools
import re
from dataclasses import replace

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from torch import nn

from ranksearch.compress.inventory import count_params, inventory
from ranksearch.compress.surgery import skeleton_
from ranksearch.errors import PlanError, SpecError
from ranksearch.methods import METHODS
from ranksearch.plan import CP, KINDS, SVD, TT, Dense, Plan, Spatial, Tucker2
from ranksearch.strategy.space import level_of, make_space, rank_at
from tests.compress.test_inventory_skipped import SMALL_DEPTHWISE
from tests.nets import small

EXAMPLE = torch.ones(1, 1, 8, 8)
ALL = tuple(kind.method for kind in METHODS)
INVENTORY = inventory(small(), EXAMPLE)
SPACE = make_space(INVENTORY, ALL)
AXES = {axis.layer.name: axis for axis in SPACE.axes}
laws = settings(max_examples=60, deadline=None)


def inside(axis):
    """Every value that the axis can choose."""
    yield Dense()
    for method in axis.methods:
        for ranks in itertools.product(*method.rank_ranges(axis.layer)):
            if method.shrinks(axis.layer, ranks):
                yield method.value(axis.layer, ranks)


VALUES = {name: list(inside(axis)) for name, axis in AXES.items()}
plans = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()}).map(Plan.of)
params = st.fixed_dictionaries(
    {
        name: st.sampled_from(kind.choices) if isinstance(kind, CategoricalDistribution) else st.floats(kind.low, kind.high)
        for name, kind in SPACE.distributions().items()
    }
)


# --- levels and ranks ---


@pytest.mark.parametrize("step", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100, 511, 4096])
def test_every_rank_has_a_level_that_gives_it_back(count, step):
    ranks = range(step, count * step + 1, step)
    levels = [level_of(rank, ranks) for rank in ranks]
    assert [rank_at(level, ranks) for level in levels] == list(ranks)
    assert levels == sorted(levels)
    assert levels[0] == 0
    assert levels[-1] == (1 if count > 1 else 0)


@laws
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 5000), st.integers(1, 64))
def test_ranks_rise_with_levels_and_are_those_offered(one, other, count, step):
    low, high = sorted((one, other))
    ranks = range(step, count * step + 1, step)
    assert rank_at(low, ranks) <= rank_at(high, ranks)
    assert {rank_at(low, ranks), rank_at(high, ranks)} <= set(ranks)
    assert (rank_at(0, ranks), rank_at(1, ranks)) == (ranks[0], ranks[-1])


@given(st.integers(1, 500), st.integers(1, 500), st.integers(2, 64))
def test_a_rank_that_is_not_offered_has_the_level_of_the_nearest_end(count, more, step):
    ranks = range(step, count * step + 1, step)
    assert rank_at(level_of(ranks[-1] + more, ranks), ranks) == ranks[-1]
    assert rank_at(level_of(1, ranks), ranks) == ranks[0]


# --- plans and parameters ---


@pytest.mark.parametrize("name", AXES)
def test_every_value_inside_is_chosen_by_its_parameters(name):
    axis = AXES[name]
    assert {type(value).method for value in VALUES[name]} == {"dense", *(method.kind.method for method in axis.methods)}
    for value in VALUES[name]:
        assert axis.factorization(axis.params(value)) == value


@laws
@given(plans)
def test_a_plan_is_chosen_by_its_parameters(plan):
    found = SPACE.params(plan)
    assert SPACE.plan(found) == plan
    assert found.keys() == SPACE.distributions().keys()
    for name, kind in SPACE.distributions().items():
        assert kind._contains(kind.to_internal_repr(found[name]))


@laws
@given(params)
def test_any_parameters_choose_a_plan_inside(chosen):
    plan = SPACE.plan(chosen)
    assert all(plan[name] in VALUES[name] for name in AXES)
    assert SPACE.plan(SPACE.params(plan)) == plan


@laws
@given(params)
def test_any_parameters_choose_a_model_that_can_be_built_at_the_cost_promised(chosen):
    plan = SPACE.plan(chosen)
    model = skeleton_(small(), plan)
    saved = {name: INVENTORY[name].params - METHODS[type(value)].params(INVENTORY[name], value.ranks) for name, value in plan}
    assert all(more > 0 for more in saved.values())
    assert count_params(model) == INVENTORY.params - sum(saved.values())
    assert model.eval()(EXAMPLE).shape == (1, 10)


@pytest.mark.parametrize("method", ALL)
def test_ranks_that_do_not_pay_are_dense(method):
    axis = AXES["fc1"]
    names = [f"fc1.{method}.{rank}" for rank in KINDS[method].rank_names()]
    full, least = ({"fc1.method": method} | dict.fromkeys(names, level) for level in (1.0, 0.0))
    most = tuple(ranks[-1] for ranks in METHODS[KINDS[method]].rank_ranges(axis.layer))
    shrinks = METHODS[KINDS[method]].shrinks(axis.layer, most)
    assert (axis.factorization(full) != Dense()) == shrinks
    assert set(axis.factorization(least).ranks) == {1}


def test_the_levels_of_several_ranks_are_not_mixed_up():
    chosen = {"conv2.method": "tucker2", "conv2.tucker2.rank_out": 1.0, "conv2.tucker2.rank_in": 0.0}
    assert AXES["conv2"].factorization(chosen) == Tucker2(rank_in=1, rank_out=16)
    chosen = {"conv2.method": "tt", "conv2.tt.rank_in": 0.0, "conv2.tt.rank_mid": 1.0, "conv2.tt.rank_out": 0.0}
    _, rank_mid, _ = AXES["conv2"].rank_ranges[TT]
    assert AXES["conv2"].factorization(chosen) == TT(rank_in=1, rank_mid=rank_mid[-1], rank_out=1)


def test_ranks_of_methods_that_are_not_chosen_have_a_fixed_level():
    found = SPACE.params(Plan.of({"conv2": Tucker2(2, 3)}))
    others = {name for name in found if not name.endswith(".method") and not name.startswith("conv2.tucker2.")}
    assert {found[name] for name in others} == {0.5}


# --- the space ---


def test_distributions_are_static():
    wanted = SPACE.distributions()
    torch.manual_seed(7)
    again = make_space(inventory(small(), EXAMPLE), ALL).distributions()
    assert list(again.items()) == list(wanted.items())
    for name, kind in wanted.items():
        layer, *rank = name.split(".")
        if rank == ["method"]:
            assert kind == CategoricalDistribution(["dense", *(method.kind.method for method in AXES[layer].methods)])
        else:
            assert kind == FloatDistribution(0.0, 1.0)
            assert rank[1] in KINDS[rank[0]].rank_names()


def test_optuna_samples_the_space():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = set()
    for _ in range(20):
        trial = study.ask(SPACE.distributions())
        found.add(SPACE.plan(trial.params))
    assert len(found) > 10


def test_layers_come_in_call_order_with_the_methods_that_pay():
    assert list(AXES) == ["conv1", "conv2", "fc1", "fc2"]
    for name, axis in AXES.items():
        for method in METHODS.values():
            suits = method.applies(axis.layer.weight, linear=axis.layer.kind == "Linear")
            shrinks = suits and method.shrinks(axis.layer, (1,) * len(method.kind.rank_names()))
            assert (method in axis.methods) == shrinks, (name, method.kind.method)


def test_every_rank_of_every_method_has_a_parameter():
    assert make_space(INVENTORY, ["tt", "tucker2"], layers=["conv2"]).distributions().keys() == {
        "conv2.method", "conv2.tucker2.rank_in", "conv2.tucker2.rank_out", "conv2.tt.rank_in", "conv2.tt.rank_mid",
        "conv2.tt.rank_out",
    }  # fmt: skip
    assert make_space(INVENTORY, ["cp"]).distributions().keys() == {
        f"{name}.{what}" for name in ("conv1", "conv2", "fc1") for what in ("method", "cp.rank")
    }


def test_no_two_parameters_share_a_name():
    """Even if a layer is called `a.cp` beside a layer `a`."""
    layers = [replace(INVENTORY["conv2"], name=name) for name in ("a", "a.cp", "a.cp.rank", "a.method")]
    space = make_space(replace(INVENTORY, layers=tuple(layers)), ALL)
    assert len(space.distributions()) == sum(len(axis.distributions()) for axis in space.axes)


def test_layers_can_be_chosen_and_skipped():
    def names(**options):
        return [axis.layer.name for axis in make_space(INVENTORY, ALL, **options).axes]

    assert names(layers=["fc2", "conv1"]) == ["conv1", "fc2"]
    assert names(skip=["fc2", "conv1"]) == ["conv2", "fc1"]
    assert names(layers=["fc2", "conv1"], skip=["conv1"]) == ["fc2"]
    assert names(skip=[]) == names(layers=[]) == list(AXES)


def test_patterns_choose_the_layers_that_they_match():
    def names(**options):
        return [axis.layer.name for axis in make_space(INVENTORY, ALL, **options).axes]

    assert names(layers=["conv*"]) == ["conv1", "conv2"]
    assert names(layers=["fc?", "conv1"]) == ["conv1", "fc1", "fc2"]
    assert names(skip=["conv[!1]", "fc2"]) == ["conv1", "fc1"]
    assert names(layers=["*1"], skip=["fc*"]) == ["conv1"]
    with pytest.raises(SpecError, match="but 'CONV\\*' matches none"):
        names(layers=["CONV*"])


def test_a_pattern_takes_the_layers_that_can_be_decomposed_and_leaves_the_others():
    assert [axis.layer.name for axis in make_space(grouped(), ALL, layers=["*"]).axes] == ["0"]


# --- messages ---


def grouped(count=1):
    depthwise = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(count))
    return inventory(nn.Sequential(nn.Conv2d(1, 4, 3), *depthwise), EXAMPLE)


@pytest.mark.parametrize("key", ["layers", "skip"])
@pytest.mark.parametrize(
    ("found", "name", "rest"),
    [
        (INVENTORY, "conv3", "but 'conv3' matches none. Did you mean 'conv2'?"),
        (INVENTORY, "x", "but 'x' matches none. Valid: conv1, conv2, fc1, fc2."),
        (grouped(), "1", f"but '1' matches none. Skipped: {SMALL_DEPTHWISE}."),
        (INVENTORY, "conv[3-9]", "but 'conv[3-9]' matches none. Valid: conv1, conv2, fc1, fc2."),
        (INVENTORY, "cnov*", "but 'cnov*' matches none. Did you mean 'conv2'?"),
        (grouped(), "[1-9]", f"but '[1-9]' matches none. Skipped: 1 ({SMALL_DEPTHWISE})."),
        (
            grouped(5),
            "[1-9]",
            f"but '[1-9]' matches none. Skipped: {', '.join(f'{at} ({SMALL_DEPTHWISE})' for at in (1, 2, 3))}, 2 more.",
        ),
    ],
)
def test_a_name_that_is_no_layer_is_refused(key, found, name, rest):
    message = f"space.{key} must name layers that can be decomposed, {rest}"
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        make_space(found, ALL, **{key: [name]})


def test_a_space_of_nothing_is_refused():
    message = "The search needs a layer to decompose, but svd, spatial make none of ['0'] smaller."
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        make_space(inventory(nn.Sequential(nn.Conv2d(1, 2, (1, 3))), EXAMPLE), ["svd", "spatial"])
    message = (
        "The search needs a layer to decompose, but space.layers and space.skip leave none of ['conv1', 'conv2', 'fc1', 'fc2']."
    )
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        make_space(INVENTORY, ALL, layers=["fc2"], skip=["fc*"])


@pytest.mark.parametrize("value", [Spatial(1), CP(1)])
def test_a_value_of_another_method_is_refused(value):
    message = f"Layer 'fc1' may not be stored as {value.title} in this study; add it to space.methods."
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        make_space(INVENTORY, ["svd"]).params(Plan.of({"fc1": value}))
    assert make_space(INVENTORY, ["svd"]).plan(make_space(INVENTORY, ["svd"]).params(Plan.of({"fc1": SVD(3)})))


@pytest.mark.parametrize("name", AXES)
def test_every_value_that_parameters_choose_is_taken(name):
    for value in VALUES[name]:
        if value.ranks:
            AXES[name].check(value)
