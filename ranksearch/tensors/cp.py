"""CP decomposition of a tensor as a sum of rank-one terms, with a bound on how much the terms cancel each other.

A kernel has three modes `(out, in, k)` if its spatial modes are merged, four `(out, in, kh, kw)` if they are separate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ranksearch.tensors.als import Compressed, Rule, Terms, khatri_rao, unit
from ranksearch.tensors.matrix import Rows, floating, norm_of

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor

# Added to the diagonal of the normal equations, which is one. Stabilises float32 without a visible effect on the error.
RIDGE = 1e-6
# With a bound of 10, the error after a number of sweeps is no larger than without one; a bound of 2 makes it about 2 % larger.
# Without a bound the terms reach several hundred times the tensor's energy.
MAX_DEGENERACY = 10.0
# Noise added to the unit vectors of the first start and of the further starts.
_FIRST_NOISE, _FURTHER_NOISE = 1.0, 1.0
# A relative error of at most this many machine epsilons counts as zero.
_MAX_EXACT_EPS = 100


@dataclass(frozen=True)
class CPFit:
    """A sum of rank-one terms, in descending order of norm. Term r is the outer product of the r-th columns of all `factors`.

    Each mode carries an equal share of a term's norm. `error` is the relative Frobenius error of the reconstruction.
    `degeneracy` is the sum of the terms' squared norms over the tensor's squared norm; far above 1, large terms cancel.
    """

    factors: tuple[Float[Tensor, "dim rank"], ...]
    error: float
    degeneracy: float
    sweeps: int

    def to_tensorly(self) -> CPTensor:
        """The same terms as a TensorLy CP tensor with unit weights; its functions need TensorLy's torch backend."""
        # Imported here, since it would take half a second in every worker.
        from tensorly.cp_tensor import CPTensor

        return CPTensor((torch.ones_like(self.factors[0][0]), list(self.factors)))


def reconstruct(factors: Sequence[Float[Tensor, "dim rank"]]) -> Float[Tensor, "*dims"]:
    """The tensor that the factors represent; each factor belongs to one mode."""
    product = factors[0] @ khatri_rao([factor.T for factor in factors[1:]])
    return product.reshape([factor.shape[0] for factor in factors])


def exact_rank(shape: Sequence[int]) -> int:
    """A rank at which CP represents every tensor of this shape exactly: the product of all sizes but the largest."""
    return math.prod(shape) // max(shape)


def cp_als(
    tensor: Float[Tensor, "*dims"],
    rank: int,
    *,
    seed: int = 0,
    starts: int = 1,
    init: Sequence[Float[Tensor, "dim rank"]] | None = None,
    sweeps: int = 100,
    tolerance: float = 1e-5,
    ridge: float = RIDGE,
    max_degeneracy: float = MAX_DEGENERACY,
) -> CPFit:
    """CP decomposition by accelerated ALS (Harshman 1970, Carroll and Chang 1970), the best of several starts.

    The tensor is first compressed by an HOSVD, without loss. The first start is `init` if given, otherwise the largest terms
    of the SVDs of all slices that span the two largest modes, plus noise; further starts have other noise. Compared with
    starts from HOSVD vectors padded at random, these slices reach the same error with terms that cancel less. If they are
    exact, as from `exact_rank` on, they are returned without a sweep.

    Degenerate terms (Phan et al. 2020, "Stable low-rank tensor decomposition for compression of convolutional neural
    network") are prevented, not corrected afterwards: each update minimises the error under `degeneracy <= max_degeneracy`.
    That is the dual of their error-preserving correction, which lowers the degeneracy of a finished fit at constant error. On
    a kernel of 64 x 64 x 9 at rank 64, 100 sweeps bounded at 10 end with an error of 0.256. Without a bound they end with 0.259
    at a degeneracy of 280, which 300 sweeps of correction lower to 32.

    Args:
        tensor: At least two modes. All dtypes but float64 are computed in float32.
        rank: Number of terms, at least 1.
        seed: Seed of the starts; the same seed gives the same result.
        starts: How many fits to choose from.
        init: Factors (dim, rank) to start from, such as those of another fit.
        sweeps: Upper bound on the sweeps of one fit.
        tolerance: A fit ends when one sweep lowers the relative error by less than this, as in TensorLy.
        ridge: Added to the normal equations' unit diagonal, so that `error^2 + ridge * degeneracy` is minimised.
        max_degeneracy: Upper bound on the fit's degeneracy, at least 1; `math.inf` for none.

    Raises:
        ValueError: an argument is outside these ranges, or the tensor holds NaN or infinity.
    """
    rule = _rule(sweeps, tolerance, ridge, max_degeneracy)
    if starts < 1:
        raise ValueError(f"`starts >= 1` must hold, but got starts={starts}.")
    values = _checked(tensor, rank)
    if not bool(values.any()):
        return _zero_fit(values, rank)
    problem = Compressed.of(values, rank)
    slices = problem.slices(rank)
    if _is_exact(slices):
        return _expanded(values, problem, slices)
    generator = torch.Generator().manual_seed(seed)
    first = slices.with_noise(_FIRST_NOISE, generator) if init is None else _start_from(values, problem, rank, init)
    further = (slices.with_noise(_FURTHER_NOISE, generator) for _ in range(starts - 1))
    fits = [problem.fit(start, rule) for start in (first, *further)]
    return _expanded(values, problem, min(fits, key=lambda terms: terms.error))


