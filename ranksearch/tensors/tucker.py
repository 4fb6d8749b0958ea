"""Tucker-2 of a convolution kernel `(out, in, k)`, spatial modes merged: one HOSVD serves every pair of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ranksearch.tensors.matrix import Principal, check_rank, floating, principal, signed, unfold

if TYPE_CHECKING:
    from tensorly.tucker_tensor import TuckerTensor


# Vectors that join a subspace iteration: with four or more HOOI's error is that of exact eigenvectors to 0.1 %.
_EXTRA = 8


@dataclass(frozen=True)
class HOSVD:
    """`kernel[o, i, k] = sum_pq u_out[o, p] u_in[i, q] core[p, q, k]`, both bases orthonormal, by falling energy.

    out' = min(out, in * k) and in' = min(in, out * k), so nothing of the kernel is lost.
    """

    core: Float[Tensor, "out_rank in_rank k"]
    u_out: Float[Tensor, "out out_rank"]
    u_in: Float[Tensor, "in in_rank"]

    def at(self, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
        """Core (rank_out, rank_in, k), u_out (out, rank_out), u_in (in, rank_in): a slice, so the ranks are nested.

        Raises:
            ValueError: a rank is not in 1..in' or 1..out'.
        """
        check_rank("rank_in", rank_in, self.core.shape[1])
        check_rank("rank_out", rank_out, self.core.shape[0])
        return self.core[:rank_out, :rank_in], self.u_out[:, :rank_out], self.u_in[:, :rank_in]

    def to_tensorly(self, rank_in: int, rank_out: int) -> TuckerTensor:
        """The slice at these ranks as a TensorLy Tucker tensor with the identity for the third mode; its functions need
        TensorLy's torch backend. Raises `ValueError` as `at`."""
        # Here, since it takes half a second to import, in every worker.
        from tensorly.tucker_tensor import TuckerTensor

        core, u_out, u_in = self.at(rank_in, rank_out)
        return TuckerTensor((core, [u_out, u_in, torch.eye(core.shape[2]).to(core)]))

    def errors(self) -> Float[Tensor, "in_rank out_rank"]:
        """Relative Frobenius error of every pair, float64: entry [i - 1, o - 1] belongs to rank_in=i, rank_out=o.

        The root of the core's energy outside the slice, which is summed and never subtracted, so that small errors
        keep their digits.
        """
        energy = self.core.double().square().sum(2)
        rows_out = _after(energy.sum(1), 0)[:, None]
        columns_out = _after(energy.cumsum(0), 1)
        total = energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return ((rows_out + columns_out) / total).sqrt().T


def hosvd(kernel: Float[Tensor, "out in_ k"], rows: Callable[[], Principal] | None = None) -> HOSVD:
    """Truncatable HOSVD of the first two modes (De Lathauwer et al. 2000), from two Gram matrices in float64.

    `rows` gives `principal` of the unfolding by output channels if that is known already.

    Raises:
        ValueError: the kernel has not three modes, or holds NaN or infinity.
    """
    values = _three_modes(kernel)
    u_out = (rows() if rows else principal(unfold(values, 0)))[0].to(values.dtype)
    u_in = principal(unfold(values, 1))[0].to(values.dtype)
    return HOSVD(_core(values, u_out, u_in), u_out, u_in)


def hooi(
    kernel: Float[Tensor, "out in_ k"], fit: HOSVD, rank_in: int, rank_out: int, *, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Core (rank_out, rank_in, k), u_out and u_in after `sweeps` of HOOI (De Lathauwer et al. 2000b) from the kernel's HOSVD.

    But for rounding no sweep raises the error. The first one gains nearly all that there is: see docs/benchmarks.md.

    Raises:
        ValueError: a rank is out of range, or the kernel is not three finite modes.
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
    """As many leading left singular vectors as `basis` has columns: one step of subspace iteration from it.

    Some of the `rest` of an orthonormal basis join it for the step, or vectors of nearly equal singular values would
    part slowly (Halko, Martinsson and Tropp 2011, where the start is random). An eighth of the time of all eigenvectors.
    """
    start = torch.cat([basis, rest[:, :_EXTRA]], dim=1)
    span = torch.linalg.qr(matrix @ (matrix.T @ start)).Q
    inside = (span.T @ matrix).double()
    vectors = span @ torch.linalg.eigh(inside @ inside.T).eigenvectors.flip(1)[:, : basis.shape[1]].to(span.dtype)
    return vectors * signed(vectors)


def _after(values: Tensor, dim: int) -> Tensor:
    """Sum of everything behind each entry along `dim`."""
    behind = values.flip(dim).cumsum(dim).flip(dim)
    return torch.cat([behind.narrow(dim, 1, behind.shape[dim] - 1), torch.zeros_like(behind.narrow(dim, 0, 1))], dim)
