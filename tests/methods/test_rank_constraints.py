"""Rank constraints hold wherever ranks are chosen: a layer shrinks in the given costs, and ranks are multiples."""

import functools
import itertools
import math
import re

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import ranksearch
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.errors import SpecError
from ranksearch.methods import METHODS, RankConstraints
from ranksearch.methods.base import MAX_CANDIDATES, MAX_RANK_VALUES
from ranksearch.methods.parts import built
from ranksearch.plan import CP, CP4, SVD, Dense, Plan, Spatial, Tucker2
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import Outcome
from ranksearch.results.objectives import Objectives
from ranksearch.spec import COSTS, Space
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.prior import at_vbmf, quarter_ranks, vbmf_plans
from ranksearch.strategy.space import applies, make_space
from ranksearch.study.facts import look
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests.conftest import small_spec, tiny_spec
from tests.geometries import BY_NAME, PAIRS, given_geometry
from tests.nets import small

EXAMPLE = torch.ones(1, 1, 8, 8)
INVENTORY = inventory(small(), EXAMPLE)
ALL = tuple(BY_NAME)
SHRINKS = [("params",), ("macs",), ("params", "macs")]
contract = pytest.mark.parametrize(("geometry", "name"), PAIRS)
laws = settings(max_examples=60, deadline=None)
# torch warns that an even kernel with padding 'same' pads one side more, as intended.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
offers = st.builds(RankConstraints, st.integers(1, 20), st.sampled_from(SHRINKS))


def shrinks(method, layer, ranks, constraints):
    pairs = {
        "params": (method.params(layer, ranks), layer.params),
        "macs": (method.macs(layer, ranks), layer.macs),
    }
    return all(pairs[cost][0] < pairs[cost][1] for cost in constraints.smaller_in)


def allowed(method, layer, constraints):
    """For each rank of a method, the values that the rule about multiples allows."""
    pairs = zip(method.bounds(layer.weight), method.limits(layer.weight), strict=True)
    return [
        [r for r in range(1, limit + 1) if r % constraints.multiple == 0 or r == bound < constraints.multiple]
        for bound, limit in pairs
    ]


def obeys(method, layer, ranks, constraints):
    return all(rank in kind for rank, kind in zip(ranks, allowed(method, layer, constraints), strict=True))


def all_candidates(method, layer, constraints):
    """All candidates by brute force: ranks that are allowed multiples and at which the layer shrinks."""
    return {
        ranks for ranks in itertools.product(*allowed(method, layer, constraints)) if shrinks(method, layer, ranks, constraints)
    }


def is_cheaper_at_its_end(method, layer, axis):
    """Whether a part is not built at the last rank, so that it may pay where a smaller rank does not."""
    bounds = method.bounds(layer.weight)
    before = tuple(bound - (at == axis) for at, bound in enumerate(bounds))
    return len(built(method.parts(layer.weight, bounds))) < len(built(method.parts(layer.weight, before)))


def is_offered(axis, value):
    """Whether `values(axis)` holds the value, without making them all."""
    method = METHODS.get(type(value))
    return value == Dense() or (
        method in axis.methods
        and value == method.value(axis.layer, value.ranks)
        and obeys(method, axis.layer, value.ranks, axis.constraints)
        and shrinks(method, axis.layer, value.ranks, axis.constraints)
    )


@functools.cache
def space_of(constraints):
    try:
        return make_space(INVENTORY, ALL, constraints=constraints)
    except SpecError:
        return None


def values(axis):
    """Every value that the axis can choose."""
    found = ((method, ranks) for method in axis.methods for ranks in all_candidates(method, axis.layer, axis.constraints))
    return [Dense(), *(method.value(axis.layer, ranks) for method, ranks in found)]


# --- one layer ---


@contract
@pytest.mark.parametrize("smaller_in", SHRINKS, ids="+".join)
def test_what_is_offered_is_what_the_law_leaves(geometry, name, smaller_in):
    method, layer = BY_NAME[name], given_geometry(geometry)[2]
    for constraints in (RankConstraints(multiple, smaller_in) for multiple in (1, 2, 3, 4, 8)):
        wanted, kinds, grid = (
            all_candidates(method, layer, constraints),
            method.rank_ranges(layer, constraints),
            method.rank_grid(layer, constraints),
        )
        assert {ranks for ranks in itertools.product(*kinds) if method.shrinks(layer, ranks, constraints)} == wanted
        assert set(grid) <= wanted
        assert len(set(grid)) == len(grid)
        assert applies(method, layer, constraints) == bool(wanted) == bool(grid) == all(kinds)
        for axis, kind in enumerate(kinds):
            paying = sorted({ranks[axis] for ranks in wanted})
            assert list(kind) == paying or (
                paying[0] == kind[0] and paying[-1] == kind[-1] and is_cheaper_at_its_end(method, layer, axis)
            )
            assert not kind or {kind[0], kind[-1]} <= {ranks[axis] for ranks in grid}


