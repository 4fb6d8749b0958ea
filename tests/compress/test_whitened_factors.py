"""Data-aware factors: exact at full rank, and their predicted errors are those of the layer's outputs."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.compress import whitening as whitening
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.whitening import Whitening
from ranksearch.methods import METHODS
from tests.compress.whitened import correlated, measured, rebuilt
from tests.geometries import BY_NAME, GEOMETRIES, PAIRS, assert_close, given_geometry, kernels_of, some_ranks
from tests.nets import normal

contract = pytest.mark.parametrize(("geometry", "name"), PAIRS)
SVDS = [geometry for geometry, (*_, names) in GEOMETRIES.items() if "svd" in names]
laws = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture
def exact(monkeypatch):
    """No shrinkage, and all positions are used: the moments are then exact."""
    monkeypatch.setattr(whitening, "POSITIONS_PER_INPUT", 10**6)
    monkeypatch.setattr(whitening, "SHRINKAGE", 1e-13)


def made(model, layer, method, inputs, **options):
    found = profile(model, inventory(model, inputs[:1]), {"layer": [method]}, inputs=inputs, **options)
    return found.layers[layer.name]


def whole_root(found, holds, weight):
    """One root for all input modes (in * kernel): the Kronecker product of the roots, the identity for modes without a root."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for modes in holds:
        for run in [modes] if modes in found.roots else [(mode,) for mode in modes]:
            size = int(torch.Size([weight[mode] for mode in run]).numel())
            product = torch.kron(product, found.roots.get(run, torch.eye(size, dtype=torch.float64)).double())
    return product


def in_the_metric(kernels, roots):
    return torch.stack([kernel.flatten(1) @ root for kernel, root in zip(kernels, roots, strict=True)])


def relative(difference, of):
    return float(difference.norm() / of.norm())


@contract
def test_full_rank_is_the_layer(geometry, name):
    model, inputs, layer = given_geometry(geometry)
    method = BY_NAME[name]
    for found, kernel in measured(model, layer, method, correlated(inputs)):
        assert set(found.roots) == {modes for modes in method.holds(layer.weight) if modes}
        assert_close(rebuilt(found, layer, kernel, method, method.bounds(layer.weight)), kernel)


@st.composite
def wells(draw):
    """A well-conditioned whitening, of all modes together or of single modes, and the kernel's shape."""
    weight = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    seed, roots = draw(st.integers(0, 1000)), {}
    method = draw(st.sampled_from([m for m in METHODS.values() if m.applies(weight, linear=len(weight) == 2)] or [None]))
    for modes in method.holds(weight) if method else ():
        for run in [modes] if modes and draw(st.booleans()) else [(mode,) for mode in modes]:
            size = int(torch.Size([weight[mode] for mode in run]).numel())
            roots[run] = torch.eye(size, dtype=torch.float64) + 0.3 * normal(size, size, seed=seed).tril() / size
            if draw(st.booleans()):
                del roots[run]
    return weight, method, Whitening(roots), seed


@laws
@given(wells())
def test_full_rank_is_the_kernel_with_any_whitening(well):
    weight, method, found, seed = well
    if method is None:
        return
    kernel, holds = normal(*weight, seed=seed), method.holds(weight)
    whitened = found.whiten(kernel, holds)
    assert_close(whitened.flatten(1), kernel.flatten(1) @ whole_root(found, holds, weight))
    ranks = method.bounds(weight)
    factors = method.factors(whitened, method.prepare(whitened, [ranks], 0), ranks, 0)
    assert_close(method.reconstruct(found.fold(factors, holds, weight), weight), kernel)


@contract
def test_balanced_factors_are_the_same_kernel(geometry, name):
    model, _, layer = given_geometry(geometry)
    method, kernel = BY_NAME[name], kernels_of(model, layer)[0]
    for ranks in some_ranks(method, layer):
        factors = method.factors(kernel, method.prepare(kernel, [ranks], 0), ranks, 0)
        scales = torch.linspace(1, 9, len(factors[0]), dtype=torch.float64).reshape(-1, *[1] * (factors[0].dim() - 1))
        uneven = (scales * factors[0], *factors[1:])
        balanced = method.balanced(uneven, layer.weight)
        assert [factor.shape for factor in balanced] == [factor.shape for factor in factors]
        assert_close(method.reconstruct(balanced, layer.weight), method.reconstruct(uneven, layer.weight))
        if name in ("tucker2", "tt"):
            torch.testing.assert_close(balanced[0] @ balanced[0].T, torch.eye(ranks[0]).double())


