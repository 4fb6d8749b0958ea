"""CP decomposition of a tensor with any number of modes, as a sum of rank-one terms that may not cancel each other.

Three modes `(out, in, k)` for a kernel with its spatial modes merged, four `(out, in, kh, kw)` for separate ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ranksearch.tensors.als import Compressed, Rule, Terms, khatri_rao, unit
from ranksearch.tensors.matrix import Principal, floating, norm_of

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor

# Relative to the diagonal of the normal equations, which is one: enough for float32, and below its effect on the error.
RIDGE = 1e-6
# A bound of 10 costs no error that the same number of sweeps without it would have found, one of 2 about 2 % of it.
# Without a bound the terms reach several hundred times the tensor's energy.
MAX_DEGENERACY = 10.0
# Noise on the first start, relative to its unit vectors, and on the further ones.
_NUDGE, _SHAKE = 1.0, 1.0
# Errors up to this many units of rounding are none.
_NOTHING = 100


@dataclass(frozen=True)
class CPFit:
    """A sum of rank-one terms by falling norm; term r is the outer product of the r-th columns of all `factors`.

    Every mode carries an equal share of a term's norm. `error` is the relative Frobenius error of the reconstruction;
    `degeneracy` the sum of the squared norms of the terms over that of the tensor: far above 1, large terms cancel.
    """

    factors: tuple[Float[Tensor, "dim rank"], ...]
    error: float
    degeneracy: float
    sweeps: int

    def to_tensorly(self) -> CPTensor:
        """The same terms as a TensorLy CP tensor with unit weights; its functions need TensorLy's torch backend."""
        # Here, since it takes half a second to import, in every worker.
        from tensorly.cp_tensor import CPTensor

        return CPTensor((torch.ones_like(self.factors[0][0]), list(self.factors)))


def reconstruct(factors: Sequence[Float[Tensor, "dim rank"]]) -> Float[Tensor, "*dims"]:
    """The tensor that the factors stand for, one mode a factor."""
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

    The tensor is compressed by an HOSVD first, without loss. The first start is `init` if given, otherwise the largest
    terms of the SVDs of the slices along the smaller modes, slightly disturbed; further starts are disturbed more.
    Measured against HOSVD vectors filled up at random, slices reach the same error with terms that cancel less. Where
    they leave out nothing, as from `exact_rank` on, they are the decomposition, and returned without a sweep.

    Degenerate terms (Phan et al. 2020, "Stable low-rank tensor decomposition for compression of convolutional neural
    network") are not corrected afterwards but excluded: every update minimises the error under
    `degeneracy <= max_degeneracy`, so that every fit keeps the bound. That is the dual of their error-preserving
    correction, which lowers the degeneracy of a finished fit at constant error. Measured on a kernel of 64 x 64 x 9 at
    rank 64: bounded at 10, 100 sweeps end with an error of 0.256; free, with 0.259 at a degeneracy of 280, which 300
    sweeps of correction lower to 32.

    Args:
        tensor: At least two modes. Half precision is computed in float32, and so is every type but float64.
        rank: Number of terms, at least 1.
        seed: Of the starts; one seed, one result.
        starts: How many fits to choose from.
        init: Factors (dim, rank) to start from, such as those of another fit.
        sweeps: Upper bound on the sweeps of one fit.
        tolerance: A fit ends when one sweep lowers the relative error by less than this, as TensorLy's does.
        ridge: Added to the normal equations' unit diagonal; `error^2 + ridge * degeneracy` is what is minimised.
        max_degeneracy: Bound on the fit's degeneracy, at least 1; `math.inf` for none.

    Raises:
        ValueError: an argument outside these ranges, or NaN or infinity in the tensor.
    """
    rule = _rule(sweeps, tolerance, ridge, max_degeneracy)
    if starts < 1:
        raise ValueError(f"`starts >= 1` must hold, but got starts={starts}.")
    values = _checked(tensor, rank)
    if not bool(values.any()):
        return _nothing(values, rank)
    problem = Compressed.of(values, rank)
    slices = problem.slices(rank)
    if _is_exact(slices):
        return _expanded(values, problem, slices)
    generator = torch.Generator().manual_seed(seed)
    first = slices.shaken(_NUDGE, generator) if init is None else _projected(values, problem, rank, init)
    further = (slices.shaken(_SHAKE, generator) for _ in range(starts - 1))
    fits = [problem.fit(start, rule) for start in (first, *further)]
    return _expanded(values, problem, min(fits, key=lambda terms: terms.error))


def cp_path(
    tensor: Float[Tensor, "*dims"],
    ranks: Iterable[int],
    *,
    seed: int = 0,
    sweeps: int = 25,
    rows: Callable[[], Principal] | None = None,
) -> dict[int, CPFit]:
    """CP fits of one tensor for all these ranks, by rising rank.

    `rows` gives `principal` of the tensor's first unfolding if that is known already.

    Each ends after `sweeps`, or when one lowers the error by less than 1e-4.

    Computed from the highest rank down, each fit starting from the largest terms of the one above. Fresh starts beside
    these were measured: the same time spent on more sweeps lowers the error more.

    Raises:
        ValueError: as `cp_als`.
    """
    rule = _rule(sweeps, 1e-4, RIDGE, MAX_DEGENERACY)
    falling = sorted(set(ranks), reverse=True)
    if not falling:
        return {}
    values = _checked(tensor, falling[-1])
    if not bool(values.any()):
        return {rank: _nothing(values, rank) for rank in reversed(falling)}
    problem = Compressed.of(values, falling[0], rows)
    slices = problem.slices(falling[0])
    above = slices.shaken(_NUDGE, torch.Generator().manual_seed(seed))
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
    return slices.error <= _NOTHING * torch.finfo(slices.weights.dtype).eps


def _nothing(tensor: Tensor, rank: int) -> CPFit:
    return CPFit(tuple(tensor.new_zeros(size, rank) for size in tensor.shape), 0.0, 0.0, 0)


def _projected(tensor: Tensor, problem: Compressed, rank: int, init: Sequence[Tensor]) -> Terms:
    """Given factors in the coordinates of the compressed core."""
    wanted = [(size, rank) for size in tensor.shape]
    if [tuple(factor.shape) for factor in init] != wanted:
        raise ValueError(f"`init` must hold factors of shapes {wanted}, but got {[tuple(f.shape) for f in init]}.")
    pairs = zip(problem.bases, init, strict=True)
    rows = tuple(unit(floating(factor).to(basis).T @ basis)[0] for basis, factor in pairs)
    return Terms(rows, problem.core.new_ones(rank))


def _expanded(tensor: Tensor, problem: Compressed, terms: Terms) -> CPFit:
    """Terms of the core as factors of the tensor, with the error of just these factors rather than ALS's estimate."""
    ordered = terms.largest(len(terms.weights))
    share = (ordered.weights * problem.norm) ** (1 / tensor.ndim)
    factors = tuple((basis @ rows.T) * share for basis, rows in zip(problem.bases, ordered.rows, strict=True))
    error = norm_of(reconstruct(factors).sub_(tensor)) / problem.norm
    return CPFit(factors, error, ordered.degeneracy, terms.sweeps)
