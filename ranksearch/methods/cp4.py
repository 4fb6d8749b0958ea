"""CP4, the thesis's TD block: 1x1 in -> rank, depthwise d x 1, depthwise 1 x d, 1x1 rank -> out (Lebedev et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared
from ranksearch.methods.cp import errors_at, factors_at, prepare_path
from ranksearch.methods.parts import Part, Shape, is_separable, mixes_channels
from ranksearch.tensors.cp import exact_rank
from ranksearch.tensors.matrix import Rows


class CP4Method(Method):
    """CP of the four-way tensor (out, in, height, width); at equal rank it is smaller than CP, with a larger error."""

    kind = plan.CP4
    vbmf = ("larger",)
    vbmf_turn = 3
    by_als = True

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return is_separable(weight) and mixes_channels(weight)

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        return (exact_rank(weight),)

    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        (rank,) = ranks
        high, wide = (Part(name, rank, rank, (axis,), depthwise=True) for axis, name in enumerate(("high", "wide")))
        return Part("reduce", weight[1], rank), high, wide, Part("expand", rank, weight[0])

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        return prepare_path(kernel, ranks, seed, rows)

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        out, into, high, wide = factors_at(kernel, prepared, ranks[0], seed, sweeps)
        return into.T, high.T, wide.T, out

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        return errors_at(prepared, ranks)
