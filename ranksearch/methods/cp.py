"""CP with the kernel's modes merged: 1x1 in -> rank, depthwise kernel, 1x1 rank -> out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ranksearch import plan
from ranksearch.methods.base import Method, Prepared
from ranksearch.methods.parts import Part, Shape, every_axis, has_positions, mixes_channels
from ranksearch.tensors.cp import cp_als, cp_path, exact_rank, reconstruct
from ranksearch.tensors.matrix import Rows, norm_of

# ALS sweeps for a rank between two prepared ones. Few, since the start is good, and since they run at the start of each trial.
UNPREPARED_RANK_SWEEPS = 20


class CPMethod(Method):
    """CP of the three-way tensor (out, in, kernel positions) with `rank` terms, fitted by ALS."""

    kind = plan.CP
    vbmf = ("larger",)  # as the thesis does
    vbmf_turn = 2
    by_als = True

    def applies(self, weight: Shape, *, linear: bool) -> bool:
        return has_positions(weight) and mixes_channels(weight)

    def bounds(self, weight: Shape) -> tuple[int, ...]:
        return (exact_rank((*weight[:2], math.prod(weight[2:]))),)

    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        (rank,) = ranks
        depthwise = Part("depthwise", rank, rank, every_axis(weight), depthwise=True)
        return Part("reduce", weight[1], rank), depthwise, Part("expand", rank, weight[0])

    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        return prepare_path(kernel.flatten(2), ranks, seed, rows)

    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        out, into, modes = factors_at(kernel.flatten(2), prepared, ranks[0], seed, sweeps)
        return into.T, modes.T.reshape(-1, *kernel.shape[2:]), out

    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        return errors_at(prepared, ranks)


def errors_at(prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
    """The relative errors of prepared CP fits."""
    return [float(prepared[f"{rank}.error"]) for (rank,) in ranks]


def prepare_path(tensor: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> dict[str, Tensor]:
    """CP fits at all `ranks`, each started from the next larger one, as tensors `<rank>.<mode>` and `<rank>.error`."""
    fits = cp_path(tensor, sorted({rank for (rank,) in ranks}), seed=seed, rows=rows)
    factors = {f"{rank}.{mode}": factor for rank, fit in fits.items() for mode, factor in enumerate(fit.factors)}
    for rank, fit in fits.items():
        factors[f"{rank}.error"] = torch.tensor(fit.error, dtype=torch.float64)
    return factors


def factors_at(tensor: Tensor, prepared: Prepared, rank: int, seed: int, sweeps: int) -> tuple[Tensor, ...]:
    """The CP factors at any rank up to the largest prepared one, after `sweeps` further sweeps.

    A rank that was not prepared is fitted from the largest terms of the next larger prepared rank.
    """
    prepared_ranks = {int(name.split(".")[0]) for name in prepared}
    above = min(other for other in prepared_ranks if other >= rank)
    start = tuple(prepared[f"{above}.{mode}"] for mode in range(tensor.dim()))
    total_sweeps = sweeps + (UNPREPARED_RANK_SWEEPS if above > rank else 0)
    if not total_sweeps:
        return start
    # Terms are sorted by falling norm, so the first ones are the largest.
    return _continued(tensor, tuple(factor[:, :rank] for factor in start), total_sweeps, seed)


def _continued(tensor: Tensor, factors: Sequence[Tensor], sweeps: int, seed: int) -> tuple[Tensor, ...]:
    """The CP factors after at most `sweeps` further sweeps, or unchanged if these do not lower the error."""
    before = norm_of(tensor - reconstruct(factors)) / norm_of(tensor)
    fit = cp_als(tensor, factors[0].shape[1], seed=seed, init=factors, sweeps=sweeps)
    # A converged fit at the bound on degeneracy can end slightly below the bound, with a slightly larger error.
    return fit.factors if fit.error < before else tuple(factors)
