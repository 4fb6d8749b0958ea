"""Accelerated alternating least squares (ALS) for CP, with bounded degeneracy. Its public interface is `ranksearch.tensors.cp`.

Everything here works on a tensor of norm one, compressed by an HOSVD, and on rank-one terms stored as unit vectors and
weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from ranksearch.tensors.matrix import Rows, norm_of, principal, unfold

_NEWTON_STEPS = 50
# Eigenvalues of a Gram matrix in float64 that exceed this part of the largest are not just rounding.
_ROUNDING = 1e-12
# The short core has at least _MIN_SHORT directions in its longest mode. Only a mode at least _MIN_SHORTENING times as long is
# shortened.
_MIN_SHORT, _MIN_SHORTENING = 256, 4
# Sweeps over the whole core after those over the short one. On 4096 x 256 x 36 at ranks 47 to 1024, with a flat and with a
# falling spectrum, the error was then 0.9985 to 1.0005 times that of 25 sweeps over the whole core.
_FINAL_SWEEPS = 1
# The search for a ridge stops once the degeneracy lies between this part of the bound and the bound: mostly after one
# factorization of the normal equations.
_BOUND_REACHED = 0.97


@dataclass(frozen=True)
class Terms:
    """Rank-one terms. Row r of each mode is the unit vector of term r, or zero for an empty term; `weights` are the norms."""

    rows: tuple[Float[Tensor, "rank dim"], ...]
    weights: Float[Tensor, " rank"]
    error: float = math.inf
    sweeps: int = 0
    ridges: tuple[float, ...] = ()
    """The ridge of each mode's last update, from which the next search for a ridge starts."""

    @property
    def degeneracy(self) -> float:
        """Sum of the squared norms of the terms. The tensor's own squared norm is one."""
        return float(self.weights.double().square().sum())

    def largest(self, rank: int) -> Terms:
        """The `rank` terms of largest norm, in descending order, padded with empty terms. Error and sweeps are reset."""
        order = self.weights.argsort(descending=True, stable=True)[:rank]
        empty = max(rank - len(self.weights), 0)
        pad = torch.nn.functional.pad
        rows = tuple(pad(row[order], (0, 0, 0, empty)) for row in self.rows)
        return Terms(rows, pad(self.weights[order], (0, empty)))

    def first(self, rank: int) -> Terms:
        """The first `rank` terms, with the error of leaving out the others. The terms must be orthogonal to each other."""
        left_out = float(self.weights[rank:].double().norm())
        return replace(self.largest(rank), error=math.hypot(self.error, left_out))

    def with_noise(self, amount: float, generator: torch.Generator) -> Terms:
        """The same terms after adding noise of about norm `amount` to their unit vectors."""
        rows = []
        for row in self.rows:
            # Drawn on the CPU in float64, so that a seed gives the same start on every device and for every dtype.
            noise = torch.randn(row.shape, generator=generator, dtype=torch.float64).to(row)
            rows.append(unit(row + amount / math.sqrt(row.shape[1]) * noise)[0])
        return Terms(tuple(rows), self.weights)

    def extrapolated(self, older: Terms, momentum: float) -> Terms:
        """These terms, extrapolated by `momentum` times the step from `older` to them."""
        rows = tuple(unit(now + momentum * (now - then))[0] for now, then in zip(self.rows, older.rows, strict=True))
        return replace(self, rows=rows)


