"""Laws of Tucker-2: exact at full ranks, factors nested over ranks, every reported error equals the measured one."""

from itertools import pairwise

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.tensors.tucker import hooi, hosvd
from tests.nets import normal

laws = settings(max_examples=20, deadline=None)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
seeds = st.integers(0, 10_000)


def rebuilt(core, u_out, u_in):
    return torch.einsum("pqk,op,iq->oik", core, u_out, u_in)


def error(parts, kernel):
    return float((rebuilt(*parts) - kernel).norm() / kernel.norm())


def pairs(fit):
    return [(i, o) for i in range(1, fit.core.shape[1] + 1) for o in range(1, fit.core.shape[0] + 1)]


@laws
@given(sizes, seeds)
def test_full_ranks_are_the_kernel(shape, seed):
    kernel = normal(*shape, seed=seed)
    fit = hosvd(kernel)
    out, in_, k = shape
    assert fit.core.shape == (min(out, in_ * k), min(in_, out * k), k)
    assert error((fit.core, fit.u_out, fit.u_in), kernel) < 1e-12


@laws
@given(sizes, seeds)
def test_reported_errors_are_the_measured_ones(shape, seed):
    kernel = normal(*shape, seed=seed)
    fit = hosvd(kernel)
    errors = fit.errors()
    assert errors.shape == (fit.core.shape[1], fit.core.shape[0])
    for i, o in pairs(fit):
        assert error(fit.at(i, o), kernel) == pytest.approx(float(errors[i - 1, o - 1]), abs=1e-12)


@laws
@given(sizes, seeds)
def test_errors_fall_as_either_rank_grows(shape, seed):
    errors = hosvd(normal(*shape, seed=seed)).errors()
    assert (errors.diff(dim=0) <= 1e-15).all()
    assert (errors.diff(dim=1) <= 1e-15).all()
    assert float(errors[-1, -1]) == 0


@laws
@given(sizes, seeds)
def test_ranks_are_nested_and_bases_orthonormal(shape, seed):
    fit = hosvd(normal(*shape, seed=seed))
    for i, o in pairs(fit):
        core, u_out, u_in = fit.at(i, o)
        assert torch.equal(core, fit.core[:o, :i])
        assert torch.equal(u_out, fit.u_out[:, :o])
        assert torch.equal(u_in, fit.u_in[:, :i])
    for basis in (fit.u_out, fit.u_in):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


@laws
@given(sizes, seeds)
def test_no_sweep_of_hooi_raises_the_error(shape, seed):
    kernel = normal(*shape, seed=seed)
    fit = hosvd(kernel)
    i, o = (fit.core.shape[1] + 1) // 2, (fit.core.shape[0] + 1) // 2
    errors = [error(fit.at(i, o), kernel)] + [error(hooi(kernel, fit, i, o, sweeps=n), kernel) for n in (0, 1, 2, 5)]
    assert errors[0] == pytest.approx(errors[1], abs=1e-12)
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))


def test_hooi_finds_a_planted_core():
    kernel = rebuilt(normal(3, 2, 4, seed=1), normal(12, 3, seed=2), normal(8, 2, seed=3))
    core, u_out, u_in = hooi(kernel, hosvd(kernel), 2, 3, sweeps=1)
    assert (core.shape, u_out.shape, u_in.shape) == ((3, 2, 4), (12, 3), (8, 2))
    assert error((core, u_out, u_in), kernel) < 1e-12
    assert float(hosvd(kernel).errors()[1, 2]) < 1e-12


def test_small_errors_keep_their_digits():
    kernel = torch.zeros(3, 3, 1, dtype=torch.float64)
    kernel[0, 0], kernel[1, 1], kernel[2, 2] = 1, 1e-6, 1e-11
    errors = hosvd(kernel).errors()
    assert float(errors[0, 0]) == pytest.approx(1e-6, rel=1e-9)
    assert float(errors[1, 1]) == pytest.approx(1e-11, rel=1e-9)


def test_a_zero_kernel_has_no_error():
    assert not hosvd(torch.zeros(3, 2, 4)).errors().any()


def test_half_precision_is_computed_in_float32():
    fit = hosvd(normal(4, 3, 9, dtype=torch.float16))
    assert {t.dtype for t in (fit.core, fit.u_out, fit.u_in)} == {torch.float32}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((0, 1), r"`1 <= rank_in <= 3` must hold, but got rank_in=0\."),
        ((1, 5), r"`1 <= rank_out <= 4` must hold, but got rank_out=5\."),
    ],
)
def test_a_rank_outside_the_kernel_is_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        hosvd(normal(4, 3, 9)).at(*ranks)
    with pytest.raises(ValueError, match=message):
        hosvd(normal(4, 3, 9)).to_tensorly(*ranks)


def test_the_tensorly_form_is_the_same_tensor():
    fit = hosvd(normal(5, 4, 3))
    with tensorly.backend_context("pytorch"):
        whole = tensorly.tucker_to_tensor(fit.to_tensorly(2, 3))
    torch.testing.assert_close(whole, rebuilt(*fit.at(2, 3)))


def test_a_kernel_has_three_modes():
    with pytest.raises(ValueError, match=r"must have the three modes \(out, in, k\), but got shape \(4, 3, 3, 3\)\."):
        hosvd(normal(4, 3, 3, 3))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="must be finite"):
        hosvd(torch.full((2, 2, 2), float("nan")))
