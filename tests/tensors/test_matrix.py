"""Laws of the truncated SVD: exact at full rank, and every reported error equals the measured one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.tensors.matrix import floating, gram, norm_of, principal, svd, unfold
from tests.nets import normal

laws = settings(max_examples=20, deadline=None)
sizes = st.integers(1, 12)
seeds = st.integers(0, 10_000)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@laws
@given(sizes, sizes, sizes, seeds)
def test_unfold_puts_the_mode_first_and_keeps_the_order_of_the_rest(a, b, c, seed):
    x = normal(a, b, c, seed=seed)
    assert torch.equal(unfold(x, 0), x.reshape(a, b * c))
    assert torch.equal(unfold(x, 1), torch.stack([x[:, j].flatten() for j in range(b)]))
    assert torch.equal(unfold(x, 2), torch.stack([x[:, :, k].flatten() for k in range(c)]))


@pytest.mark.parametrize("shape", [(10,), (0,), (3, 0, 2), (1, 1), (2000, 40, 60)])
def test_a_norm_is_exact_however_many_numbers_there_are(shape):
    x = normal(*shape, dtype=torch.float32)
    assert norm_of(x) == pytest.approx(float(x.double().norm()), rel=1e-6)


@laws
@given(sizes, sizes, seeds)
def test_full_rank_is_the_matrix(m, n, seed):
    x = normal(m, n, seed=seed)
    left, right = svd(x).at(min(m, n))
    assert relative(left @ right, x) < 1e-12


@laws
@given(sizes, sizes, seeds)
def test_reported_errors_are_the_measured_ones_and_fall(m, n, seed):
    x = normal(m, n, seed=seed)
    factors = svd(x)
    errors = factors.errors()
    assert errors.shape == (min(m, n),)
    assert (errors.diff() <= 0).all()
    for rank in range(1, min(m, n) + 1):
        left, right = factors.at(rank)
        assert relative(left @ right, x) == pytest.approx(float(errors[rank - 1]), abs=1e-12)


@laws
@given(sizes, sizes, sizes, seeds, st.floats(0, 12))
def test_in_float32_every_error_is_that_of_an_svd_in_float64(m, n, rank, seed, digits):
    """For any spectrum: flat, falling below rounding, or of low rank."""
    singular = torch.logspace(0, -digits, rank, dtype=torch.float64)
    x = ((normal(m, rank, seed=seed) * singular) @ normal(rank, n, seed=seed + 1)).float()
    factors, wanted = svd(x), svd(x.double()).errors()
    assert {part.dtype for part in vars(factors).values()} == {torch.float32}
    assert (factors.singular.diff() <= 0).all()
    for found in (factors.errors(), torch.tensor([relative(left @ right, x) for left, right in every(factors)])):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def every(factors):
    return [factors.at(rank + 1) for rank in range(len(factors.singular))]


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (7, 7)])
def test_a_gram_matrix_by_blocks_is_one(m, n, monkeypatch):
    monkeypatch.setattr("ranksearch.tensors.matrix._BLOCK", 7)
    x = normal(m, n)
    torch.testing.assert_close(gram(x).tril(), (x @ x.T).tril())
    torch.testing.assert_close(principal(x)[1], torch.linalg.svdvals(x).square())


@laws
@given(sizes, sizes, seeds)
def test_ranks_are_nested_and_both_factors_carry_the_same_norm(m, n, seed):
    factors = svd(normal(m, n, seed=seed))
    full = factors.at(min(m, n))
    for rank in range(1, min(m, n) + 1):
        left, right = factors.at(rank)
        assert torch.equal(left, full[0][:, :rank])
        assert torch.equal(right, full[1][:rank])
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


@laws
@given(sizes, sizes, seeds)
def test_the_sign_is_fixed_by_the_left_vectors(m, n, seed):
    left = svd(normal(m, n, seed=seed)).left
    assert (left.amax(0) >= -left.amin(0)).all()


def test_small_errors_keep_their_digits():
    u, v = (torch.linalg.qr(normal(6, 6, seed=s))[0] for s in (1, 2))
    errors = svd(u @ torch.diag(torch.tensor([1, 1e-5, 1e-9, 0, 0, 0], dtype=torch.float64)) @ v).errors()
    assert float(errors[0]) == pytest.approx(1e-5, rel=1e-6)
    assert float(errors[1]) == pytest.approx(1e-9, rel=1e-3)
    assert float(errors[-1]) == 0


def test_a_zero_matrix_has_no_error():
    assert svd(torch.zeros(3, 4)).errors().tolist() == [0, 0, 0]


@laws
@given(sizes, sizes, seeds)
def test_principal_vectors_are_orthonormal_and_explain_the_energy(m, n, seed):
    x = normal(m, n, seed=seed)
    vectors, squared = principal(x)
    assert vectors.shape == (m, min(m, n))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(min(m, n), dtype=torch.float64))
    torch.testing.assert_close(squared, torch.linalg.svdvals(x).square())
    torch.testing.assert_close((vectors.T @ x).norm(dim=1).square(), squared)


@pytest.mark.parametrize(
    ("given_type", "used"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_only_float64_is_computed_in_more_than_float32(given_type, used):
    factors = svd(torch.nn.Parameter(normal(4, 5, dtype=given_type)))
    assert {t.dtype for t in (factors.left, factors.singular, factors.right)} == {used}
    assert not factors.left.requires_grad


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_a_rank_outside_the_matrix_is_refused(rank):
    with pytest.raises(ValueError, match=rf"`1 <= rank <= 3` must hold, but got rank={rank}\."):
        svd(normal(3, 4)).at(rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match=r"A tensor to decompose must be finite, but it holds NaN or infinity\."):
        floating(torch.tensor([1.0, bad]))