@dataclass(frozen=True)
class Compressed:
    """A tensor as `norm` times a core of norm one, multiplied by a basis with orthonormal columns in every mode.

    If the core's longest mode is several times longer than the requested rank, `leading` holds its `s` leading directions and
    `short` the core projected onto them.
    """

    core: Float[Tensor, "*core_dims"]
    bases: tuple[Float[Tensor, "dim core_dim"], ...]
    norm: float
    leading: Float[Tensor, "core_dim s"] | None = None
    short: Float[Tensor, "*short_dims"] | None = None

    @classmethod
    def of(cls, tensor: Float[Tensor, "*dims"], rank: int, rows: Rows | None = None) -> Compressed:
        """Compress a nonzero tensor by an HOSVD of the modes where it helps.

        `rank` is the largest rank that will be fitted. `rows`, if given, is that of the first unfolding.

        Only slices below the rounding of the tensor's dtype are dropped. This makes tensors of low rank, and modes longer than
        the product of all others, cheap, and does not change the error of any CP. Either of the two longest modes is left
        as it is if it has no such slices, since rotating it would take as long as several sweeps.
        """
        norm = norm_of(tensor)
        core = tensor.double() / norm
        bases = [torch.eye(size, dtype=tensor.dtype, device=tensor.device) for size in tensor.shape]
        by_size = sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
        leading = None
        for mode in by_size:
            unfolding = unfold(core, mode)
            basis, energy = rows.principal() if rows and mode == 0 else principal(unfolding)
            if mode in by_size[-2:] and len(energy) == len(unfolding) and energy[-1] > _ROUNDING * energy[0]:
                leading = basis if mode == by_size[-1] else None
                continue
            turned = basis.T @ unfolding
            kept = turned.norm(dim=1) > 2 * torch.finfo(tensor.dtype).eps
            rest = [size for other, size in enumerate(core.shape) if other != mode]
            core = turned[kept].reshape(-1, *rest).movedim(0, mode)
            bases[mode] = basis[:, kept].to(tensor.dtype)
        whole = cls(core.to(tensor.dtype).contiguous(), tuple(bases), norm)
        size = max(rank, _MIN_SHORT)
        if leading is None or len(leading) < _MIN_SHORTENING * size:
            return whole
        leading = leading[:, :size].to(tensor.dtype)
        return replace(whole, leading=leading, short=_onto(whole.core, leading.T))

    def slices(self, rank: int) -> Terms:
        """`slice_terms` of the core, or of the short core if there is one."""
        if self.short is None or self.leading is None:
            return slice_terms(self.core, rank)
        found = slice_terms(self.short, rank)
        outside = math.sqrt(max(0.0, 1 - norm_of(self.short) ** 2))
        return replace(_transformed(found, longest(self.core), self.leading.T), error=math.hypot(found.error, outside))

    def fit(self, start: Terms, rule: Rule) -> Terms:
        """Fit by `run`: first on the short core, if there is one, then for up to `_FINAL_SWEEPS` sweeps on the whole core.

        Bro and Andersson 1998, "Improving the speed of multiway algorithms, part II: compression".
        """
        if self.short is None or self.leading is None or rule.sweeps <= _FINAL_SWEEPS:
            return run(self.core, start, rule)
        long, size = longest(self.core), max(len(start.weights), _MIN_SHORT)
        leading, short = self.leading[:, :size], self.short.narrow(long, 0, size).contiguous()
        near = run(
            short / norm_of(short), _transformed(start, long, leading), replace(rule, sweeps=rule.sweeps - _FINAL_SWEEPS)
        )
        last = run(self.core, _transformed(near, long, leading.T), replace(rule, sweeps=_FINAL_SWEEPS))
        return replace(last, sweeps=near.sweeps + last.sweeps)


@dataclass(frozen=True)
class Rule:
    """When to stop, and how large the terms may become: the arguments of `ranksearch.tensors.cp.cp_als`."""

    sweeps: int
    tolerance: float
    ridge: float
    max_degeneracy: float


def longest(core: Tensor) -> int:
    """The longest mode; the last one if several are equal."""
    return max(range(core.ndim), key=lambda mode: (core.shape[mode], mode))


def _onto(core: Tensor, rows: Float[Tensor, "s dim"]) -> Tensor:
    """The core, projected onto these directions of its longest mode."""
    mode = longest(core)
    return torch.tensordot(rows, core, dims=([1], [mode])).movedim(0, mode).contiguous()


def _transformed(terms: Terms, mode: int, matrix: Float[Tensor, "dim other"]) -> Terms:
    """The terms after multiplying the vectors of one mode by `matrix` and normalising them."""
    rows = list(terms.rows)
    rows[mode] = unit(rows[mode] @ matrix)[0]
    return replace(terms, rows=tuple(rows), ridges=())


def unit(rows: Float[Tensor, "rank dim"]) -> tuple[Float[Tensor, "rank dim"], Float[Tensor, " rank"]]:
    """The normalised rows and their norms. Zero rows stay zero."""
    norms = rows.norm(dim=1)
    return rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)[:, None], norms


def khatri_rao(rows: Sequence[Float[Tensor, "rank dim"]]) -> Float[Tensor, "rank product"]:
    """The Kronecker product of the modes' rows, term by term; the index of the last mode runs fastest."""
    product = rows[0]
    for row in rows[1:]:
        product = (product[:, :, None] * row[:, None, :]).flatten(1)
    return product


def slice_terms(core: Float[Tensor, "*dims"], rank: int) -> Terms:
    """The `rank` largest terms of the SVDs of all slices that span the two largest modes, with their error.

    These terms are orthogonal to each other, so their sum cannot degenerate and its error is the norm of the terms left out.
    At a rank equal to the product of all sizes but the largest, the sum is the core itself.
    """
    *small, short, long = sorted(range(core.ndim), key=lambda mode: core.shape[mode])
    slices = core.permute(*small, short, long).reshape(-1, core.shape[short], core.shape[long])
    left, singular, right = torch.linalg.svd(slices, full_matrices=False)
    weights, order = singular.flatten().sort(descending=True, stable=True)
    place, which = order[:rank] // singular.shape[1], order[:rank] % singular.shape[1]
    rows = {short: left[place, :, which], long: right[place, which, :]}
    for mode in reversed(small):
        rows[mode] = torch.nn.functional.one_hot(place % core.shape[mode], core.shape[mode]).to(core.dtype)
        place = place // core.shape[mode]
    left_out = float(weights[rank:].double().norm())
    return Terms(tuple(rows[mode] for mode in range(core.ndim)), weights[:rank], left_out).first(rank)


