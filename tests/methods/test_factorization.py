"""One contract for every method and geometry: exact at full rank, cost formulas equal counted costs, modules match kernels."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranksearch.compress.surgery import factorize_, kernel_of
from ranksearch.methods.groups import stack
from ranksearch.methods.layer import CONVOLUTIONS, TRANSPOSED, as_kernel, as_weight
from tests.geometries import (
    BY_NAME,
    GEOMETRIES,
    PAIRS,
    alone,
    assert_close,
    counted_macs,
    fitting,
    given_geometry,
    prepared,
    some_ranks,
)
from tests.nets import normal

PLAIN = {nn.Sequential, *CONVOLUTIONS, nn.Linear, nn.Unflatten, nn.Flatten}
laws = settings(max_examples=40, deadline=None)
# torch warns that an even kernel with padding 'same' pads one side more, as intended.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


contract = pytest.mark.parametrize(("geometry", "name"), PAIRS)


def factorized(model, layer, method, ranks, seed=0):
    return factorize_(copy.deepcopy(model), {"layer": method.value(layer, ranks)}, seed=seed)


def factors_of(model, layer, method, ranks, seed=0):
    kernel = kernel_of("layer", model.layer, method.value(layer, ranks))
    kernels = [one.reshape(layer.weight) for one in kernel.tensor_split(layer.groups)]
    return kernel, stack([method.factors(one, method.prepare(one, [ranks], seed), ranks, seed) for one in kernels])


def check_identity(model, inputs, layer, method):
    """At full rank the module computes the dense layer, for a batch too."""
    several = torch.cat([inputs, normal(*inputs.shape, seed=5)])
    full = factorized(model, layer, method, method.bounds(layer.weight))
    assert_close(full(several), model(several))


def check_costs(model, inputs, layer, method):
    """The formulas for parameters and multiply-accumulates give the numbers counted on the modules."""
    for ranks in some_ranks(method, layer):
        built = factorized(model, layer, method, ranks)
        params = sum(parameter.numel() for parameter in built.layer.parameters())
        assert method.params(layer, ranks) == params
        assert method.macs(layer, ranks) == counted_macs(built, inputs)
        assert method.shrinks(layer, ranks) == (params < sum(parameter.numel() for parameter in model.layer.parameters()))


def check_reconstruction(model, inputs, layer, method):
    """The modules compute the dense layer with the reconstructed kernel, and the factors have the promised shapes."""
    for ranks in some_ranks(method, layer):
        kernel, factors = factors_of(model, layer, method, ranks)
        assert tuple(tuple(factor.shape) for factor in factors) == method.factor_shapes(layer.weight, ranks, layer.groups)
        rebuilt = method.reconstruct(factors, layer.weight, layer.groups)
        assert rebuilt.numel() == kernel.numel()
        dense = copy.deepcopy(model)
        with torch.no_grad():
            dense.layer.weight.copy_(as_weight(dense.layer, rebuilt))
        assert_close(factorized(model, layer, method, ranks)(inputs), dense(inputs))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_methods_suit_the_shapes_they_are_for(geometry):
    *_, layer = given_geometry(geometry)
    assert {method.kind.method for method in fitting(layer)} == GEOMETRIES[geometry][2]


@contract
def test_full_rank_is_the_layer(geometry, name):
    check_identity(*given_geometry(geometry), BY_NAME[name])


@contract
def test_costs_are_the_counted_ones(geometry, name):
    check_costs(*given_geometry(geometry), BY_NAME[name])


@contract
def test_modules_compute_the_reconstructed_kernel(geometry, name):
    check_reconstruction(*given_geometry(geometry), BY_NAME[name])


def is_needless(part, other):
    """Whether the weight of `part` can be multiplied into that of `other`, its neighbour, without making that larger."""
    groups, (out, into, *positions) = getattr(part, "groups", 1), as_kernel(part, part.weight).shape
    square = math.prod(positions) == 1 and out == groups * into
    return square and max(getattr(part, "stride", (1,))) == 1 and getattr(other, "groups", 1) == groups


@contract
def test_no_part_is_built_whose_work_a_neighbour_can_do(geometry, name):
    model, _, layer = given_geometry(geometry)
    offered = [ranks for ranks in some_ranks(BY_NAME[name], layer) if BY_NAME[name].shrinks(layer, ranks)]
    for ranks in offered:
        module = factorized(model, layer, BY_NAME[name], ranks).layer
        parts = [part for part in module if hasattr(part, "weight")]
        for one, other in itertools.pairwise(parts):
            assert not is_needless(one, other)
            assert not is_needless(other, one)


@contract
def test_work_is_of_the_parts_that_are_built(geometry, name):
    *_, layer = given_geometry(geometry)
    method = BY_NAME[name]
    count = len(method.parts(layer.weight, method.bounds(layer.weight)))
    for ranks in some_ranks(method, layer):
        built, *macs, passed, params = method.work(layer, ranks)
        assert (sum(macs[:count]), params) == (method.macs(layer, ranks), method.params(layer, ranks))
        assert built == sum(amount > 0 for amount in macs[:count])
        assert len(macs) == 2 * count
        assert all(exact <= in_blocks for exact, in_blocks in zip(macs[:count], macs[count:], strict=True))
        assert (passed == 0) == (sum(amount > 0 for amount in macs[:count]) == 1)


def test_at_the_number_of_input_channels_tucker_2_is_tucker_1():
    model, _, layer = given_geometry("conv2d three inputs")
    method = BY_NAME["tucker2"]
    names = {ranks: [name for name, _ in factorized(model, layer, method, ranks).layer.named_children()] for ranks in RANKS}
    assert names == RANKS
    assert method.params(layer, (3, 4)) == 3 * 4 * 9 + 4 * 8 + 8
    assert method.params(layer, (2, 8)) == 3 * 2 + 2 * 8 * 9 + 8
    assert method.params(layer, (3, 8)) == layer.params


RANKS = {
    (2, 4): ["reduce", "core", "expand"],
    (3, 4): ["core", "expand"],
    (2, 8): ["reduce", "core"],
    (3, 8): ["core"],
}  # fmt: skip


@st.composite
def convolutions(draw):
    """A convolution of 1 to 3 dimensions with any settings that torch accepts, and a fitting size of an input."""
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    kernel, dilation, mode = each(1, 4), each(1, 2), draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid"]) | st.just(0)) or each(0, 2)
    stride = (1,) * dims if padding == "same" else each(1, 3)
    # Larger than the kernel and than reflected or circular padding.
    size = tuple(d * (k - 1) + 2 + more for d, k, more in zip(dilation, kernel, each(1, 2), strict=True))
    channels, out, groups = (draw(st.integers(1, 4)) for _ in range(3))
    groups = groups if channels * out > 1 else 1  # small depthwise convolutions are not decomposed
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        groups * channels, groups * out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
    )
    return alone(layer), (groups * channels, *size)


@st.composite
def transposed_convolutions(draw):
    """A transposed convolution of 1 to 3 dimensions with any settings that torch accepts, and a fitting size of an input."""
    dims = draw(st.integers(1, 3))

    def each(low, *high):
        return tuple(draw(st.integers(low, most)) for most in (high if len(high) == dims else high * dims))

    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    output_padding = each(0, *(max(pair) - 1 for pair in zip(stride, dilation, strict=True)))
    # Padding crops at most the whole kernel; larger inputs leave an output.
    around = [apart * (k - 1) for apart, k in zip(dilation, kernel, strict=True)]
    padding, size = each(0, *around), tuple(1 + both + more for both, more in zip(around, each(1, 2), strict=True))
    channels, out, groups = (draw(st.integers(1, 4)) for _ in range(3))
    groups = groups if channels * out > 1 else 1
    layer = TRANSPOSED[dims - 1](
        groups * channels, groups * out, kernel, stride, padding, output_padding, groups, draw(st.booleans()), dilation
    )
    return alone(layer), (groups * channels, *size)


@laws
@given(convolutions() | transposed_convolutions(), st.integers(0, 1000))
def test_the_contract_holds_for_any_convolution(geometry, seed):
    model, inputs, layer = prepared(*geometry, seed=seed)
    methods = fitting(layer)
    assert methods or layer.weight[:2] == (1, 1)
    for method in methods:
        check_identity(model, inputs, layer, method)
        check_costs(model, inputs, layer, method)
        check_reconstruction(model, inputs, layer, method)


@contract
def test_only_plain_modules_come_out(geometry, name):
    model, _, layer = given_geometry(geometry)
    built = factorized(model, layer, BY_NAME[name], (1,) * len(BY_NAME[name].bounds(layer.weight)))
    assert {type(module) for module in built.layer.modules()} <= PLAIN
    assert len(list(built.layer.parameters())) > len(list(model.layer.parameters()))


@contract
def test_limits_lie_within_bounds(geometry, name):
    *_, layer = given_geometry(geometry)
    limits, bounds = BY_NAME[name].limits(layer.weight), BY_NAME[name].bounds(layer.weight)
    assert len(limits) == len(bounds) == len(BY_NAME[name].kind.rank_names())
    assert all(1 <= limit <= bound for limit, bound in zip(limits, bounds, strict=True))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_layer_never_grows(name):
    method = BY_NAME[name]
    *_, layer = given_geometry("linear behind a map")
    grid = method.rank_grid(layer)
    assert grid
    assert all(method.params(layer, ranks) < layer.params for ranks in grid)
    assert not method.shrinks(layer, method.bounds(layer.weight))


@pytest.mark.parametrize("name", ["svd", "spatial", "tucker2"])
@settings(max_examples=12, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(2, 4)] * 2), st.integers(0, 1000))
def test_errors_fall_as_ranks_grow(name, shape, seed):
    method, kernel = BY_NAME[name], normal(*shape, seed=seed)
    ready = method.prepare(kernel, [], 0)

    def error(ranks):
        return float((method.reconstruct(method.factors(kernel, ready, ranks, 0), shape) - kernel).norm() / kernel.norm())

    bounds = method.bounds(shape)
    errors = {ranks: error(ranks) for ranks in itertools.product(*(range(1, bound + 1) for bound in bounds))}
    assert errors[bounds] < 1e-12
    for ranks, found in errors.items():
        for axis in range(len(ranks)):
            above = (*ranks[:axis], ranks[axis] + 1, *ranks[axis + 1 :])
            assert errors.get(above, 0) <= found + 1e-12


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=12, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(2, 4)] * 2), st.integers(0, 1000), st.integers(0, 3))
def test_refining_keeps_the_ranks_and_raises_no_error(name, shape, seed, sweeps):
    method, kernel = BY_NAME[name], normal(*shape, seed=seed)
    ranks = tuple((bound + 1) // 2 for bound in method.bounds(shape))

    def error(factors):
        return float((method.reconstruct(factors, shape) - kernel).norm() / kernel.norm())

    ready = method.prepare(kernel, [ranks], 0)
    factors, refined = (method.factors(kernel, ready, ranks, 0, more) for more in (0, sweeps))
    assert tuple(tuple(factor.shape) for factor in refined) == method.factor_shapes(shape, ranks)
    assert error(refined) <= error(factors) * (1 + 1e-6) + 1e-12
    if name in ("svd", "spatial") or not sweeps:
        assert all(torch.equal(one, other) for one, other in zip(factors, refined, strict=True))


@pytest.mark.parametrize("name", ["tucker2", "cp", "cp4", "tt"])
def test_refining_lowers_the_error(name):
    method, kernel = BY_NAME[name], normal(8, 7, 3, 3, seed=4)
    ranks = (3,) * len(method.bounds(kernel.shape))
    ready = method.prepare(kernel, [ranks], 0)
    both = [method.factors(kernel, ready, ranks, 0, sweeps) for sweeps in (0, 50)]
    before, after = ((method.reconstruct(factors, kernel.shape) - kernel).norm() for factors in both)
    assert after < before


@pytest.mark.parametrize("name", BY_NAME)
def test_one_seed_one_result(name):
    model, _, layer = given_geometry("linear behind a map")
    ranks = (3,) * len(BY_NAME[name].bounds(layer.weight))
    (_, one), (_, same), (_, other) = (factors_of(model, layer, BY_NAME[name], ranks, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    # Only CP starts at random, since it has no closed form.
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) == (name not in ("cp", "cp4"))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_global_random_state_is_neither_read_nor_moved(name):
    model, inputs, layer = given_geometry("linear behind a map")
    ranks = (2,) * len(BY_NAME[name].bounds(layer.weight))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = factorized(model, layer, BY_NAME[name], ranks)(inputs)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(factorized(model, layer, BY_NAME[name], ranks)(inputs), one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BY_NAME)
def test_half_precision_is_decomposed_in_float32_and_comes_back(name, dtype):
    model, _, layer = given_geometry("linear behind a map")
    half = model.to(dtype)
    wide = copy.deepcopy(half).float()
    ranks = (2,) * len(BY_NAME[name].bounds(layer.weight))
    assert {factor.dtype for factor in factors_of(half, layer, BY_NAME[name], ranks)[1]} == {torch.float32}
    got = factorized(half, layer, BY_NAME[name], ranks).state_dict()
    wanted = factorized(wide, layer, BY_NAME[name], ranks).state_dict()
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert value.dtype == dtype
        assert torch.equal(value, wanted[key].to(dtype))
