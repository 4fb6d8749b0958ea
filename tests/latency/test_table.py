"""The time of any plan, from a few of each layer."""

import random

import pytest
import torch

from ranksearch.compress.inventory import inventory
from ranksearch.compress.surgery import copied, factorize_
from ranksearch.latency.runtimes import UserFunction
from ranksearch.latency.table import Table, latency_table
from ranksearch.methods import FEWER_PARAMS
from ranksearch.plan import Plan
from ranksearch.strategy.space import make_space, size_of
from tests import nets
from tests.latency import clocks

EXAMPLE = torch.ones(1, 1, 8, 8)
METHOD_NAMES = ("tucker2", "cp", "svd", "spatial")


def table_of(function, example=EXAMPLE, constraints=FEWER_PARAMS, make=nets.small):
    model = make().eval()
    layers = inventory(model, EXAMPLE)
    methods = {axis.layer.name: axis.methods for axis in make_space(layers, METHOD_NAMES, constraints=constraints).axes}
    found = latency_table(model, layers, methods, UserFunction(function, "clock"), example, constraints=constraints)
    return model, layers, methods, found


def plans_of(layers, methods, count=20):
    draw = random.Random(1)
    for _ in range(count):
        values = {}
        for name, suitable in methods.items():
            method = draw.choice(list(suitable))
            values[name] = method.value(layers[name], draw.choice(method.rank_grid(layers[name])))
        yield Plan.of(values)


@pytest.mark.parametrize(
    ("clock", "make"),
    [
        (clocks.counting, nets.small), (clocks.streaming, nets.small), (clocks.counting, nets.grouped),
        (clocks.counting, nets.unet),
    ],
)  # fmt: skip
def test_times_that_follow_from_the_work_are_predicted_exactly(clock, make):
    model, layers, methods, found = table_of(clock, make=make)
    timed = found.applied(layers)
    assert timed.costs["latency"] == pytest.approx(clock(model, EXAMPLE), rel=0.02)
    for plan in plans_of(layers, methods):
        measured = clock(factorize_(copied(model), plan), EXAMPLE)
        assert size_of(plan, timed).costs["latency"] == pytest.approx(measured, rel=0.05)
    assert found.median_error < 0.02


def test_costs_are_of_the_batch_that_is_timed():
    one, many = (table_of(clocks.counting, torch.ones(size, 1, 8, 8))[-1] for size in (1, 8))
    assert many.layers["conv2"].dense > one.layers["conv2"].dense


def test_no_latency_falls_as_a_rank_rises():
    _, layers, methods, found = table_of(clocks.counting)
    timed = found.applied(layers)
    for name, suitable in methods.items():
        for method in suitable:
            for ranks in method.rank_grid(layers[name]):
                more = tuple(rank + 1 for rank in ranks)
                assert method.latency(timed[name], more) >= method.latency(timed[name], ranks)


def test_a_layer_without_methods_is_timed_dense():
    model = nets.small().eval()
    layers = inventory(model, EXAMPLE)
    first = layers.layers[0]
    methods = {axis.layer.name: axis.methods for axis in make_space(layers, METHOD_NAMES, skip=[first.name]).axes}
    found = latency_table(model, layers, methods, UserFunction(clocks.counting, "clock"), EXAMPLE)
    assert found.layers[first.name].methods == {}
    assert found.layers[first.name].dense > 0


def test_a_table_comes_back_from_its_file():
    *_, found = table_of(clocks.counting)
    assert Table.from_json(found.to_json()) == found