def run(core: Float[Tensor, "*dims"], start: Terms, rule: Rule) -> Terms:
    """Sweep until a sweep lowers the error by less than `tolerance`. A sweep that raises the error is discarded.

    Between sweeps the terms move on by Nesterov's momentum, which restarts when it overshoots (Mitchell, Ye and De Sterck
    2020, "Nesterov acceleration of alternating least squares for canonical tensor decomposition").
    """
    older = last = sweep(core, start, rule)
    age, done = 1, 1
    while done < rule.sweeps:
        momentum = (age - 1) / (age + 2)
        tried = sweep(core, last.extrapolated(older, momentum), rule)
        done += 1
        gain = last.error - tried.error
        if gain >= 0:
            older, last = last, tried
        if gain > rule.tolerance:
            age += 1
        elif momentum == 0:
            break
        else:
            # Momentum overshot or gained too little. Only a sweep without momentum can show that the fit has converged.
            older, age = last, 1
    return replace(last, sweeps=done)


def sweep(core: Float[Tensor, "*dims"], terms: Terms, rule: Rule) -> Terms:
    """Update every mode once, the longest first, and compute the error without a reconstruction."""
    long = max(range(core.ndim), key=lambda mode: core.shape[mode])
    rest = [mode for mode in range(core.ndim) if mode != long]
    matrix = unfold(core, long)
    rows, grams = list(terms.rows), [_gram(row) for row in terms.rows]
    ridges, weights = list(terms.ridges or [0.0] * core.ndim), terms.weights
    projection = khatri_rao([rows[mode] for mode in rest]) @ matrix.T
    partial = None
    for mode, *later in ([long], *(rest[place:] for place in range(len(rest)))):
        if mode != long:
            # One more product with the whole tensor serves all shorter modes; each is contracted out once it is updated.
            partial = (rows[long] @ matrix).unflatten(1, [core.shape[m] for m in rest]) if partial is None else partial
            projection = _project(partial, [rows[other] for other in later])
        others = reduce(torch.mul, grams[:mode] + grams[mode + 1 :])
        solution, ridges[mode] = solve(others, projection.double(), rule, ridges[mode])
        rows[mode], weights = unit(solution.to(core.dtype))
        grams[mode] = _gram(rows[mode])
        if later:
            assert partial is not None
            partial = torch.einsum("ri,ri...->r...", rows[mode], partial)
    scaled = weights.double()
    inner = float(scaled @ (projection * rows[rest[-1]]).sum(1).double())
    squared = 1 - 2 * inner + float(scaled @ reduce(torch.mul, grams) @ scaled)
    return Terms(tuple(rows), weights, math.sqrt(max(squared, 0.0)), ridges=tuple(ridges))


def solve(
    gram: Float[Tensor, "rank rank"], right: Float[Tensor, "rank dim"], rule: Rule, ridge: float = 0.0
) -> tuple[Float[Tensor, "rank dim"], float]:
    """Solve one mode's normal equations, `(gram + ridge I) x = right`, with a ridge large enough for `|x|^2 <= max_degeneracy`.

    Since the other modes hold unit vectors, |x|^2 is the sum of the squared norms of the terms. So the result has the least
    error of all solutions within the bound (up to the few per cent that `_BOUND_REACHED` allows). The ridge solves the secular
    equation |x|^2 = max_degeneracy by Newton's method, as in trust regions (Conn, Gould and Toint 2000, section 7.3), starting
    from the given ridge. Returns x and the final ridge. All in float64.
    """
    least, bound = rule.ridge, rule.max_degeneracy
    ridge = max(ridge, least)
    for _ in range(_NEWTON_STEPS):
        damped = gram.clone()
        damped.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            ridge = least = max(10 * ridge, float(gram.trace()) * torch.finfo(gram.dtype).eps)
            continue
        solution = torch.cholesky_solve(right, triangle)
        length = float(solution.square().sum())
        if length <= bound and (ridge <= least or length >= _BOUND_REACHED * bound or not length):
            break
        slope = float(torch.linalg.solve_triangular(triangle, solution, upper=False).square().sum())
        ridge = max(least, ridge + (math.sqrt(length / bound * 2 / (1 + _BOUND_REACHED)) - 1) * length / slope)
    return solution, ridge


def _gram(row: Tensor) -> Tensor:
    # In float64, since the normal equations square the condition number, which is large for nearly parallel terms.
    return (row @ row.T).double()


def _project(partial: Float[Tensor, "rank dim *others"], rows: list[Tensor]) -> Float[Tensor, "rank dim"]:
    """Contract every mode of `partial` but the first with its rows, term by term."""
    return (partial.flatten(2) @ khatri_rao(rows)[:, :, None]).squeeze(2) if rows else partial
