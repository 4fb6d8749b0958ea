"""SVD: two matrices, in -> rank -> out, for fully connected layers and 1x1 convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared, Shape, pointwise, spatial, stack
from ranksearch.methods.layer import Layer
from ranksearch.tensors.matrix import SVDFactors, svd


class SVDMethod(Method):
    """Best approximation of the weight matrix at its rank (Eckart and Young 1936)."""

    kind = plan.SVD

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return linear or math.prod(weight[2:]) == 1

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        return (min(_matrix(weight)),)

    def limits(self, weight: Shape) -> tuple[int, ...]:
        return self.bounds(weight)

    def from_vbmf(self, rank_in: int, rank_out: int) -> tuple[int, ...]:
        return (max(rank_in, rank_out),)

    def factor_shapes(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Shape, ...]:
        rows, columns = _matrix(weight)
        return (ranks[0], columns), (rows, ranks[0])

    def holds(self, weight: Shape) -> tuple[tuple[int, ...], ...]:
        return tuple(range(1, len(weight))), ()

    def positions(self, layer: Layer) -> tuple[int, ...]:
        # A stride stands in the first convolution, so both run at the output's resolution.
        after = math.prod(layer.out_size)
        return after, after

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int) -> Prepared:
        return vars(svd(kernel.flatten(1)))

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        left, right = SVDFactors(**prepared).at(ranks[0])
        return right, left

    def balanced(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return factors

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        every = SVDFactors(**prepared).errors().tolist()
        return [every[rank - 1] for (rank,) in ranks]

    def reconstruct(self, factors: Sequence[Tensor], weight: Shape) -> Tensor:
        first, second = factors
        return (second @ first).reshape(weight)

    def build(self, module: nn.Module, weight: Shape, factors: Sequence[Tensor]) -> nn.Sequential:
        first, second = factors
        rank = len(first)
        if isinstance(module, nn.Linear):
            weight = _matrix(weight)
            reduce: nn.Module = pointwise(weight, weight[1], rank)
        else:
            reduce = spatial(module, weight, (weight[1], rank), axes=range(len(weight) - 2))
        expand = pointwise(weight, rank, weight[0], bias=module.bias is not None)
        return stack(module, weight, [("reduce", reduce, first), ("expand", expand, second)])


def _matrix(weight: Shape) -> tuple[int, int]:
    return weight[0], math.prod(weight[1:])
