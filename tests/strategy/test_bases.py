"""Several nets to search from: one space, one table and one predicted front over all of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranksearch.compress.inventory import inventory
from ranksearch.data import example
from ranksearch.plan import Dense, Plan
from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.objectives import Objectives
from ranksearch.strategy.bases import WIDTH, Base, Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.space import SearchSpace, make_space, size_of
from ranksearch.strategy.surrogate import Table
from tests import nets
from tests.books import DENSE_SCORE, FOUND, SPACE, made_up_choices, result

METHODS = "tucker2", "cp", "svd"


def narrower() -> nn.Sequential:
    """The small LeNet with fewer channels; the layers have the same names."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 5, 3, padding=1), norm1=nn.BatchNorm2d(5), relu1=nn.ReLU(),
            conv2=nn.Conv2d(5, 9, 3, padding=1), relu2=nn.ReLU(), pool=nn.MaxPool2d(2), flatten=nn.Flatten(),
            fc1=nn.Linear(9 * 4 * 4, 20), relu3=nn.ReLU(), fc2=nn.Linear(20, 10),
        )
    )  # fmt: skip


NARROW = inventory(narrower(), example(nets.few_digits().train))
BASES = Bases((Base(FOUND, SPACE), Base(NARROW, make_space(NARROW, METHODS), 0.5)))
CHOICES = [made_up_choices(base.space) for base in BASES]
TABLE = Table(BASES, CHOICES, base_losses=(0.0, 0.3))
levels = st.fixed_dictionaries(
    {
        name: st.sampled_from(kind.choices) if hasattr(kind, "choices") else st.floats(kind.low, kind.high)
        for name, kind in BASES.distributions().items()
    }
)


@given(levels)
def test_a_plan_survives_its_parameters(params):
    plan = BASES.plan(params)
    assert plan.width == params[WIDTH]
    assert BASES.plan(BASES.params(plan)) == plan
    assert BASES.params(plan).keys() == BASES.distributions().keys()


@given(levels)
def test_costs_are_those_of_the_net_that_the_plan_starts_from(params):
    plan = BASES.plan(params)
    own = {1.0: FOUND, 0.5: NARROW}[plan.width]
    size = BASES.size_of(plan)
    assert size.costs == size_of(plan, own).costs
    assert size.ratio == pytest.approx(FOUND.params / size.costs["params"])


def test_one_net_has_the_parameters_of_its_space_alone():
    assert Bases.of(SPACE, FOUND).distributions() == SPACE.distributions()


def test_the_smallest_plan_may_be_that_of_any_net():
    least = min(size_of(base.space.smallest("params"), base.inventory).params for base in BASES)
    assert BASES.smallest("params").params == least


@given(levels)
def test_a_row_of_the_table_stands_for_a_plan_of_its_net(params):
    row = TABLE.row(BASES.plan(params))
    plan = TABLE.plan(row)
    assert plan.width == params[WIDTH]
    assert TABLE.row(plan) == row
    assert TABLE.sizes(np.array([row]))[0].costs == pytest.approx(BASES.size_of(plan).costs)


def test_the_dense_plan_is_the_row_of_zeros_and_the_narrower_net_is_another():
    assert TABLE.row(Plan()) == (0,) * len(TABLE.layers)
    row = TABLE.row(Plan(width=0.5))
    assert TABLE.plan(row) == Plan(width=0.5)
    assert TABLE.loss_increases_of(np.array([row])).tolist() == [[*[0.0] * len(TABLE.layers), 0.3]]


@settings(deadline=None)
@given(st.lists(st.floats(0.2, 5.0), min_size=TABLE.weights, max_size=TABLE.weights))
def test_the_predicted_front_is_that_of_both_nets(weights):
    rows = TABLE.predicted_front(np.array(weights))
    points = [
        (size.ratio, -increase)
        for size, increase in zip(TABLE.sizes(rows), TABLE.loss_increases_of(rows) @ weights, strict=True)
    ]
    assert len(pareto.front(points)) == len(rows)
    alone = [
        table.predicted_front(np.array(weights[:-1]))
        for table in (
            Table(Bases((base,)), [choices])
            for base, choices in zip((BASES.nets[0], replace(BASES.nets[1], width=1.0)), CHOICES, strict=True)
        )
    ]
    assert 1 <= len(rows) <= sum(map(len, alone))


def test_every_net_is_searched_and_no_plan_mixes_them():
    study = optuna.create_study(directions=["maximize", "maximize"])
    knowledge = Knowledge(BASES, TABLE, DENSE_SCORE, 0.01)
    ledger = Ledger(
        study, BASES, [("width", Plan(width=0.5))], sampler="rank", seed=0, dense_score=DENSE_SCORE, limits=UNLIMITED,
        objectives=Objectives(dense=FOUND.costs), knowledge=knowledge,
    )  # fmt: skip
    for job in ledger.jobs(30):
        ledger.receive(job, result(Plan.of(dict(job.plan))) if job.plan.width == 1 else result(Plan()))
    records = ledger.records()
    assert records[0].plan == Plan(width=0.5)
    assert records[0].trained
    assert {record.plan.width for record in records} == {1.0, 0.5}
    for record in records:
        axes = {axis.layer.name: axis for axis in BASES[record.plan.width].space.axes}
        for name, value in record.plan:
            assert value == Dense() or axes[name].check(value) is None


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_optunas_samplers_choose_the_net_too(sampler):
    study = optuna.create_study(directions=["maximize", "maximize"])
    ledger = Ledger(
        study, BASES, [], sampler=sampler, seed=0, dense_score=DENSE_SCORE, limits=UNLIMITED,
        objectives=Objectives(dense=FOUND.costs),
    )  # fmt: skip
    for job in ledger.jobs(12):
        ledger.receive(job, result(Plan()))
    assert {record.plan.width for record in ledger.records()} == {1.0, 0.5}


def test_a_net_without_layers_to_decompose_has_one_plan():
    bases = Bases((Base(FOUND, SPACE), Base(NARROW, SearchSpace(()), 0.5)))
    table = Table(bases, [CHOICES[0], {}], base_losses=(0.0, 0.1))
    row = table.row(Plan(width=0.5))
    assert table.plan(row) == Plan(width=0.5)
    assert table.sizes(np.array([row]))[0].costs == NARROW.costs
    assert bases.plan(bases.params(Plan(width=0.5))) == Plan(width=0.5)
    assert bases.smallest("params").params == min(size_of(SPACE.smallest("params"), FOUND).params, NARROW.params)
