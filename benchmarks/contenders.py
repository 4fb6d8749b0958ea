"""The searches that `search.py` compares: Optuna's samplers, rules from the literature, ours with and without its parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import optuna
from arenas import Run, Simulated, Trained

from ranksearch.plan import Dense, Plan
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import CurvePoint, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.predicted_front import Choice, predicted_front
from ranksearch.strategy.prior import RANK_SCALES, vbmf_plans
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.sensitivity import rescuable, spread
from ranksearch.strategy.space import size_of
from ranksearch.strategy.surrogate import Table
from ranksearch.study.probing import MAX_PREDICTED_PLANS

Arena: TypeAlias = Trained | Simulated
Choices: TypeAlias = Mapping[str, Sequence[Choice]]

REFERENCE_SCORE_DROP = 0.10
"""The hypervolume counts scores above the dense score minus this."""
VBMF_SWEEP = [2.0 ** (step / 4) for step in (0, 4, -4, 2, -2, -8, 8, -6, 6, -12, -10, 1, -1, 3, -3, -5, 5, -7, 7, -16, -14)]
"""Factors on the ranks of the one-shot VBMF plan, in the order they are tried."""
VBMF_FIRST = (1.0, 2.0, 0.5)
"""Factors of the VBMF plans that TPE starts with."""


@dataclass(frozen=True)
class Searched:
    """Trials of one search in the order of asking: validation and test score, log10 of the compression ratio, seconds of
    training, seconds that the ask took."""

    scores: list[float] = field(default_factory=list)
    tests: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    asks: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Contender:
    """A way to search. `plans` returns the plans to try first, given the number of trials. `sampler` proposes the others, if
    it is not None."""

    title: str
    plans: Callable[[Arena, int], list[tuple[str, Plan]]]
    sampler: str | None = None
    choices: Callable[[Arena], Choices] = lambda arena: arena.choices
    suggested: Callable[[Arena], list[Plan]] = lambda arena: [
        plan for _, plan in vbmf_plans(arena.space, arena.vbmf, RANK_SCALES)
    ]
    probed: bool = False
    """Whether it needs the probes of single layers, whose time then counts."""

    def search(self, arena: Arena, seed: int, trials: int) -> Searched:
        """Run the search once."""
        plans = self.plans(arena, trials)
        return self._sampled(arena, seed, trials, plans) if self.sampler else self._fixed(arena, seed, plans[:trials])

    def _fixed(self, arena: Arena, seed: int, plans: Sequence[tuple[str, Plan]]) -> Searched:
        found = Searched()
        for _, plan in plans:
            run = arena.run(plan, seed)
            _note(found, run, log_ratio(arena, plan), 0.0)
        return found

    def _sampled(self, arena: Arena, seed: int, trials: int, plans: list[tuple[str, Plan]]) -> Searched:
        assert self.sampler is not None
        study = optuna.create_study(directions=["maximize", "maximize"])
        bases = Bases.of(arena.space, arena.inventory)
        table = Table(bases, [self.choices(arena)])
        ledger = Ledger(
            study, bases, plans, sampler=self.sampler, seed=seed, dense_score=arena.dense_score,
            limits=UNLIMITED, objectives=Objectives(dense=arena.inventory.costs),
            knowledge=Knowledge(bases, table, arena.dense_score, arena.noise, suggested=self.suggested(arena)),
        )  # fmt: skip
        found, start = Searched(), time.process_time()
        for job in ledger.jobs(trials):
            asked = time.process_time() - start
            run = arena.run(job.plan, seed)
            curve = tuple(CurvePoint(epoch, score) for epoch, score in enumerate(run.scores))
            ledger.receive(job, Result(Outcome.DONE, curve, run.seconds[-1]))
            _note(found, run, log_ratio(arena, job.plan), asked)
            start = time.process_time()
        return found


def _note(found: Searched, run: Run, log_ratio: float, asked: float) -> None:
    found.scores.append(run.scores[-1])
    found.tests.append(run.test)
    found.seconds.append(run.seconds[-1])
    found.log_ratios.append(log_ratio)
    found.asks.append(asked)


def dense_params(arena: Arena) -> dict[str, int]:
    """By name, the parameters of each layer that is searched, undecomposed."""
    return {axis.layer.name: axis.layer.params for axis in arena.space.axes}


def log_ratio(arena: Arena, plan: Plan) -> float:
    """log10 of the compression ratio of a plan."""
    return math.log10(size_of(plan, arena.inventory).ratio)


def vbmf_first(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    return list(vbmf_plans(arena.space, arena.vbmf, VBMF_FIRST))


def vbmf_sweep(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    """One-shot VBMF (Kim et al. 2016), with one factor on all ranks, over a range of factors."""
    return list(vbmf_plans(arena.space, arena.vbmf, VBMF_SWEEP))


def predicted_first(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    corners = rescuable(predicted_front(dense_params(arena), arena.choices))
    return [("frontier", corner.plan) for corner in spread(corners, arena.inventory.params, MAX_PREDICTED_PLANS)]


def predicted_alone(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    """Plans of the predicted front, evenly spaced."""
    corners = predicted_front(dense_params(arena), arena.choices)
    return [("frontier", corner.plan) for corner in spread(corners, arena.inventory.params, trials)]


def greedy(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    """Like AIMET: each layer is as small as one bound on its own loss increase allows, over a range of bounds."""
    dense = dense_params(arena)

    def within(bound: float) -> Plan:
        smallest = {}
        for name, params in dense.items():
            fitting = [choice for choice in arena.choices[name] if choice.loss_increase <= bound]
            smallest[name] = min(fitting, key=lambda c: (c.cost, c.loss_increase), default=Choice(Dense(), params, 0.0)).value
        return Plan.of(smallest)

    loss_increases = sorted({choice.loss_increase for choices in arena.choices.values() for choice in choices})
    plans = list({plan: None for bound in loss_increases if (plan := within(bound)).layers})
    sizes = [log_ratio(arena, plan) for plan in plans]
    wanted = np.linspace(sizes[0], sizes[-1], trials)
    nearest = dict.fromkeys(int(np.argmin(np.abs(np.array(sizes) - at))) for at in wanted)
    return [("greedy", plans[place]) for place in nearest]


def no_plans(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    return []


def initial_plans(arena: Arena, trials: int) -> list[tuple[str, Plan]]:
    """The initial plans of a study."""
    return [*predicted_first(arena, trials), *vbmf_plans(arena.space, arena.vbmf)]


CONTENDERS = {
    "random": Contender("random", no_plans, "random"),
    "nsga2": Contender("NSGA-II", no_plans, "nsga2"),
    "tpe": Contender("TPE", no_plans, "tpe"),
    "gp": Contender("GP", no_plans, "gp"),
    "tpe-vbmf": Contender("TPE, VBMF plans first", vbmf_first, "tpe"),
    "vbmf": Contender("one-shot VBMF, swept", vbmf_sweep),
    "greedy": Contender("greedy per layer", greedy, probed=True),
    "frontier": Contender("frontier alone", predicted_alone, probed=True),
    "rank": Contender("**ours**", initial_plans, "rank", probed=True),
    "no-vbmf": Contender("ours, no VBMF", predicted_first, "rank", suggested=lambda arena: [], probed=True),
    "no-frontier": Contender("ours, no frontier", vbmf_first, "rank", choices=lambda arena: arena.unprobed_choices),
    "no-surrogate": Contender("ours, no surrogate: TPE instead", initial_plans, "tpe", probed=True),
}
