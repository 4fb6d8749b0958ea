"""Laws of CP: exact at the exact rank, correct errors, bounded degeneracy, and one result for one seed."""

import math
from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac

from ranksearch.tensors import als
from ranksearch.tensors.als import Compressed, Rule, solve
from ranksearch.tensors.cp import cp_als, cp_path, exact_rank, reconstruct
from ranksearch.tensors.matrix import svd
from tests.nets import normal

laws = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)


def kernel(*shape, seed=0, decay=0.6):
    """A random tensor with a decaying spectrum in every mode, like a trained kernel."""
    x = normal(*shape, seed=seed)
    for mode, size in enumerate(shape):
        turn = torch.linalg.qr(normal(size, size, seed=seed + mode + 1))[0]
        scaled = turn * torch.arange(1, size + 1, dtype=torch.float64) ** -decay
        x = torch.tensordot(x, scaled, ([0], [1]))
    return x


def border():
    """A tensor of rank 3 that tensors of rank 2 approximate arbitrarily well, with terms that grow without bound."""
    a, b = torch.eye(2, dtype=torch.float64)
    return sum(torch.einsum("i,j,k->ijk", *vectors) for vectors in ((a, a, b), (a, b, a), (b, a, a)))


def measured(fit, tensor):
    return float((reconstruct(fit.factors) - tensor).norm() / tensor.norm())


def term_norms(fit):
    return torch.stack([factor.norm(dim=0) for factor in fit.factors]).prod(0)


@laws
@given(shapes, st.integers(1, 4), seeds)
def test_reconstruct_sums_the_outer_products(shape, rank, seed):
    factors = [normal(size, rank, seed=seed + mode) for mode, size in enumerate(shape)]
    wanted = torch.zeros(shape, dtype=torch.float64)
    for term in range(rank):
        outer = factors[0][:, term]
        for factor in factors[1:]:
            outer = outer[..., None] * factor[:, term]
        wanted += outer
    torch.testing.assert_close(reconstruct(factors), wanted)


@laws
@given(shapes, st.integers(0, 3), seeds)
def test_the_exact_rank_is_exact_and_orthogonal(shape, more, seed):
    tensor = normal(*shape, seed=seed)
    fit = cp_als(tensor, exact_rank(shape) + more)
    assert [tuple(factor.shape) for factor in fit.factors] == [(size, exact_rank(shape) + more) for size in shape]
    assert measured(fit, tensor) < 1e-12
    assert fit.error < 1e-12
    assert fit.degeneracy == pytest.approx(1)


@laws
@given(seeds)
def test_low_multilinear_rank_lowers_the_exact_rank(seed):
    core = torch.tensor([[[1.0, 0.2], [0.0, 0.7]], [[-0.3, 0.5], [0.4, 0.1]]], dtype=torch.float64)
    bases = [torch.linalg.qr(normal(size, 2, seed=seed + size))[0] for size in (7, 6, 5)]
    fit = cp_als(torch.einsum("pqr,ip,jq,kr->ijk", core, *bases), 4)
    assert fit.error < 1e-12
    assert fit.sweeps == 0


@laws
@given(shapes, st.integers(1, 6), seeds)
def test_the_reported_figures_are_the_measured_ones(shape, rank, seed):
    tensor = normal(*shape, seed=seed)
    fit = cp_als(tensor, rank, sweeps=20)
    norms = term_norms(fit)
    assert fit.error == pytest.approx(measured(fit, tensor), abs=1e-12)
    assert fit.degeneracy == pytest.approx(float(norms.square().sum() / tensor.square().sum()))
    assert (norms.diff() <= 1e-12 * norms[0]).all()
    assert fit.sweeps <= 20
    for factor in fit.factors:
        torch.testing.assert_close(factor.norm(dim=0), norms ** (1 / len(shape)))


@laws
@given(shapes, st.integers(1, 6), seeds, st.floats(1, 20))
def test_the_degeneracy_keeps_to_its_bound(shape, rank, seed, bound):
    fit = cp_als(normal(*shape, seed=seed), rank, sweeps=20, max_degeneracy=bound)
    assert fit.degeneracy <= bound * (1 + 1e-6)