def cp_path(
    tensor: Float[Tensor, "*dims"],
    ranks: Iterable[int],
    *,
    seed: int = 0,
    sweeps: int = 25,
    rows: Rows | None = None,
) -> dict[int, CPFit]:
    """CP fits of one tensor at each of these ranks, in ascending order.

    The fits are computed from the highest rank down; each starts from the largest terms of the one above. Spending the same
    time on more sweeps lowers the error more than additional fresh starts do. A fit ends after `sweeps`, or when a sweep lowers
    the relative error by less than 1e-4. `rows`, if given, is that of the tensor's first unfolding.

    Raises:
        ValueError: as in `cp_als`.
    """
    rule = _rule(sweeps, 1e-4, RIDGE, MAX_DEGENERACY)
    falling = sorted(set(ranks), reverse=True)
    if not falling:
        return {}
    values = _checked(tensor, falling[-1])
    if not bool(values.any()):
        return {rank: _zero_fit(values, rank) for rank in reversed(falling)}
    problem = Compressed.of(values, falling[0], rows)
    slices = problem.slices(falling[0])
    above = slices.with_noise(_FIRST_NOISE, torch.Generator().manual_seed(seed))
    fits = {}
    for rank in falling:
        terms = slices.first(rank)
        if not _is_exact(terms):
            terms = above = problem.fit(above.largest(rank), rule)
        fits[rank] = _expanded(values, problem, terms)
    return dict(reversed(fits.items()))


def _rule(sweeps: int, tolerance: float, ridge: float, max_degeneracy: float) -> Rule:
    if sweeps < 1:
        raise ValueError(f"`sweeps >= 1` must hold, but got sweeps={sweeps}.")
    if not (tolerance >= 0 and ridge >= 0):
        raise ValueError(f"`tolerance >= 0` and `ridge >= 0` must hold, but got {tolerance=}, {ridge=}.")
    if not max_degeneracy >= 1:
        raise ValueError(f"`max_degeneracy >= 1` must hold, but got max_degeneracy={max_degeneracy}.")
    return Rule(sweeps, tolerance, ridge, max_degeneracy)


def _checked(tensor: Tensor, rank: int) -> Tensor:
    if tensor.ndim < 2:
        raise ValueError(f"CP needs a tensor of at least two modes, but got shape {tuple(tensor.shape)}.")
    if rank < 1:
        raise ValueError(f"`rank >= 1` must hold, but got rank={rank}.")
    return floating(tensor)


def _is_exact(slices: Terms) -> bool:
    return slices.error <= _MAX_EXACT_EPS * torch.finfo(slices.weights.dtype).eps


def _zero_fit(tensor: Tensor, rank: int) -> CPFit:
    return CPFit(tuple(tensor.new_zeros(size, rank) for size in tensor.shape), 0.0, 0.0, 0)


def _start_from(tensor: Tensor, problem: Compressed, rank: int, init: Sequence[Tensor]) -> Terms:
    """Convert the factors `init` to the coordinates of the compressed core."""
    wanted = [(size, rank) for size in tensor.shape]
    if [tuple(factor.shape) for factor in init] != wanted:
        raise ValueError(f"`init` must hold factors of shapes {wanted}, but got {[tuple(f.shape) for f in init]}.")
    pairs = zip(problem.bases, init, strict=True)
    rows = tuple(unit(floating(factor).to(basis).T @ basis)[0] for basis, factor in pairs)
    return Terms(rows, problem.core.new_ones(rank))


def _expanded(tensor: Tensor, problem: Compressed, terms: Terms) -> CPFit:
    """Convert terms of the core to factors of the tensor, and compute the error of these factors instead of ALS's estimate."""
    ordered = terms.largest(len(terms.weights))
    share = (ordered.weights * problem.norm) ** (1 / tensor.ndim)
    factors = tuple((basis @ rows.T) * share for basis, rows in zip(problem.bases, ordered.rows, strict=True))
    error = norm_of(reconstruct(factors).sub_(tensor)) / problem.norm
    return CPFit(factors, error, ordered.degeneracy, terms.sweeps)
