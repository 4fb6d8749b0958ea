"""Searches without training: the small model's space, made-up loss increases, and a ledger with made-up results."""

from __future__ import annotations

from dataclasses import replace

import optuna

from ranksearch.compress.inventory import inventory
from ranksearch.data import example
from ranksearch.plan import CP, Dense, Plan
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import CurvePoint, Difference, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import Finalist, TrialRecord
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.predicted_front import Choice
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.space import make_space, size_of
from ranksearch.strategy.surrogate import Table
from tests import nets

FOUND = inventory(nets.small(), example(nets.few_digits().train))
SPACE = make_space(FOUND, ("tucker2", "cp", "svd"))
TINY = make_space(FOUND, ("svd",), layers=["fc2"])
"""A space of one layer with so few plans that soon every proposal is a tried plan."""
DENSE_SCORE = 0.65
"""Made-up scores reach from 0 to 0.87, so some plans beat the dense model and some are far below it."""


def made_up_choices(space=SPACE):
    """By layer, a few dozen choices of all sizes. Smaller choices increase the loss more, and later layers more than earlier ones."""
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
    """The knowledge that the sampler "rank" starts from, made up without any training."""
    bases = Bases.of(space, FOUND)
    return Knowledge(bases, Table(bases, [made_up_choices(space)], minimize), DENSE_SCORE, 0.01, limits, suggested)


class Books:
    """An Optuna study without training. Each ledger made for it stands for a new run."""

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
            self.study,
            Bases.of(self.space, FOUND),
            self.initial_plans,
            dense_score=DENSE_SCORE,
            knowledge=known,
            **self.arguments,
        )

    def run(self, trials, *, kill_after=None):
        """Run all trials, or stop with one trial still running after `kill_after` trials, as a kill does."""
        ledger = self.ledger()
        ledger.recover()
        for count, job in enumerate(ledger.jobs(trials)):
            if count == kill_after:
                break
            self.trained.append(ledger.receive(job, result(job.plan)))
        return ledger


def result(plan):
    """A made-up result that depends on the plan alone; one plan in eight diverges."""
    score = (size_of(plan, FOUND).params * 37 % 101) / 100
    return Result(Outcome.DIVERGED if score > 0.87 else Outcome.DONE, (CurvePoint(0, score / 2), CurvePoint(1, score)), 2.5)


OBJECTIVES = Objectives(dense={"params": 100, "macs": 1000})
"""The objectives for the trials that `trial` makes."""


def trial(number, score, ratio, outcome=Outcome.DONE, finalist=None, same_as=None):
    """A made-up trial. Each number has its own plan, except that a trial with `same_as` shares the plan of that number."""
    plan = Plan.of({"conv1": CP(1 + (number if same_as is None else same_as))})
    return TrialRecord(
        number=number, index=number, origin="tpe", plan=plan, outcome=outcome, costs={"params": 100 / ratio, "macs": 100}, ratio=ratio,
        score=score, finalist=finalist, same_as=same_as,
    )  # fmt: skip


def finalist(validation, test=0.5):
    return Finalist(score_validation=validation, score_test=test, curve=(CurvePoint(0, validation),), seconds=1.0)


def measured(number, value, standard_error, ratio):
    """A finalist whose validation score differs from the dense one, 0.98, by this value, with this standard error."""
    half = 1.96 * standard_error
    difference = Difference(value, value - half, value + half, standard_error)
    return trial(number, 0.98 + value, ratio, finalist=replace(finalist(0.98 + value), difference_validation=difference))
