"""Spatial SVD: a d x 1 convolution in -> rank, then a 1 x d convolution rank -> out (Jaderberg et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared
from ranksearch.methods.parts import Part, Shape, is_separable
from ranksearch.methods.svd import errors_at
from ranksearch.tensors.matrix import Rows, SVDFactors, svd


class SpatialMethod(Method):
    """SVD of the kernel unfolded as (in x height, out x width)."""

    kind = plan.Spatial
    vbmf = ("larger",)
    vbmf_turn = 4

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return is_separable(weight)

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        out, into, height, width = weight
        return (min(into * height, out * width),)

    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        return Part("high", weight[1], ranks[0], (0,)), Part("wide", ranks[0], weight[0], (1,))

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        return vars(svd(kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)))

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        left, right = SVDFactors(**prepared).at(ranks[0])
        out, into, height, width = kernel.shape
        return left.T.reshape(-1, into, height), right.reshape(-1, out, width).permute(1, 0, 2)

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        return errors_at(prepared, ranks)
