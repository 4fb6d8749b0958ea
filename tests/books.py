"""Searches without training: the small model's space, its choices with made-up rises, and a ledger with made-up answers."""

from __future__ import annotations

import optuna

from ranksearch.compress.inventory import inventory
from ranksearch.data import example
from ranksearch.plan import CP, Dense, Plan
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import CurvePoint, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import Finalist, TrialRecord
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.predicted_front import Choice
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.space import make_space, size_of
from ranksearch.strategy.surrogate import Table
from tests import nets

FOUND = inventory(nets.small(), example(nets.few_digits().train))
SPACE = make_space(FOUND, ("tucker2", "cp", "svd"))
TINY = make_space(FOUND, ("svd",), layers=["fc2"])
"""One layer and a handful of plans: soon every proposal is known."""
DENSE_SCORE = 0.65
"""Scores up to 0.87 are made up: some plans beat the dense model, some are worth nothing."""


def rank_ranges(space=SPACE):
    """By layer, some dozen choices over all sizes, whose rises grow with what they save, and in some layers more."""
    found = {}
    for place, axis in enumerate(space.axes):
        layer, chosen = axis.layer, {}
        for method in axis.methods:
            for level in range(9):
                params = {f"{layer.name}.{method.kind.method}.{rank}": level / 8 for rank in method.kind.rank_names()}
                value = axis.factorization({**params, f"{layer.name}.method": method.kind.method})
                if value != Dense():
                    size = method.params(layer, value.ranks)
                    chosen[value] = Choice(value, size, 0.1 * (1 + place) * (1 - size / layer.params) ** 2)
        found[layer.name] = list(chosen.values())
    return found


def knowledge(space=SPACE, *, limits=UNLIMITED, suggested=(), minimize=("params",)):
    """What the sampler "rank" starts from, without any training."""
    return Knowledge(space, Table(FOUND, rank_ranges(space), minimize), DENSE_SCORE, limits, suggested)


class Books:
    """One Optuna study without training; a new ledger stands for a new run of it."""

    def __init__(
        self,
        space=SPACE,
        *,
        limits=UNLIMITED,
        sampler="random",
        seed=0,
        initial_plans=(),
        suggested=(),
        minimize=("params",),
    ):
        objectives = Objectives(minimize, FOUND.costs)
        self.study = optuna.create_study(directions=objectives.directions)
        self.untrained, self.trained, self.queued = [], [], []
        self.arguments = {"sampler": sampler, "seed": seed, "limits": limits, "objectives": objectives}
        self.arguments["on_untrained"] = self.untrained.append
        self.space, self.initial_plans, self.suggested = space, initial_plans, suggested

    def ledger(self):
        known = knowledge(
            self.space,
            limits=self.arguments["limits"],
            suggested=self.suggested,
            minimize=self.arguments["objectives"].minimize,
        )
        return Ledger(
            self.study, self.space, FOUND, self.initial_plans, dense_score=DENSE_SCORE, knowledge=known, **self.arguments
        )

    def run(self, trials, *, kill_after=None):
        """All trials, or as many as there are before a kill that leaves the last one running."""
        ledger = self.ledger()
        ledger.recover()
        for count, job in enumerate(ledger.jobs(trials)):
            if count == kill_after:
                break
            self.trained.append(ledger.receive(job, result(job.plan)))
        return ledger


def result(plan):
    """A score that a plan alone decides; one plan in eight diverges."""
    score = (size_of(plan, FOUND).params * 37 % 101) / 100
    return Result(Outcome.DIVERGED if score > 0.87 else Outcome.DONE, (CurvePoint(0, score / 2), CurvePoint(1, score)), 2.5)


OBJECTIVES = Objectives(dense={"params": 100, "macs": 1000})
"""Of made-up trials."""


def trial(number, score, ratio, outcome=Outcome.DONE, finalist=None, same_as=None):
    """A trial of a plan that no other number has; `same_as` names the trial whose plan it shares."""
    plan = Plan.of({"conv1": CP(1 + (number if same_as is None else same_as))})
    return TrialRecord(
        number=number, index=number, origin="tpe", plan=plan, outcome=outcome, costs={"params": 100 / ratio, "macs": 100}, ratio=ratio,
        score=score, finalist=finalist, same_as=same_as,
    )  # fmt: skip


def finalist(validation, test=0.5):
    return Finalist(score_validation=validation, score_test=test, curve=(CurvePoint(0, validation),), seconds=1.0)
