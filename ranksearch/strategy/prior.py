"""Plans at the ranks that VBMF (variational Bayes matrix factorization) estimates for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from ranksearch.methods import FEWER_PARAMS, Method, RankConstraints, nearest_rank
from ranksearch.methods.layer import Layer
from ranksearch.plan import Dense, Factorization, Plan
from ranksearch.strategy.space import Axis, SearchSpace

Estimates: TypeAlias = Mapping[str, tuple[int | None, int | None]]
"""By layer, the VBMF ranks of its input and output unfolding; None for an unfolding without a low-rank signal."""

RANK_SCALES = tuple(2.0 ** (step / 4) for step in range(-16, 13))
"""Factors on the VBMF ranks, from 1/16 to 8. VBMF assumes a low-rank matrix plus white noise, which trained weights are not, so
its ranks are right only in their order of magnitude; the search finds the best factor."""


def vbmf_plans(space: SearchSpace, vbmf: Estimates, scales: Sequence[float] = (1.0,)) -> Iterator[tuple[str, Plan]]:
    """Yield plans with every layer at its VBMF ranks times each of `scales`, by one leading method where it applies.

    Yields pairs (origin, plan), such as ("vbmf cp x0.5", plan), in the order of `scales`, without duplicates.
    """
    methods = {method.kind.method: method for axis in space.axes for method in axis.methods}
    # Methods with turn 0 (SVD) do not lead if another method can; they store the layers that the leader cannot.
    turns = sorted(methods, key=lambda name: methods[name].vbmf_turn)
    leaders = [name for name in turns if methods[name].vbmf_turn] or turns
    seen = set()
    for scale in scales:
        for leader in leaders:
            plan = Plan.of({a.layer.name: vbmf_factorization(a, vbmf[a.layer.name], leader, scale) for a in space.axes})
            if plan not in seen and plan.layers:
                seen.add(plan)
                yield f"vbmf {leader} x{scale:g}", plan


def vbmf_factorization(axis: Axis, estimate: tuple[int | None, int | None], leader: str, scale: float) -> Factorization:
    """The layer at its VBMF ranks times `scale`, by the method `leader` or, if it does not apply, by the first that does.

    `Dense()` if VBMF found no signal, or if the layer would not become smaller.
    """
    method = next((m for m in axis.methods if m.kind.method == leader), axis.methods[0])
    ranks = at_vbmf(method, axis.layer, estimate, scale, constraints=axis.constraints)
    return method.value(axis.layer, ranks) if ranks and method.shrinks(axis.layer, ranks, axis.constraints) else Dense()


def at_vbmf(
    method: Method,
    layer: Layer,
    estimate: tuple[int | None, int | None],
    scale: float = 1.0,
    *,
    constraints: RankConstraints = FEWER_PARAMS,
) -> tuple[int, ...] | None:
    """The allowed ranks nearest to the VBMF ranks times `scale`; None if neither unfolding has a signal."""
    estimated = [rank for rank in estimate if rank]
    if not estimated:
        return None
    rank_in, rank_out = (rank or max(estimated) for rank in estimate)
    targets, rank_ranges = method.from_vbmf(rank_in, rank_out), method.rank_ranges(layer, constraints)
    return tuple(nearest_rank(ranks, rank * scale) for rank, ranks in zip(targets, rank_ranges, strict=True))


def quarter_ranks(method: Method, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> tuple[int, ...]:
    """A quarter of the method's largest ranks, to show where VBMF finds no signal."""
    return tuple(nearest_rank(ranks, ranks[-1] // 4) for ranks in method.rank_ranges(layer, constraints))
