"""CP4, the thesis's TD block: 1x1 in -> rank, depthwise d x 1, depthwise 1 x d, 1x1 rank -> out (Lebedev et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared, Shape, pointwise, spatial, stack
from ranksearch.methods.cp import factors_at, most_terms, prepare_path
from ranksearch.methods.layer import Layer
from ranksearch.tensors.cp import exact_rank, reconstruct


class CP4Method(Method):
    """CP of the four-way tensor (out, in, height, width); fewer parameters at a rank than CP, and a larger error."""

    kind = plan.CP4

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return len(weight) == 4 and min(weight[2:]) > 1

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        return (exact_rank(weight),)

    def limits(self, weight: Shape) -> tuple[int, ...]:
        return (most_terms(weight, *self.bounds(weight)),)

    def from_vbmf(self, rank_in: int, rank_out: int) -> tuple[int, ...]:
        return (max(rank_in, rank_out),)

    def factor_shapes(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Shape, ...]:
        rank = ranks[0]
        return (rank, weight[1]), (rank, weight[2]), (rank, weight[3]), (weight[0], rank)

    def holds(self, weight: Shape) -> tuple[tuple[int, ...], ...]:
        return (1,), (2,), (3,), ()

    def positions(self, layer: Layer) -> tuple[int, ...]:
        (height, width), (out_height, out_width) = layer.in_size, layer.out_size
        after = out_height * out_width
        return height * width, out_height * width, after, after

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int) -> Prepared:
        return prepare_path(kernel, ranks, seed)

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        out, into, high, wide = factors_at(kernel, prepared, ranks[0], seed, sweeps)
        return into.T, high.T, wide.T, out

    def balanced(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return factors

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        return [float(prepared[f"{rank}.error"]) for (rank,) in ranks]

    def reconstruct(self, factors: Sequence[Tensor], weight: Shape) -> Tensor:
        reduce, high, wide, expand = factors
        return reconstruct((expand, reduce.T, high.T, wide.T))

    def build(self, module: nn.Module, weight: Shape, factors: Sequence[Tensor]) -> nn.Sequential:
        reduce, high, wide, expand = factors
        rank = len(reduce)
        parts = [
            ("reduce", pointwise(weight, weight[1], rank), reduce),
            ("high", spatial(module, weight, (rank, rank), axes=(0,), groups=rank), high),
            ("wide", spatial(module, weight, (rank, rank), axes=(1,), groups=rank), wide),
            ("expand", pointwise(weight, rank, weight[0], bias=module.bias is not None), expand),
        ]
        return stack(module, weight, parts)
