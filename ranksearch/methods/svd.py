"""SVD: two matrices, in -> rank -> out, for fully connected layers and 1x1 convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared
from ranksearch.methods.parts import Part, Shape, every_axis, has_positions
from ranksearch.tensors.matrix import Rows, SVDFactors, svd


class SVDMethod(Method):
    """The best approximation of the weight matrix at a rank (Eckart and Young 1936)."""

    kind = plan.SVD
    vbmf = ("larger",)
    vbmf_turn = 0

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return linear or not has_positions(weight)

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        return (min(weight[0], math.prod(weight[1:])),)

    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        # The first convolution has the stride, so both run at the output's resolution.
        return Part("reduce", weight[1], ranks[0], every_axis(weight), as_matrix=True), Part("expand", ranks[0], weight[0])

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        return vars(svd(kernel.flatten(1), rows))

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        left, right = SVDFactors(**prepared).at(ranks[0])
        return right, left

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        return errors_at(prepared, ranks)


def errors_at(prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
    """The relative errors of a truncated SVD."""
    errors = SVDFactors(**prepared).errors().tolist()
    return [errors[rank - 1] for (rank,) in ranks]
