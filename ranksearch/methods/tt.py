"""Tensor train: 1x1 in -> rank_in, d x 1 rank_in -> rank_mid, 1 x d rank_mid -> rank_out, 1x1 rank_out -> out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared
from ranksearch.methods.parts import Part, Shape, is_separable, mixes_channels
from ranksearch.tensors.matrix import Rows, floating, principal


class TTMethod(Method):
    """Tensor train of the kernel as (in, height, width, out), by TT-SVD (Oseledets 2011).

    Unlike TT-SVD, which projects the kernel on each basis before it computes the next, all three bases come from unfoldings of
    the whole kernel. So the ranks are nested, and one decomposition serves all of them. The bound on the error is the same: the
    root of the sum of the three unfoldings' squared errors.
    """

    kind = plan.TT
    vbmf = ("in", "larger", "out")
    vbmf_turn = 5

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return is_separable(weight) and mixes_channels(weight)

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        out, into, height, width = weight
        return min(into, height * width * out), min(into * height, width * out), min(into * height * width, out)

    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        rank_in, rank_mid, rank_out = ranks
        return (
            Part("reduce", weight[1], rank_in),
            Part("high", rank_in, rank_mid, (0,)),
            Part("wide", rank_mid, rank_out, (1,)),
            Part("expand", rank_out, weight[0]),
        )

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        tensor = floating(kernel).double().permute(1, 2, 3, 0)
        u_in, u_mid = principal(tensor.flatten(1))[0], principal(tensor.flatten(0, 1).flatten(1))[0]
        u_out = principal(tensor.flatten(0, 2).T)[0]
        into, height, width, out = tensor.shape
        high = torch.einsum("ip,ihm->phm", u_in, u_mid.reshape(into, height, -1))
        wide = (u_mid.T @ tensor.reshape(into * height, -1)).reshape(-1, width, out) @ u_out
        rank_table = torch.tensor(ranks, dtype=torch.int64).reshape(-1, 3)
        cores = {"in": u_in, "high": high, "wide": wide, "out": u_out}
        prepared = {name: core.to(floating(kernel).dtype) for name, core in cores.items()}
        return prepared | {"ranks": rank_table, "errors": _errors(high, wide, rank_table)}

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        rank_in, rank_mid, rank_out = ranks
        cores = [
            prepared["in"][None, :, :rank_in],
            prepared["high"][:rank_in, :, :rank_mid],
            prepared["wide"][:rank_mid, :, :rank_out],
            prepared["out"][:, :rank_out].T[:, :, None],
        ]
        if sweeps:
            cores = _refined(floating(kernel).permute(1, 2, 3, 0), cores, sweeps)
        reduce, high, wide, expand = cores
        return reduce[0].T, high.permute(2, 0, 1), wide.permute(2, 0, 1), expand[:, :, 0].T

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        errors = dict(zip(map(tuple, prepared["ranks"].tolist()), prepared["errors"].tolist(), strict=True))
        return [errors[each] for each in ranks]


def _errors(high: Tensor, wide: Tensor, ranks: Tensor) -> Tensor:
    """The relative errors at `ranks` (n, 3). `high` and `wide` are in orthonormal bases of the channels, which keep norms."""
    full = torch.tensordot(high, wide, 1)
    energy = full.square().sum((1, 2))
    squared_errors = torch.zeros(len(ranks), dtype=torch.float64)
    for place, (rank_in, rank_mid, rank_out) in enumerate(ranks.tolist()):
        truncated = torch.tensordot(high[:rank_in, :, :rank_mid], wide[:rank_mid, :, :rank_out], 1)
        missed = (full[:rank_in, :, :, :rank_out] - truncated).square().sum()
        squared_errors[place] = missed + energy[rank_in:].sum() + energy[:rank_in, rank_out:].sum()
    relative: Tensor = squared_errors / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    return relative.sqrt()


def _refined(tensor: Tensor, cores: Sequence[Tensor], sweeps: int) -> list[Tensor]:
    """The cores (before, size, after) after `sweeps` of alternating least squares; each step solves for one core."""
    values, cores, dtype = tensor.double(), [core.double() for core in cores], tensor.dtype
    for _ in range(sweeps):
        for place, core in enumerate(cores):
            before, size, after = core.shape
            left = torch.linalg.pinv(_chain(1, cores[:place]).reshape(-1, before))
            right = torch.linalg.pinv(_chain(after, cores[place + 1 :]).reshape(after, -1))
            blocks = values.reshape(left.shape[1], size, right.shape[0])
            cores[place] = torch.einsum("pa,anb,bq->pnq", left, blocks, right)
    return [core.to(dtype) for core in cores]


def _chain(before: int, cores: Sequence[Tensor]) -> Tensor:
    """The product of consecutive cores; `before` is the first size of the first core. Without cores, the identity."""
    product = torch.eye(before, dtype=torch.float64)
    for core in cores:
        product = torch.tensordot(product, core, 1)
    return product
