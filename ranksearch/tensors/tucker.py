"""Tucker-2 of a convolution kernel `(out, in, k)` with merged spatial modes. One HOSVD serves all pairs of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ranksearch.tensors.matrix import Rows, check_rank, floating, principal, signed, unfold

if TYPE_CHECKING:
    from tensorly.tucker_tensor import TuckerTensor


# Extra vectors in a subspace iteration. With four or more, HOOI's error is within 0.1 % of that with exact eigenvectors.
_EXTRA_VECTORS = 8


@dataclass(frozen=True)
class HOSVD:
    """`kernel[o, i, k] = sum_pq u_out[o, p] u_in[i, q] core[p, q, k]`, with orthonormal bases in descending order of energy.

    out_rank = min(out, in * k) and in_rank = min(in, out * k), so the representation is exact.
    """

    core: Float[Tensor, "out_rank in_rank k"]
    u_out: Float[Tensor, "out out_rank"]
    u_in: Float[Tensor, "in in_rank"]

    def at(self, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
        """Core (rank_out, rank_in, k), u_out (out, rank_out), u_in (in, rank_in), as slices of the full factors.

        Raises:
            ValueError: `rank_in` is not in 1..in_rank, or `rank_out` not in 1..out_rank.
        """
        check_rank("rank_in", rank_in, self.core.shape[1])
        check_rank("rank_out", rank_out, self.core.shape[0])
        return self.core[:rank_out, :rank_in], self.u_out[:, :rank_out], self.u_in[:, :rank_in]

    def to_tensorly(self, rank_in: int, rank_out: int) -> TuckerTensor:
        """The slice at these ranks as a TensorLy Tucker tensor, whose third factor is the identity.

        TensorLy's functions need its torch backend for it. Raises `ValueError` as `at` does.
        """
        # Imported here, since it would take half a second in every worker.
        from tensorly.tucker_tensor import TuckerTensor

        core, u_out, u_in = self.at(rank_in, rank_out)
        return TuckerTensor((core, [u_out, u_in, torch.eye(core.shape[2]).to(core)]))

    def errors(self) -> Float[Tensor, "in_rank out_rank"]:
        """Relative Frobenius error at every pair of ranks, in float64; entry [i - 1, o - 1] is for rank_in=i, rank_out=o.

        The core's energy outside the slice is summed, not obtained by subtraction, so that small errors keep their digits.
        """
        energy = self.core.double().square().sum(2)
        rows_out = _sum_after(energy.sum(1), 0)[:, None]
        columns_out = _sum_after(energy.cumsum(0), 1)
        total = energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return ((rows_out + columns_out) / total).sqrt().T


def hosvd(kernel: Float[Tensor, "out in_ k"], rows: Rows | None = None) -> HOSVD:
    """HOSVD of the first two modes (De Lathauwer et al. 2000), from two Gram matrices in float64.

    `rows`, if given, is that of the unfolding by output channels.

    Raises:
        ValueError: the kernel does not have three modes, or holds NaN or infinity.
    """
    values = _three_modes(kernel)
    rows = rows or Rows(lambda: unfold(values, 0))
    u_in = principal(unfold(values, 1))[0].to(values.dtype)
    core = torch.einsum("pik,iq->pqk", rows.turned().reshape(-1, *values.shape[1:]), u_in)
    return HOSVD(core, rows.vectors(), u_in)


def hooi(
    kernel: Float[Tensor, "out in_ k"], fit: HOSVD, rank_in: int, rank_out: int, *, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Refine the HOSVD `fit` at these ranks by `sweeps` of HOOI (De Lathauwer et al. 2000b).

    Returns core (rank_out, rank_in, k), u_out and u_in. Up to rounding, no sweep raises the error. The first sweep brings
    nearly all of the gain: see docs/benchmarks.md.

    Raises:
        ValueError: a rank is out of range, or the kernel does not have three modes or holds NaN or infinity.
    """
    values = _three_modes(kernel)
    _, u_out, u_in = fit.at(rank_in, rank_out)
    for _ in range(sweeps):
        u_out = _leading(torch.einsum("oik,iq->oqk", values, u_in).flatten(1), u_out, fit.u_out[:, rank_out:])
        u_in = _leading(torch.einsum("oik,op->ipk", values, u_out).flatten(1), u_in, fit.u_in[:, rank_in:])
    return _core(values, u_out, u_in), u_out, u_in


def _three_modes(kernel: Tensor) -> Tensor:
    if kernel.ndim != 3:
        raise ValueError(f"A kernel must have the three modes (out, in, k), but got shape {tuple(kernel.shape)}.")
    return floating(kernel)


def _core(kernel: Tensor, u_out: Tensor, u_in: Tensor) -> Tensor:
    return torch.einsum("oik,op,iq->pqk", kernel, u_out, u_in)


def _leading(matrix: Float[Tensor, "m n"], basis: Float[Tensor, "m r"], rest: Float[Tensor, "m s"]) -> Float[Tensor, "m r"]:
    """The leading left singular vectors, as many as `basis` has columns, by one step of subspace iteration from `basis`.

    The step also includes `_EXTRA_VECTORS` columns of `rest`: otherwise vectors of nearly equal singular values would separate
    slowly (Halko, Martinsson and Tropp 2011, where the start is random). It takes an eighth of the time of all eigenvectors.
    """
    start = torch.cat([basis, rest[:, :_EXTRA_VECTORS]], dim=1)
    span = torch.linalg.qr(matrix @ (matrix.T @ start)).Q
    inside = (span.T @ matrix).double()
    vectors = span @ torch.linalg.eigh(inside @ inside.T).eigenvectors.flip(1)[:, : basis.shape[1]].to(span.dtype)
    return vectors * signed(vectors)


def _sum_after(values: Tensor, dim: int) -> Tensor:
    """For each entry, the sum of all entries after it along `dim`."""
    behind = values.flip(dim).cumsum(dim).flip(dim)
    return torch.cat([behind.narrow(dim, 1, behind.shape[dim] - 1), torch.zeros_like(behind.narrow(dim, 0, 1))], dim)