@contract
def test_the_errors_of_candidates_are_those_of_whitened_weights(geometry, name):
    model, inputs, layer = given_geometry(geometry)
    method, kernels = BY_NAME[name], kernels_of(model, layer)
    found = made(model, layer, method, correlated(inputs))
    roots = [
        math.sqrt(group.whitening.variance) * whole_root(group.whitening, method.holds(layer.weight), layer.weight)
        for group in found.groups
    ]
    candidates = list(found.candidates())
    assert (
        candidates
        or geometry == "linear as large as its SVD of half the rank"
        or not method.shrinks(layer, (1,) * len(method.bounds(layer.weight)))
    )
    for candidate in candidates[:: max(1, len(candidates) // 6)]:
        rebuilt = method.reconstruct(found.factors(candidate.value), layer.weight, layer.groups)
        differences = torch.stack(rebuilt.tensor_split(layer.groups)) - torch.stack(kernels)
        in_metric = relative(in_the_metric(differences, roots), in_the_metric(kernels, roots))
        assert candidate.error == pytest.approx(in_metric, abs=1e-6)


@contract
def test_the_mean_of_the_outputs_is_kept(geometry, name, exact):
    """The bias correction is for the mean patch of the layer, with any stride, padding and dilation."""
    model, inputs, layer = given_geometry(geometry)
    method, inputs = BY_NAME[name], correlated(inputs)
    ranks = (1,) * len(method.bounds(layer.weight))
    found = made(model, layer, method, inputs)
    value = method.value(layer, ranks)
    if ranks not in [candidate.value.ranks for candidate in found.candidates()]:
        pytest.skip("no rank of it pays")
    bias_correction = found.bias_correction(value, found.factors(value))
    assert (bias_correction is None) == (not layer.bias)
    built = factorize_(
        copy.deepcopy(model), {"layer": value}, factors={"layer": found.factors(value)},
        bias_corrections={} if bias_correction is None else {"layer": bias_correction},
    )  # fmt: skip
    with torch.no_grad():
        dense, small = by_channel(model(inputs), layer), by_channel(built(inputs), layer)
    assert not torch.allclose(dense, small)
    if layer.bias:
        assert_close(small.mean(0), dense.mean(0))


def by_channel(outputs, layer):
    """The outputs as rows (n, out), channels last."""
    axis = outputs.dim() - 1 if layer.kind == "Linear" else outputs.dim() - 1 - len(layer.calls[0].out_size)
    return outputs.movedim(axis, -1).reshape(-1, layer.groups * layer.weight[0])


@pytest.mark.parametrize("geometry", SVDS)
def test_the_whitened_error_is_that_of_the_outputs(geometry, exact):
    """One factor of SVD holds all input modes, so the whitened error equals the error of the outputs on these inputs."""
    model, inputs, layer = given_geometry(geometry)
    method, inputs = BY_NAME["svd"], correlated(inputs, count=200)
    found = made(model, layer, method, inputs)
    for candidate in found.candidates():
        bias_correction = found.bias_correction(candidate.value, found.factors(candidate.value))
        built = factorize_(
            copy.deepcopy(model), {"layer": candidate.value}, factors={"layer": found.factors(candidate.value)},
            bias_corrections={} if bias_correction is None else {"layer": bias_correction},
        )  # fmt: skip
        with torch.no_grad():
            dense, small = by_channel(model(inputs), layer), by_channel(built(inputs), layer)
        of = dense - dense.mean(0) if layer.bias else dense
        assert candidate.error == pytest.approx(relative(small - dense, of), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("geometry", SVDS)
def test_no_svd_of_its_rank_has_a_smaller_whitened_error(geometry):
    model, inputs, layer = given_geometry(geometry)
    method, differs = BY_NAME["svd"], False

    def error(one, kernel, root, ranks):
        return float(((rebuilt(one, layer, kernel, method, ranks) - kernel).flatten(1) @ root).norm())

    for found, kernel in measured(model, layer, method, correlated(inputs)):
        root = whole_root(found, method.holds(layer.weight), layer.weight)
        for ranks in some_ranks(method, layer):
            whitened, plain = (error(one, kernel, root, ranks) for one in (found, Whitening()))
            assert whitened <= plain * (1 + 1e-9) + 1e-9
            differs |= whitened < 0.99 * plain
    assert differs


@pytest.mark.parametrize("name", BY_NAME)
def test_outputs_are_nearer_than_with_plain_factors(name):
    model, inputs, layer = given_geometry("linear behind a map")
    method, inputs = BY_NAME[name], correlated(inputs, count=200)
    ranks = (2,) * len(method.bounds(layer.weight))
    found, value = made(model, layer, method, inputs[:100]), method.value(layer, ranks)
    aware = factorize_(
        copy.deepcopy(model),
        {"layer": value},
        factors={"layer": found.factors(value)},
        bias_corrections={"layer": found.bias_correction(value, found.factors(value))},
    )
    plain = factorize_(copy.deepcopy(model), {"layer": value})
    with torch.no_grad():
        dense, held_out = model(inputs[100:]), inputs[100:]
        assert relative(aware(held_out) - dense, dense) < 0.85 * relative(plain(held_out) - dense, dense)
