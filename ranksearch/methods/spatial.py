"""Spatial SVD: a d x 1 convolution in -> rank, then a 1 x d convolution rank -> out (Jaderberg et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared, Shape, spatial, stack
from ranksearch.methods.layer import Layer
from ranksearch.tensors.matrix import SVDFactors, svd


class SpatialMethod(Method):
    """SVD of the kernel unfolded as (in x height, out x width)."""

    kind = plan.Spatial

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return len(weight) == 4 and min(weight[2:]) > 1

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        out, into, height, width = weight
        return (min(into * height, out * width),)

    def limits(self, weight: Shape) -> tuple[int, ...]:
        return self.bounds(weight)

    def from_vbmf(self, rank_in: int, rank_out: int) -> tuple[int, ...]:
        return (max(rank_in, rank_out),)

    def factor_shapes(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Shape, ...]:
        out, into, height, width = weight
        return (ranks[0], into, height), (out, ranks[0], width)

    def holds(self, weight: Shape) -> tuple[tuple[int, ...], ...]:
        return (1, 2), (3,)

    def positions(self, layer: Layer) -> tuple[int, ...]:
        (_, width), (out_height, out_width) = layer.in_size, layer.out_size
        return out_height * width, out_height * out_width

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int) -> Prepared:
        return vars(svd(kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)))

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        left, right = SVDFactors(**prepared).at(ranks[0])
        out, into, height, width = kernel.shape
        return left.T.reshape(-1, into, height), right.reshape(-1, out, width).permute(1, 0, 2)

    def balanced(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return factors

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        every = SVDFactors(**prepared).errors().tolist()
        return [every[rank - 1] for (rank,) in ranks]

    def reconstruct(self, factors: Sequence[Tensor], weight: Shape) -> Tensor:
        first, second = factors
        return torch.einsum("rih,orw->oihw", first, second)

    def build(self, module: nn.Module, weight: Shape, factors: Sequence[Tensor]) -> nn.Sequential:
        first, second = factors
        rank = len(first)
        high = spatial(module, weight, (weight[1], rank), axes=(0,))
        wide = spatial(module, weight, (rank, weight[0]), axes=(1,), bias=module.bias is not None)
        return stack(module, weight, [("high", high, first), ("wide", wide, second)])
