"""VBMF as the prior: the plans that one variational Bayes estimate per layer suggests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from ranksearch.methods import FEWER_PARAMS, Method, RankConstraints, nearest_rank
from ranksearch.methods.layer import Layer
from ranksearch.plan import Dense, Factorization, Plan
from ranksearch.strategy.space import Axis, Space

Estimates: TypeAlias = Mapping[str, tuple[int | None, int | None]]
"""By layer, the VBMF ranks of its input and output unfolding; None where the estimate finds no low-rank signal."""

WEAKENINGS = tuple(2.0 ** (step / 4) for step in range(-16, 13))
"""Factors on the VBMF ranks, from a sixteenth to eight times. Trained weights are no low-rank matrix plus white noise, so
the estimate is a guess at the order of magnitude; which factor serves best is for the search to find."""


def vbmf_plans(space: Space, vbmf: Estimates, weakenings: Sequence[float] = (1.0,)) -> Iterator[tuple[str, Plan]]:
    """Every layer at its VBMF ranks times each weakening, all by one method where it applies.

    Gives pairs (origin, plan), such as ("vbmf cp x0.5", plan), in the order of the weakenings; equal plans only once.
    """
    methods = {method.kind.method: method for axis in space.axes for method in axis.methods}
    # A decomposition that suits the most layers leads; SVD only ever serves those that the leader cannot store.
    turns = sorted(methods, key=lambda name: methods[name].vbmf_turn)
    leaders = [name for name in turns if methods[name].vbmf_turn] or turns
    seen = set()
    for weakening in weakenings:
        for leader in leaders:
            plan = Plan.of({a.layer.name: vbmf_factorization(a, vbmf[a.layer.name], leader, weakening) for a in space.axes})
            if plan not in seen and plan.layers:
                seen.add(plan)
                yield f"vbmf {leader} x{weakening:g}", plan


def vbmf_factorization(axis: Axis, estimate: tuple[int | None, int | None], leader: str, weakening: float) -> Factorization:
    """The leading method, or else the first that applies, at the VBMF ranks times the weakening; dense if it would grow."""
    method = next((m for m in axis.methods if m.kind.method == leader), axis.methods[0])
    ranks = at_vbmf(method, axis.layer, estimate, weakening, constraints=axis.constraints)
    return method.value(axis.layer, ranks) if ranks and method.shrinks(axis.layer, ranks, axis.constraints) else Dense()


def at_vbmf(
    method: Method,
    layer: Layer,
    estimate: tuple[int | None, int | None],
    weakening: float = 1.0,
    *,
    constraints: RankConstraints = FEWER_PARAMS,
) -> tuple[int, ...] | None:
    """The offered ranks nearest to the estimates of the input and output unfolding; None where neither found a signal."""
    known = [rank for rank in estimate if rank]
    if not known:
        return None
    rank_in, rank_out = (rank or max(known) for rank in estimate)
    wanted, rank_ranges = method.from_vbmf(rank_in, rank_out), method.rank_ranges(layer, constraints)
    return tuple(nearest_rank(ranks, rank * weakening) for rank, ranks in zip(wanted, rank_ranges, strict=True))


def quarter(method: Method, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> tuple[int, ...]:
    """A quarter of the method's largest ranks: what to show where VBMF finds no signal."""
    return tuple(nearest_rank(ranks, ranks[-1] // 4) for ranks in method.rank_ranges(layer, constraints))