def test_a_border_tensor_degenerates_only_as_far_as_it_may():
    fits = [cp_als(border(), 2, sweeps=1000, tolerance=0, ridge=0, max_degeneracy=b) for b in (1, 3, 10, math.inf)]
    for fit, bound in zip(fits, (1, 3, 10), strict=False):
        assert 0.97 * bound <= fit.degeneracy <= bound * (1 + 1e-6)
    assert fits[-1].degeneracy > 100
    assert fits[-1].error < 1e-3
    assert all(tight.error > 2 * loose.error for tight, loose in pairwise(fits))


def test_a_generous_bound_is_not_felt():
    tensor = reconstruct([torch.linalg.qr(normal(size, 4, seed=size))[0] for size in (8, 7, 6)])
    free, bounded = (cp_als(tensor, 4, max_degeneracy=bound) for bound in (math.inf, 10))
    assert all(torch.equal(one, other) for one, other in zip(free.factors, bounded.factors, strict=True))


@laws
@given(seeds)
def test_the_bounded_update_is_the_best_within_the_bound(seed):
    left = torch.nn.functional.normalize(normal(9, 4, seed=seed), dim=0)
    data = normal(9, 5, seed=seed + 1)

    def error(solution):
        return float((left @ solution - data).square().sum())

    bound = float((torch.linalg.pinv(left) @ data).square().sum()) / 3
    found, _ = solve(left.T @ left, left.T @ data, Rule(1, 0, 0, bound))
    assert 0.97 * bound <= float(found.square().sum()) <= bound * (1 + 1e-9)
    for trial in range(20):
        other = found + 0.1 * normal(4, 5, seed=seed + trial)
        assert error(other * min(1.0, float(found.norm() / other.norm()))) >= error(found)


@laws
@given(seeds, st.floats(-9, 3))
def test_the_bounded_update_is_found_from_every_ridge(seed, power):
    left = torch.nn.functional.normalize(normal(9, 4, seed=seed), dim=0)
    data = normal(9, 5, seed=seed + 1)
    bound = float((torch.linalg.pinv(left) @ data).square().sum()) / 3
    found, ridge = solve(left.T @ left, left.T @ data, Rule(1, 0, 0, bound), 10**power)
    assert 0.97 * bound <= float(found.square().sum()) <= bound * (1 + 1e-9)
    again, same = solve(left.T @ left, left.T @ data, Rule(1, 0, 0, bound), ridge)
    assert same == ridge
    assert torch.equal(again, found)


def test_nothing_to_fit_needs_no_ridge_to_be_found():
    found, _ = solve(torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64), Rule(1, 0, 0, 1.0), 0.5)
    assert not found.any()


@laws
@given(seeds)
def test_a_ridge_that_is_needed_no_more_is_dropped(seed):
    left = torch.nn.functional.normalize(normal(9, 4, seed=seed), dim=0)
    data = normal(9, 5, seed=seed + 1)
    free, ridge = solve(left.T @ left, left.T @ data, Rule(1, 0, 1e-9, 1e9), 10.0)
    assert ridge == 1e-9
    torch.testing.assert_close(free, torch.linalg.pinv(left) @ data, rtol=1e-6, atol=1e-6)


