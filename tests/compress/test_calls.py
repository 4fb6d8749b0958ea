"""A layer that is called several times in one pass has one decomposition, and costs that are summed over its calls."""

import pytest
import torch
from torch import nn

from ranksearch.compress.inventory import count_macs, count_params, inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.saved import check_reloading, load_model, write_model
from ranksearch.compress.surgery import copied, factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.compress.whitening import whitenings
from ranksearch.latency.forms import time_forms
from ranksearch.latency.runtimes import UserFunction
from ranksearch.latency.table import latency_table
from ranksearch.methods.layer import Call
from ranksearch.plan import Plan
from ranksearch.strategy.space import size_of
from tests.geometries import assert_close, fitting, some_ranks
from tests.nets import Decoder, Net, Pyramid, Recurrent, Siamese, normal

# id: (model, size of one input, calls of each layer)
NETS = {
    "siamese": (Siamese, (2, 3, 6, 5), {
        "conv": (Call((6, 5), (6, 5)),) * 2, "fc": (Call((6, 5), (1, 1)),) * 2, "last": (Call(),),
    }),
    "pyramid": (Pyramid, (3, 12, 8), {
        "stem": (Call((12, 8), (12, 8)),),
        "down": (Call((12, 8), (6, 4)), Call((6, 4), (3, 2))),
        "head": (Call((12, 8), (12, 8)), Call((6, 4), (6, 4)), Call((3, 2), (3, 2))),
        "scores": (Call(times=96), Call(times=24), Call(times=6)),
    }),
    "decoder": (Decoder, (3, 12, 8), {
        "down": (Call((12, 8), (6, 4)),),
        "mix": (Call((6, 4), (6, 4)), Call((12, 8), (12, 8))),
        "up": (Call((6, 4), (12, 8)), Call((12, 8), (24, 16))),
        "last": (Call((24, 16), (24, 16)),),
    }),
    "recurrent": (Recurrent, (4, 3, 6, 5), {"gates": (Call((6, 5), (6, 5)),) * 4, "last": (Call((6, 5), (6, 5)),)}),
}  # fmt: skip
nets = pytest.mark.parametrize("name", NETS)


def made(name):
    """The model in float64 in eval mode, one input, and its inventory."""
    make, size, _ = NETS[name]
    torch.manual_seed(0)
    model, inputs = make().double().eval(), normal(1, *size)
    return model, inputs, inventory(model, inputs)


def plans(layers):
    """Plans of all layers: the first method of each at small, middle and full ranks, then the last method."""
    for at in (0, -1):
        chosen = {layer.name: (fitting(layer)[at], layer) for layer in layers.layers}
        for step in (0, 0.5, 1):
            yield Plan.of({
                name: method.value(layer, ranks[round(step * (len(ranks) - 1))])
                for name, (method, layer) in chosen.items()
                for ranks in [some_ranks(method, layer)]
            })  # fmt: skip


@nets
def test_each_call_is_described_at_its_own_size(name):
    model, inputs, found = made(name)
    assert not found.skipped
    assert {layer.name: layer.calls for layer in found.layers} == NETS[name][2]
    assert found.macs == sum(layer.macs for layer in found.layers) == count_macs(model, inputs)
    assert found == inventory(model, torch.cat([inputs] * 3))


@nets
def test_costs_are_the_counted_ones(name):
    model, inputs, found = made(name)
    for plan in plans(found):
        built = factorize_(copied(model), plan)
        size = size_of(plan, found)
        assert (size.costs["params"], size.costs["macs"]) == (count_params(built), count_macs(built, inputs))


@nets
def test_the_full_rank_computes_the_net_and_the_same_after_loading(name, tmp_path):
    model, inputs, found = made(name)
    several = torch.cat([inputs, normal(*inputs.shape, seed=5)])
    full = {layer.name: method.value(layer, method.bounds(layer.weight)) for layer in found.layers for method in fitting(layer)}
    assert_close(factorize_(copied(model), full)(several), model(several))
    for plan in plans(found):
        built = factorize_(copied(model), plan)
        write_model(tmp_path, plan, weights_of(built))
        assert torch.equal(load_model(NETS[name][0]().double(), tmp_path)(inputs), built(inputs))
        check_reloading(model, NETS[name][0]().double(), plan, several)


def test_moments_are_of_the_inputs_of_all_calls():
    twice = Net(lambda n, x: n.one(x[:, :4]) + n.one(x[:, 4:]), one=nn.Linear(4, 3)).double()
    once = Net(lambda n, x: n.one(x), one=nn.Linear(4, 3)).double()
    pairs = normal(100, 8) + 1
    found = [
        whitenings(model, {inventory(model, inputs[:1])["one"]: [(1,)]}, inputs)["one"][0]
        for model, inputs in ((twice, pairs), (once, torch.cat(pairs.split(4, 1))))
    ]
    torch.testing.assert_close(found[0].roots[1,], found[1].roots[1,])
    torch.testing.assert_close(found[0].mean, found[1].mean)


@nets
def test_a_profile_fits_factors_to_the_inputs_of_all_calls(name):
    model, inputs, found = made(name)
    methods = {layer.name: fitting(layer)[:1] for layer in found.layers}
    several = torch.cat([inputs, normal(*inputs.shape, seed=5)])
    plan = Plan.of({name: method.value(found[name], method.bounds(found[name].weight)) for name, (method,) in methods.items()})
    factors = profile(model, found, methods, inputs=several).factors(plan)
    assert_close(factorize_(copied(model), plan, factors=factors)(several), model(several))


@nets
def test_the_latency_is_summed_over_the_calls(name):
    model, inputs, found = made(name)
    model, inputs = model.float(), inputs.float()
    methods = {layer.name: fitting(layer)[:1] for layer in found.layers}
    table = latency_table(model, found, methods, UserFunction(count_macs, "clock"), inputs)
    for plan in list(plans(found))[:3]:
        measured = count_macs(factorize_(copied(model), plan), inputs)
        assert size_of(plan, table.applied(found)).costs["latency"] == pytest.approx(measured, rel=0.05)


def test_both_forms_of_a_layer_are_timed_over_its_calls():
    model, inputs, found = made("pyramid")
    plan = Plan.of({"head": fitting(found["head"])[-1].value(found["head"], (1, 1, 1))})
    built, seen = factorize_(copied(model).float(), plan), []

    def clock(module, batch):
        seen.append(tuple(batch.shape))
        return 1.0

    forms = time_forms(built, plan, found, UserFunction(clock, "clock"), inputs.float())
    assert forms.layers["head"] == (3.0, 3.0)
    assert {(1, 4, 12, 8), (1, 4, 6, 4), (1, 4, 3, 2)} <= set(seen)


def test_a_layer_behind_maps_of_several_sizes_is_a_matrix():
    model = Net(lambda n, x: n.fc(x.flatten(1)) + n.fc(x.mT.flatten(1)), fc=nn.Linear(4 * 6 * 5, 3))
    found = inventory(model, torch.ones(1, 4, 6, 5))["fc"]
    assert (found.weight, found.calls, found.flattened) == ((3, 120), (Call(), Call()), False)


def test_a_layer_that_is_called_in_turn_with_another_size_of_batch():
    model = Net(lambda n, x: n.last(n.one(torch.cat([x, x]))[:1] + n.one(x)), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1))
    found = inventory(model, torch.ones(1, 4, 6, 5))
    assert found["one"].calls == (Call((6, 5), (6, 5), 2), Call((6, 5), (6, 5)))
    assert found.macs == count_macs(model, torch.ones(1, 4, 6, 5))
