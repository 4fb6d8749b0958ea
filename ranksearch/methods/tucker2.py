"""Tucker-2: 1x1 in -> rank_in, kernel rank_in -> rank_out, 1x1 rank_out -> out (Kim et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared
from ranksearch.methods.parts import Part, Shape, every_axis, has_positions, mixes_channels
from ranksearch.tensors.matrix import Rows
from ranksearch.tensors.tucker import HOSVD, hooi, hosvd


class Tucker2Method(Method):
    """Truncated HOSVD of the two channel modes. Its factors are nested, so one decomposition serves every pair of ranks.

    If `rank_in` is the number of input channels, only core and expand are built (Tucker-1); if `rank_out` is that of output
    channels, only reduce and core.
    """

    kind = plan.Tucker2
    vbmf = ("in", "out")
    vbmf_turn = 1

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return has_positions(weight) and mixes_channels(weight)

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        out, into, positions = weight[0], weight[1], math.prod(weight[2:])
        return min(into, out * positions), min(out, into * positions)

    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        rank_in, rank_out = ranks
        core = Part("core", rank_in, rank_out, every_axis(weight))
        return Part("reduce", weight[1], rank_in), core, Part("expand", rank_out, weight[0])

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        return vars(hosvd(kernel.flatten(2), rows))

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        fit = HOSVD(**prepared)
        core, u_out, u_in = hooi(kernel.flatten(2), fit, *ranks, sweeps=sweeps) if sweeps else fit.at(*ranks)
        return u_in.T, core.reshape(*core.shape[:2], *kernel.shape[2:]), u_out

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        errors = HOSVD(**prepared).errors().tolist()
        return [errors[rank_in - 1][rank_out - 1] for rank_in, rank_out in ranks]