def test_parallel_terms_are_solved_without_a_ridge():
    ones = torch.ones(2, 5, dtype=torch.float64)
    found, _ = solve(ones[:, :2], ones[:, 2:], Rule(1, 0, 0, math.inf))
    torch.testing.assert_close(found, torch.full((2, 3), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(9, 8, 7), (6, 5, 3, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_rank_is_found(shape, seed):
    tensor = reconstruct([normal(size, 3, seed=seed + size * mode) for mode, size in enumerate(shape)])
    assert cp_als(tensor, 3, starts=3, sweeps=300, tolerance=1e-8).error < 1e-5


@laws
@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_of_a_matrix_it_is_the_svd(m, n, seed):
    matrix = normal(m, n, seed=seed)
    rank = (min(m, n) + 1) // 2
    best = float(svd(matrix).errors()[rank - 1])
    assert cp_als(matrix, rank, sweeps=300, tolerance=1e-9).error == pytest.approx(best, rel=1e-2, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD:UserWarning")
def test_no_worse_than_tensorly():
    ratios = []
    for shape, rank in (((24, 20, 9), 8), ((24, 20, 9), 24), ((32, 3, 9), 6), ((12, 10, 3, 3), 10)):
        for seed in range(4):
            tensor = kernel(*shape, seed=seed)
            peer = parafac(tensor.numpy(), rank, n_iter_max=100, init="svd", random_state=0, tol=1e-8)
            error = np.linalg.norm(tensorly.cp_to_tensor(peer) - tensor.numpy()) / np.linalg.norm(tensor.numpy())
            ratios.append(cp_als(tensor, rank).error / error)
    # Both end in local minima, and either may find the better one.
    assert max(ratios) < 1.03
    assert np.mean(ratios) < 1


def test_the_tensorly_form_is_the_same_tensor():
    fit = cp_als(kernel(6, 5, 4), 3)
    with tensorly.backend_context("pytorch"):
        torch.testing.assert_close(tensorly.cp_to_tensor(fit.to_tensorly()), reconstruct(fit.factors))


@laws
@given(seeds, st.integers(1, 10_000))
def test_one_seed_one_result(seed, more):
    tensor = kernel(8, 6, 5)
    one, same, other = (cp_als(tensor, 5, seed=s, sweeps=5) for s in (seed, seed, seed + more))
    assert one.error == same.error
    assert all(torch.equal(a, b) for a, b in zip(one.factors, same.factors, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.factors, other.factors, strict=True))


def test_the_global_random_state_is_neither_read_nor_moved():
    tensor = kernel(8, 6, 5)
    torch.manual_seed(1)
    before, one = torch.random.get_rng_state(), cp_als(tensor, 5, starts=2, sweeps=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(cp_als(tensor, 5, starts=2, sweeps=5).factors[0], one.factors[0])


@laws
@given(seeds)
def test_more_starts_are_no_worse(seed):
    tensor = kernel(8, 6, 5)
    errors = [cp_als(tensor, 5, seed=seed, starts=n, sweeps=15).error for n in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)


@laws
@given(seeds)
def test_a_fit_continued_is_no_worse(seed):
    tensor = kernel(8, 6, 5, seed=seed)
    short = cp_als(tensor, 5, sweeps=3)
    assert cp_als(tensor, 5, init=short.factors, sweeps=10).error <= short.error * (1 + 1e-6)


@laws
@given(seeds, st.floats(-6, 6))
def test_scale_changes_nothing_but_the_scale(seed, power):
    tensor, scale = kernel(7, 6, 5, seed=seed), 10.0**power
    plain, scaled = cp_als(tensor, 4, sweeps=10), cp_als(scale * tensor, 4, sweeps=10)
    assert scaled.error == pytest.approx(plain.error, rel=1e-6)
    torch.testing.assert_close(term_norms(scaled), scale * term_norms(plain), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(16, 12, 9), (32, 3, 9), (10, 8, 3, 3), (20, 15)])
def test_along_a_path_the_error_falls_as_the_rank_grows(shape):
    tensor = kernel(*shape)
    ranks = [rank for rank in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24) if rank <= exact_rank(shape)] + [exact_rank(shape)]
    path = cp_path(tensor, ranks)
    assert list(path) == sorted(set(ranks))
    errors = [fit.error for fit in path.values()]
    assert all(after < 1.005 * before for before, after in pairwise(errors))
    assert errors[-1] < 1e-12
    for rank, fit in path.items():
        assert fit.factors[0].shape == (shape[0], rank)
        assert fit.error == pytest.approx(measured(fit, tensor), abs=1e-12)
        assert fit.degeneracy < 10 * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(16, 12, 9), (32, 3, 9), (10, 8, 3, 3)])
def test_a_path_is_as_good_as_single_fits(shape):
    ratios = []
    for seed in range(3):
        tensor = kernel(*shape, seed=seed)
        path = cp_path(tensor, [2, 5, 10, 16], sweeps=50)
        ratios += [fit.error / cp_als(tensor, rank, sweeps=50).error for rank, fit in path.items()]
    assert max(ratios) < 1.06
    assert np.mean(ratios) < 1.01


def test_a_path_depends_on_tensor_ranks_and_seed_alone():
    tensor = kernel(8, 6, 5)
    one, same, other = (cp_path(tensor, ranks, seed=s) for ranks, s in (([2, 5], 0), ([5, 2, 5], 0), ([2, 5], 1)))
    for rank in (2, 5):
        assert torch.equal(one[rank].factors[1], same[rank].factors[1])
        assert not torch.equal(one[rank].factors[1], other[rank].factors[1])
    assert cp_path(tensor, []) == {}


def test_a_zero_tensor_needs_no_terms():
    for fit in (cp_als(torch.zeros(4, 3, 2), 5), cp_path(torch.zeros(4, 3, 2), [5])[5]):
        assert (fit.error, fit.degeneracy, fit.sweeps) == (0, 0, 0)
        assert [tuple(factor.shape) for factor in fit.factors] == [(4, 5), (3, 5), (2, 5)]
        assert not any(factor.any() for factor in fit.factors)


@pytest.mark.parametrize(("dtype", "used"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_only_float64_is_computed_in_more_than_float32(dtype, used):
    tensor = kernel(8, 6, 5).to(dtype)
    fit = cp_als(torch.nn.Parameter(tensor), 5)
    assert {factor.dtype for factor in fit.factors} == {used}
    assert fit.error == pytest.approx(cp_als(kernel(8, 6, 5), 5).error, rel=0.02)


@laws
@given(shapes, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_compression_loses_nothing(shape, seed, dtype):
    tensor = normal(*shape, seed=seed, dtype=dtype)
    small = Compressed.of(tensor, 1)
    back = small.core * small.norm
    for basis in small.bases:
        back = torch.tensordot(back, basis, ([0], [1]))
    torch.testing.assert_close(back, tensor, rtol=0, atol=20 * torch.finfo(dtype).eps * float(tensor.norm()))


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_fit_that_begins_on_a_short_core_is_as_good(mode, seed, monkeypatch):
    tensor, ranks = kernel(60, 9, 8, seed=seed).movedim(0, mode), [1, 4, 8]
    whole = cp_path(tensor, ranks)
    monkeypatch.setattr(als, "_MIN_SHORT", 6)
    problem = Compressed.of(tensor, 8)
    assert problem.short.shape == torch.Size([8 if at == mode else size for at, size in enumerate(problem.core.shape)])
    short = cp_path(tensor, ranks)
    for rank in ranks:
        assert short[rank].error == pytest.approx(measured(short[rank], tensor), abs=1e-9)
        assert short[rank].error < 1.05 * whole[rank].error
        assert short[rank].degeneracy <= 10.001
        assert [len(factor) for factor in short[rank].factors] == list(tensor.shape)
    again = cp_als(tensor, 4, init=[factor[:, :4] for factor in short[8].factors], sweeps=20)
    assert again.error < 1.05 * whole[4].error
    assert again.sweeps <= 20
    assert Compressed.of(tensor, 40).short is None


def test_terms_on_a_short_core_know_what_lies_outside_of_it(monkeypatch):
    monkeypatch.setattr(als, "_MIN_SHORT", 6)
    problem = Compressed.of(kernel(60, 9, 8), 6)
    terms = problem.slices(6)
    rebuilt = reconstruct([row.T * (terms.weights if at == 0 else 1) for at, row in enumerate(terms.rows)])
    assert terms.error == pytest.approx(float((rebuilt - problem.core).norm()), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank >= 1` must hold, but got rank=0\."),
        ({"starts": 0}, r"`starts >= 1` must hold, but got starts=0\."),
        ({"sweeps": 0}, r"`sweeps >= 1` must hold, but got sweeps=0\."),
        ({"ridge": -1.0}, r"`tolerance >= 0` and `ridge >= 0` must hold, but got tolerance=1e-05, ridge=-1\.0\."),
        ({"tolerance": -1.0}, r"`tolerance >= 0` and `ridge >= 0` must hold, but got tolerance=-1\.0, ridge=1e-06\."),
        ({"max_degeneracy": 0.5}, r"`max_degeneracy >= 1` must hold, but got max_degeneracy=0\.5\."),
        (
            {"init": [torch.ones(4, 2), torch.ones(3, 2)]},
            r"`init` must hold factors of shapes \[\(4, 2\), \(3, 2\), \(5, 2\)\], but got \[\(4, 2\), \(3, 2\)\]\.",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cp_als(normal(4, 3, 5), **{"rank": 2} | options)


def test_a_path_refuses_a_rank_of_zero():
    with pytest.raises(ValueError, match=r"`rank >= 1` must hold, but got rank=0\."):
        cp_path(normal(4, 3, 5), [3, 0])


def test_a_vector_has_no_cp():
    with pytest.raises(ValueError, match=r"CP needs a tensor of at least two modes, but got shape \(4,\)\."):
        cp_als(torch.ones(4), 1)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="must be finite"):
        cp_als(torch.full((2, 2, 2), float("nan")), 1)
