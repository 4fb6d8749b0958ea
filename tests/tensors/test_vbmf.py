"""Laws of VBMF: it finds planted ranks and no signal in noise; scale and transposition do not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.tensors.vbmf import vbmf

laws = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(3, 288), (16, 16), (20, 90), (64, 48), (96, 32)])
scales = st.floats(-4, 4).map(lambda power: 10.0**power)


def planted(shape, rank, seed, *, noise=0.1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    left, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
    signal = (m * n) ** 0.5 * left @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64)) @ right.T
    return (signal + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@laws
@given(shapes, seeds, st.floats(0, 1))
def test_a_planted_rank_and_its_noise_are_found(shape, seed, share):
    rank = 1 + round(share * (min(shape) // 3 - 1))
    found = vbmf(planted(shape, rank, seed))
    assert found.rank == rank
    assert found.spectrum.shape == (rank,)
    # Small matrices give a rough estimate of the noise: of three rows, one or two are noise alone.
    assert found.noise_variance == pytest.approx(0.01, rel=0.5)


@laws
@given(shapes, seeds, scales)
def test_scale_changes_the_units_and_nothing_else(shape, seed, scale):
    matrix = planted(shape, 1 + min(shape) // 4, seed, noise=0.7)
    plain, scaled = vbmf(matrix), vbmf(scale * matrix)
    assert scaled.rank == plain.rank
    assert scaled.noise_variance == pytest.approx(scale**2 * plain.noise_variance, rel=1e-4)
    torch.testing.assert_close(scaled.spectrum, scale * plain.spectrum, rtol=1e-4, atol=0)


@laws
@given(shapes, seeds)
def test_transposition_changes_nothing(shape, seed):
    matrix = planted(shape, 1 + min(shape) // 4, seed, noise=0.7)
    plain, turned = vbmf(matrix), vbmf(matrix.T)
    assert turned.rank == plain.rank
    assert turned.noise_variance == pytest.approx(plain.noise_variance, rel=1e-6)


@laws
@given(st.sampled_from([(16, 144), (64, 64), (8, 200), (1, 9), (60, 1), (2, 2)]), seeds)
def test_pure_noise_has_rank_zero(shape, seed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = vbmf(matrix)
    assert found.rank == 0
    assert len(found.spectrum) == 0
    assert found.noise_variance == pytest.approx(float(matrix.square().mean()), rel=1e-4)


@laws
@given(seeds)
def test_the_spectrum_is_shrunk_and_falls(seed):
    matrix = planted((20, 90), 6, seed, noise=0.7)
    spectrum = vbmf(matrix).spectrum
    assert (spectrum.diff() <= 0).all()
    assert (spectrum > 0).all()
    assert (spectrum < torch.linalg.svdvals(matrix)[: len(spectrum)]).all()


@laws
@given(seeds)
def test_more_noise_leaves_less_rank(seed):
    matrix = planted((20, 90), 8, seed)
    ranks = [vbmf(matrix, noise_variance=variance).rank for variance in (1e-9, 1e-2, 1.0, 10.0, 1e4)]
    assert ranks == sorted(ranks, reverse=True)
    assert (ranks[0], ranks[1], ranks[-1]) == (20, 8, 0)
    assert vbmf(matrix, noise_variance=0.5).noise_variance == pytest.approx(0.5)


@laws
@given(seeds, st.integers(1, 40))
def test_dead_channels_are_no_signal(seed, dead):
    matrix = planted((40, 90), 5, seed)
    holes = torch.zeros(40 + dead, 90 + dead, dtype=torch.float64)
    holes[dead:, :90] = matrix
    assert vbmf(holes).rank == 5
    assert vbmf(holes).noise_variance == pytest.approx(vbmf(matrix).noise_variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 7, 15])
def test_a_matrix_without_noise_has_its_own_rank(rank, dtype):
    assert vbmf(planted((30, 200), rank, 0, noise=0.0, dtype=dtype)).rank == rank


def test_single_precision_agrees_with_double():
    matrix = planted((64, 576), 9, 3, noise=0.5)
    assert vbmf(matrix.float()).rank == vbmf(matrix).rank == 9


def test_zeros_have_neither_rank_nor_noise():
    found = vbmf(torch.zeros(4, 6))
    assert (found.rank, found.noise_variance, len(found.spectrum)) == (0, 0.0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match=r"A tensor to decompose must be finite, but it holds NaN or infinity\."):
        vbmf(torch.tensor([[1.0, bad], [0.0, 1.0]]))


def test_only_a_matrix_will_do():
    with pytest.raises(ValueError, match=r"VBMF needs a matrix, but got shape \(2, 3, 4\)\."):
        vbmf(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan")])
def test_a_noise_variance_is_positive(variance):
    with pytest.raises(ValueError, match=rf"`noise_variance > 0` must hold, but got {variance}\."):
        vbmf(torch.ones(2, 3), noise_variance=variance)
