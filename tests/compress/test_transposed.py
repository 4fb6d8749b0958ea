"""Nets with transposed convolutions: found, priced, saved, exported, merged, narrowed and started from scratch as those without."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from ranksearch.compress.export import export_model, load_model
from ranksearch.compress.inventory import count_macs, count_params, inventory
from ranksearch.compress.merging import merge_
from ranksearch.compress.narrowing import narrow_, narrowing_of
from ranksearch.compress.profile import profile
from ranksearch.compress.saved import write_model
from ranksearch.compress.scratch import scratch_
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.compress.widths import redraw_, scale_width_
from ranksearch.latency.forms import time_forms
from ranksearch.latency.runtimes import UserFunction
from ranksearch.methods.layer import Call
from ranksearch.plan import CP, CP4, TT, Plan, Spatial, Tucker2
from ranksearch.strategy.space import make_space, size_of
from tests import nets
from tests.geometries import BY_NAME, alone, fitting
from tests.nets import normal

IMAGES, CODES = normal(5, 1, 12, 8, dtype=torch.float32), normal(5, 12, 1, 1, dtype=torch.float32)
PLANS = {
    "unet": Plan.of({"up2": Tucker2(6, 5), "up1": CP(7), "join2": TT(4, 6, 4)}),
    "generator": Plan.of({"first": Spatial(6), "second": CP4(5), "last": Tucker2(3, 1)}),
}
NETS = {"unet": (nets.unet, IMAGES), "generator": (nets.generator, CODES)}
every_net = pytest.mark.parametrize("name", NETS)


def made(name, seed=0):
    torch.manual_seed(seed)
    make, inputs = NETS[name]
    return make().eval(), inputs


@every_net
def test_every_layer_is_found_and_counted(name):
    model, inputs = made(name)
    found = inventory(model, inputs[:1])
    assert not found.skipped
    assert found.macs == count_macs(model, inputs[:1]) == sum(layer.macs for layer in found.layers)
    for layer in found.layers:
        module = model.get_submodule(layer.name)
        assert layer.transposed == isinstance(module, nn.ConvTranspose2d)
        assert layer.params == count_params(module)


def test_a_layer_is_described_by_its_kernel():
    model, inputs = made("generator")
    layer = inventory(model, inputs[:1])["second"]
    assert (layer.kind, layer.weight, layer.groups, layer.transposed) == ("ConvTranspose2d", (4, 8, 4, 4), 2, True)
    assert layer.calls == (Call((4, 4), (8, 8)),)
    assert layer.macs == 2 * 4 * 8 * 16 * 16


@every_net
def test_the_size_of_a_plan_is_the_counted_one(name):
    model, inputs = made(name)
    found, draw = inventory(model, inputs[:1]), random.Random(0)
    space = make_space(found, list(BY_NAME))
    assert {axis.layer.name for axis in space.axes} == {layer.name for layer in found.layers}
    for _ in range(10):
        values = {axis.layer.name: (axis, draw.choice(axis.methods)) for axis in space.axes}
        plan = Plan.of({name: m.value(a.layer, draw.choice(m.rank_grid(a.layer))) for name, (a, m) in values.items()})
        small, size = factorize_(made(name)[0], plan), size_of(plan, found)
        assert (size.params, size.macs) == (count_params(small), count_macs(small, inputs[:1]))


@every_net
def test_data_aware_factors_are_nearer_to_the_outputs(name):
    model, inputs = made(name)
    layer = next(layer for layer in inventory(model, inputs[:1]).layers if layer.transposed)
    inputs = normal(200, *inputs.shape[1:], dtype=torch.float32).cumsum(1)
    found = profile(model, inventory(model, inputs[:1]), {layer.name: fitting(layer)}, inputs=inputs[:100]).layers[layer.name]
    value = Tucker2(4, 4)
    factors, correction = found.factors(value), found.bias_correction(value, found.factors(value))
    corrections = {} if correction is None else {layer.name: correction}
    aware = factorize_(made(name)[0], {layer.name: value}, factors={layer.name: factors}, bias_corrections=corrections)
    plain = factorize_(made(name)[0], {layer.name: value})
    with torch.no_grad():
        errors = [float((net(inputs[100:]) - model(inputs[100:])).norm()) for net in (aware, plain)]
    assert errors[0] < errors[1]


@every_net
def test_a_saved_net_is_loaded_and_merged(name, tmp_path):
    model, inputs = made(name)
    plan = PLANS[name]
    assert Plan.from_json(plan.to_json()) == plan
    factorize_(model, plan).eval()
    write_model(tmp_path, plan, weights_of(model))
    outputs = model(inputs)
    assert torch.equal(load_model(made(name, seed=1)[0], tmp_path)(inputs), outputs)
    merge_(model, plan, list(dict(plan)))
    torch.testing.assert_close(model(inputs), outputs, rtol=1e-4, atol=1e-5)
    assert repr(model) == repr(made(name)[0])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@every_net
def test_every_form_gives_the_same_outputs(name, form, tmp_path):
    model, inputs = made(name)
    factorize_(model, PLANS[name]).eval()
    assert export_model(model, made(name, seed=1)[0], PLANS[name], inputs, tmp_path / "model", form=form) < 1e-4


@every_net
def test_both_forms_of_a_layer_are_timed(name):
    model, inputs = made(name)

    def macs(module, batch):
        return count_macs(module, batch) / len(batch)

    layers, plan = inventory(model, inputs[:1]), PLANS[name]
    found = time_forms(factorize_(made(name)[0], plan).eval(), plan, layers, UserFunction(macs, "clock"), inputs[:3])
    assert found.layers == {
        layer: (BY_NAME[value.method].macs(layers[layer], value.ranks), layers[layer].macs) for layer, value in plan
    }


def test_a_narrower_net_is_factorized_and_loaded(tmp_path):
    narrowing = narrowing_of(made("unet")[0], IMAGES[:1], 0.6, [lambda model: model(IMAGES).square().mean()])
    narrow = narrow_(made("unet")[0], narrowing)
    assert count_params(narrow.up2) < count_params(made("unet")[0].up2)
    plan = Plan.of({"up2": Tucker2(3, 3), "up1": CP(3)}, 0.6, narrowing)
    model = factorize_(narrow, plan).eval()
    write_model(tmp_path, plan, weights_of(model))
    assert torch.equal(load_model(made("unet", seed=1)[0], tmp_path)(IMAGES), model(IMAGES))


def test_a_narrower_net_with_new_weights_runs():
    model, _ = made("unet")
    narrow = redraw_(scale_width_(made("unet")[0], IMAGES[:1], 0.5), seed=0)
    assert narrow(IMAGES).shape == model(IMAGES).shape
    assert narrow.up2.weight.shape == (8, 6, 3, 3)


@pytest.mark.parametrize("value", [Tucker2(48, 40), CP(96), CP4(96), TT(64, 96, 64), Spatial(96)], ids=str)
def test_a_net_from_scratch_keeps_the_variance_of_its_inputs(value):
    """Also if a stride leaves an output of a transposed convolution only some of the kernel's positions."""
    layer = nn.ConvTranspose2d(128, 128, 4, stride=2, padding=3, groups=2)
    model = scratch_(alone(layer), Plan.of({"layer": value}), seed=0)
    outputs = model(normal(8, 128, 12, 12, dtype=torch.float32))
    assert 1.4 < float(outputs.detach().var()) < 2.8  # twice, since half of it is lost in a ReLU
