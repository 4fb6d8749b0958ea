"""Estimates the rank of a noisy matrix by empirical variational Bayes, with the analytic global solution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ranksearch.tensors.matrix import floating, gram, norm_of

# Grid points in the search for the noise variance, and how often the search narrows to the two intervals around the best point.
_GRID, _ZOOMS = 65, 6
# Eigenvalues of a float64 Gram matrix below this part of the largest may be just rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class VBMFEstimate:
    """The estimated low-rank signal of a matrix.

    `rank` 0 means that no low-rank signal stands out from the noise. `noise_variance` is that of one entry, in the units
    of the matrix squared. `spectrum` holds the shrunk singular values of the signal, in descending order, in float64.
    """

    rank: int
    noise_variance: float
    spectrum: Float[Tensor, " rank"]


def vbmf(matrix: Float[Tensor, "m n"], *, noise_variance: float | None = None) -> VBMFEstimate:
    """The closed-form global solution of empirical variational Bayesian matrix factorization.

    Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization", JMLR 14 (2013). The noise variance is estimated unless given. Scaling or transposing the matrix does not
    change the rank. Rows and columns of zeros, such as dead channels, are ignored. A single row or column always has rank
    0, since its signal cannot be told from noise.

    Raises:
        ValueError: `matrix` is not a matrix or holds NaN or infinity, or the noise variance is not positive.
    """
    if matrix.ndim != 2:
        raise ValueError(f"VBMF needs a matrix, but got shape {tuple(matrix.shape)}.")
    if noise_variance is not None and not noise_variance > 0:
        raise ValueError(f"`noise_variance > 0` must hold, but got {noise_variance}.")
    finite = floating(matrix)
    rounding = torch.finfo(finite.dtype).eps
    values = _alive(finite.double(), rounding)
    if not values.numel():
        return VBMFEstimate(0, 0.0, values.new_zeros(0))
    scale = norm_of(values) / math.sqrt(values.numel())
    values = values if values.shape[0] <= values.shape[1] else values.T
    short, long = values.shape
    model = _Model(short, long, rounding)
    given = None if noise_variance is None else noise_variance / scale**2
    energy = torch.linalg.eigvalsh(gram(values) / scale**2).flip(0).clamp_min(0) / model.long
    variance = given or model.noise(energy)
    if variance < _ROUNDING * float(energy[0]):
        energy = torch.linalg.svdvals(values / scale).square() / model.long
        variance = given or model.noise(energy)
    kept = energy[energy > model.threshold * variance]
    return VBMFEstimate(len(kept), variance * scale**2, model.shrink(kept, variance) * scale)


def _alive(matrix: Tensor, rounding: float) -> Tensor:
    """Drop rows and columns of zeros: they hold no noise, which would make the noise of the others look like signal."""
    for _ in range(2):
        norms = torch.linalg.vector_norm(matrix, dim=1)
        alive = norms > rounding * norms.max() if len(norms) else norms.bool()
        matrix = (matrix if alive.all() else matrix[alive]).T
    return matrix


class _Model:
    """The paper's model of an L x M matrix, L <= M. "Energy" is a squared singular value divided by M, gamma^2 / M."""

    def __init__(self, short: int, long: int, rounding: float) -> None:
        self.short, self.long, self.rounding = short, long, rounding
        self.alpha = short / long
        # The paper's approximation of the tau below which a component no longer lowers the free energy, that is, of the zero
        # of phi(tau) + phi(tau / alpha), with phi(z) = log(z + 1) / z - 1 / 2. It is exact for alpha = 1.
        tau = 2.5129 * math.sqrt(self.alpha)
        self.threshold = (1 + tau) * (1 + self.alpha / tau)

    def noise(self, energy: Tensor) -> float:
        """The noise variance that minimises the free energy, searched on a log scale between the paper's bounds."""
        largest_rank = math.ceil(self.short / (1 + self.alpha)) - 1
        upper = float(energy.mean())
        lower = max(float(energy[largest_rank]) / self.threshold, float(energy[largest_rank:].mean()))
        # A matrix of exactly low rank has no noise: the rest of its spectrum is rounding error, which is not white.
        lower = max(lower, float(energy[0]) * (8 * self.rounding) ** 2)
        if lower >= upper:
            return upper
        # The free energy can have several minima, so search a grid over the whole range, then finer ones around the best point.
        ends = math.log(lower), math.log(upper)
        for _ in range(_ZOOMS):
            grid = torch.linspace(*ends, _GRID, dtype=energy.dtype, device=energy.device)
            best = int(self.free_energy(energy, grid.exp()).argmin())
            ends = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
        return math.exp(float(grid[best]))

    def free_energy(self, energy: Float[Tensor, " short"], variance: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The free energy per column at each noise variance, without constant terms."""
        x = energy / variance[:, None]
        tau = self._tau(x.clamp_min(self.threshold))
        signal = (tau + 1).log() + self.alpha * (tau / self.alpha + 1).log() - tau
        return (x + signal.where(x > self.threshold, 0.0)).sum(1) + self.short * variance.log()

    def shrink(self, energy: Tensor, variance: float) -> Tensor:
        """Shrunk singular values of the signal."""
        ratio = (1 + self.alpha) * variance / energy
        root = ((1 - ratio).square() - 4 * self.alpha * (variance / energy).square()).clamp_min(0).sqrt()
        return (energy * self.long).sqrt() / 2 * (1 - ratio + root)

    def _tau(self, x: Tensor) -> Tensor:
        lead = x - (1 + self.alpha)
        return (lead + (lead.square() - 4 * self.alpha).clamp_min(0).sqrt()) / 2