@contract
def test_without_constraints_the_grid_is_log_spaced_from_one_to_the_largest_that_pays(geometry, name):
    method, layer = BY_NAME[name], given_geometry(geometry)[2]

    def fewer(ranks):
        return method.params(layer, ranks) < layer.params

    axes, levels = [], {1: MAX_RANK_VALUES, 2: MAX_RANK_VALUES, 3: 5}[len(method.limits(layer.weight))]
    for axis, limit in enumerate(method.limits(layer.weight)):
        others = (1,) * len(method.limits(layer.weight))
        paying = [r for r in range(1, limit + 1) if fewer((*others[:axis], r, *others[axis + 1 :]))]
        steps = [math.exp(math.log(max(paying, default=1)) * step / (levels - 1)) for step in range(levels)]
        axes.append(sorted({round(step) for step in steps}))
    assert method.rank_grid(layer) == [ranks for ranks in itertools.product(*axes) if fewer(ranks)]
    assert method.rank_grid(layer, RankConstraints()) == method.rank_grid(layer)
    assert len(method.rank_grid(layer)) <= MAX_CANDIDATES


@contract
@settings(max_examples=5, deadline=None)
@given(constraints=offers, estimate=st.tuples(st.integers(1, 40), st.integers(1, 40)), scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_what_vbmf_suggests_is_the_nearest_that_is_offered(geometry, name, constraints, estimate, scale):
    method, layer = BY_NAME[name], given_geometry(geometry)[2]
    if applies(method, layer, constraints):
        kinds, wanted = method.rank_ranges(layer, constraints), method.from_vbmf(*estimate)
        found = at_vbmf(method, layer, estimate, scale, constraints=constraints)
        for rank, kind, aim in zip(found, kinds, wanted, strict=True):
            assert rank in kind
            assert abs(rank - aim * scale) == min(abs(other - aim * scale) for other in kind)
        assert all(rank in kind for rank, kind in zip(quarter_ranks(method, layer, constraints), kinds, strict=True))


def test_a_rank_that_cannot_reach_the_multiple_is_held_at_its_bound():
    layer = inventory(nn.Sequential(nn.Conv2d(3, 64, 3)), torch.ones(1, 3, 8, 8)).layers[0]
    rank_in, rank_out = METHODS[Tucker2].rank_ranges(layer, RankConstraints(8))
    assert list(rank_in) == [3]
    assert list(rank_out) == [8, 16]
    assert METHODS[Tucker2].rank_ranges(layer)[1][-1] > 16


def test_ranks_at_which_als_takes_an_hour_are_not_offered():
    """For the first fully connected layer of VGG-16. A plan made by hand may use ranks up to the bound."""
    for method in (METHODS[CP], METHODS[CP4]):
        assert method.limits((4096, 512, 7, 7)) == (512,)
        assert method.bounds((4096, 512, 7, 7))[0] > 512


def test_no_rank_beyond_the_limit_is_offered_to_reach_the_multiple():
    """CP at rank 8 would have fewer parameters here, but more terms than ALS can tell apart."""
    layer = inventory(nn.Sequential(nn.Conv2d(4, 4, 3)), torch.ones(1, 4, 8, 8)).layers[0]
    assert METHODS[CP].shrinks(layer, (8,))
    assert METHODS[CP].limits(layer.weight) == (4,)
    assert not applies(METHODS[CP], layer, RankConstraints(8))
    assert METHODS[CP].rank_grid(layer, RankConstraints(8)) == []


# --- a space ---


@laws
@given(offers, st.data())
def test_any_parameters_choose_a_plan_that_is_offered(constraints, data):
    space = space_of(constraints)
    if space:
        kinds = space.distributions().items()
        plan = space.plan(
            {key: data.draw(st.sampled_from(getattr(kind, "choices", [0.0, 0.3, 0.7, 1.0]))) for key, kind in kinds}
        )
        assert all(is_offered(axis, plan[axis.layer.name]) for axis in space.axes)
        assert space.plan(space.params(plan)) == plan


@pytest.mark.parametrize(
    ("multiple", "smaller_in"),
    [pytest.param(1, ("params",), marks=pytest.mark.slow), *itertools.product([2, 3, 5, 8, 16], SHRINKS)],
    ids=str,
)
def test_every_value_that_is_offered_is_chosen_by_its_parameters(multiple, smaller_in):
    for axis in space_of(RankConstraints(multiple, smaller_in)).axes:
        for value in values(axis):
            assert axis.factorization(axis.params(value)) == value


@pytest.mark.parametrize(
    "constraints",
    [RankConstraints(1, ("macs",)), RankConstraints(3), RankConstraints(4, ("params", "macs")), RankConstraints(8)],
    ids=str,
)
def test_initial_plans_and_profiles_use_only_offered_ranks(trained, constraints):
    space = space_of(constraints)
    layers = profile(trained.model, INVENTORY, {axis.layer.name: axis.methods for axis in space.axes}, constraints=constraints)
    plans = [plan for _, plan in vbmf_plans(space, layers.vbmf)]
    assert plans
    for plan in plans:
        assert space.plan(space.params(plan)) == plan
    for axis in space.axes:
        candidates = list(layers.layers[axis.layer.name].candidates())
        assert {METHODS[type(candidate.value)] for candidate in candidates} == set(axis.methods)
        for candidate in candidates:
            assert obeys(METHODS[type(candidate.value)], axis.layer, candidate.value.ranks, constraints)
            assert candidate.params < axis.layer.params or "params" not in constraints.smaller_in
            assert candidate.macs < axis.layer.macs or "macs" not in constraints.smaller_in
        for value in values(axis)[1::7]:
            assert layers.layers[axis.layer.name].factors(value)


def test_other_ranks_are_another_file_of_the_profile(trained, tmp_path):
    counts = []
    for constraints in (RankConstraints(), RankConstraints(2), RankConstraints(2), RankConstraints()):
        profile(trained.model, INVENTORY, {"conv2": [METHODS[CP]]}, constraints=constraints, cache=tmp_path)
        counts.append(len(list(tmp_path.glob("conv2*"))))
    assert counts == [1, 2, 2, 2]


def test_a_space_of_nothing_says_what_was_asked_for():
    message = (
        "The search needs a layer to decompose, but svd make none of ['conv1', 'conv2', 'fc1', 'fc2'] smaller in params and "
        "macs (space.smaller_in) at ranks that are multiples of 64 (space.rank_multiple)."
    )
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        make_space(INVENTORY, ["svd"], constraints=RankConstraints(64, ("params", "macs")))


# --- a study ---


def wide_margin():
    """A convolution with an output much larger than its input: it can save multiply-accumulates, but no parameters."""
    return inventory(nn.Sequential(nn.Conv2d(4, 4, 3, padding=3)), torch.ones(1, 4, 4, 4))


@pytest.mark.parametrize(("plan", "runs"), [(Plan.of({"0": Spatial(7)}), True), (Plan(), False)], ids=["larger", "dense"])
def test_a_plan_is_not_smaller_only_where_nothing_that_must_shrink_does(plan, runs):
    found = wide_margin()
    space = make_space(found, ALL, constraints=RankConstraints(1, ("macs",)))
    assert space.plan(space.params(plan)) == plan
    study = optuna.create_study(directions=["maximize", "maximize"])
    ledger = Ledger(
        study, Bases.of(space, found), [("given", plan), ("given", Plan.of({"0": Spatial(2)}))], sampler="tpe", seed=0, dense_score=0,
        limits=UNLIMITED, objectives=Objectives(dense=found.costs),
    )  # fmt: skip
    job = next(ledger.jobs(2))
    assert (job.plan == plan) == runs
    assert [trial.outcome for trial in ledger.records()] == ([] if runs else [Outcome.NOT_SMALLER])
    if runs:
        assert METHODS[Spatial].params(found["0"], (7,)) > found["0"].params


@pytest.mark.slow
def test_a_study_uses_only_offered_ranks(bare, tmp_path):
    spec = tiny_spec("space.rank_multiple=4", "space.smaller_in=['params', 'macs']", "search.trials=7")
    record = run_study(spec, tmp_path / "small", Options(Local(0)))
    constraints = RankConstraints(4, ("params", "macs"))
    found = [(name, value) for trial in record.trials for name, value in trial.plan]
    assert found
    for name, value in found:
        assert obeys(METHODS[type(value)], INVENTORY[name], value.ranks, constraints)
        assert shrinks(METHODS[type(value)], INVENTORY[name], value.ranks, constraints)
    assert record.facts.spec["space"]["rank_multiple"] == 4
    for path in (tmp_path / "small" / "profile").glob("conv2*"):
        ranks = {int(name.split("/")[1].split(".")[0]) for name in load_file(path) if name.startswith("cp/")}
        assert ranks == {rank for (rank,) in METHODS[CP].rank_grid(INVENTORY["conv2"], constraints)}


def test_layers_are_shown_at_ranks_that_are_offered(tmp_path):
    shown = look(small_spec("space.rank_multiple=4", "space.skip=['conv1']"), tmp_path).costs
    ranks = [rank for costs in shown.values() for text, _ in costs for rank in map(int, re.findall(r"\d+", text.split()[-1]))]
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)


def test_the_costs_of_a_study_file_are_those_of_a_method():
    layer = INVENTORY["fc2"]
    assert METHODS[SVD].shrinks(layer, (1,), RankConstraints(1, tuple(cost for cost in COSTS if cost in layer.costs)))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Space(rank_multiple=0), "space.rank_multiple must be at least 1, but got 0."),
        (Space(smaller_in=()), "space.smaller_in must be at least one of params, macs, latency, but got ()."),
        (Space(smaller_in=["mac"]), "space.smaller_in must name known costs, but got 'mac'. Did you mean 'macs'?"),
    ],
)
def test_constraints_from_python_are_checked(trained, tmp_path, wish, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        ranksearch.search(trained, out=tmp_path / "mine", space=wish)
    assert not list(tmp_path.iterdir())
