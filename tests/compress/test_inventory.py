"""An inventory finds the layers in the order of their calls, with shapes and costs."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.compress.inventory import count_macs, count_params, inventory
from ranksearch.methods.layer import Call
from tests.nets import Net

IMAGE = torch.ones(1, 4, 6, 5)


class Named(nn.Conv2d):
    """A subclass that computes the same as torch's convolution."""


def kernels(model, example=IMAGE):
    return {layer.name: layer.weight for layer in inventory(model, example).layers}


def counted_macs(model, example):
    attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy.deepcopy(model).eval()(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
    return counter.get_total_flops() / 2


# --- layers and totals ---


def test_layers_come_in_call_order():
    model = Net(lambda n, x: n.last(n.first(n.middle(x)).mean((2, 3))), **{
        "last": nn.Linear(3, 2), "first": nn.Conv2d(5, 3, 1), "middle": nn.Conv2d(4, 5, 3)
    })  # fmt: skip
    assert list(kernels(model)) == ["middle", "first", "last"]


def test_a_layer_is_described_as_it_is():
    model = nn.Sequential(nn.Conv2d(4, 7, (3, 2), stride=(2, 1), bias=False), nn.Flatten(2), nn.Linear(8, 3))
    conv, linear = inventory(model, IMAGE).layers
    assert (conv.name, conv.kind, conv.weight, conv.kernel, conv.bias) == ("0", "Conv2d", (7, 4, 3, 2), (3, 2), False)
    assert (conv.calls, conv.flattened) == ((Call((6, 5), (2, 4)),), False)
    assert (linear.name, linear.kind, linear.weight, linear.kernel, linear.bias) == ("2", "Linear", (3, 8), (), True)
    assert (linear.calls, linear.flattened) == ((Call(times=7),), False)


convolution = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.booleans())


@settings(max_examples=25, deadline=None)
@given(st.lists(convolution, min_size=1, max_size=4), st.booleans(), st.integers(1, 3))
def test_totals_are_the_counted_ones(convolutions, flatten, batch):
    modules, channels = [], 4
    for out, kernel, stride, bias in convolutions:
        modules += [nn.Conv2d(channels, out, kernel, stride, padding=1, bias=bias), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    modules += [nn.Flatten(1 if flatten else 2)]
    features = nn.Sequential(*modules).eval()(IMAGE).shape[-1]
    model = nn.Sequential(*modules, nn.Linear(features, 3))
    found = inventory(model, IMAGE.repeat(batch, 1, 1, 1))
    assert not found.skipped
    assert found == inventory(model, IMAGE)
    assert found.params == count_params(model) == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs == count_macs(model, IMAGE) == counted_macs(model, IMAGE)
    assert found.macs == sum(layer.macs for layer in found.layers)
    for layer in found.layers:
        assert layer.params == sum(parameter.numel() for parameter in model.get_submodule(layer.name).parameters())


def test_shared_parameters_count_once_and_buffers_not_at_all():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    assert inventory(model, IMAGE).params == count_params(model) == 2 * 16 + 3 * 4 + 2 * 4


def test_parts_folded_into_the_batch_are_calls():
    folded = Net(lambda n, x: n.fc(n.conv(x.flatten(0, 1)).flatten(1)), conv=nn.Conv2d(4, 3, 3), fc=nn.Linear(36, 2))
    for batch in (1, 3):
        found = inventory(folded, torch.ones(batch, 5, 4, 6, 5))
        assert [call.times for layer in found.layers for call in layer.calls] == [5, 5]
        assert found["fc"].weight == (2, 3, 4, 3)
        assert found.macs == sum(layer.macs for layer in found.layers) == counted_macs(folded, torch.ones(1, 5, 4, 6, 5))


def test_positions_before_the_batch_are_calls():
    model = Net(lambda n, x: n.fc(x.transpose(0, 1)), fc=nn.Linear(8, 3))
    found = inventory(model, torch.ones(1, 7, 8))
    assert found["fc"].calls == (Call(times=7),)
    assert found.macs == found["fc"].macs == 7 * 24


def test_attention_counts_whole_and_what_its_fused_form_takes_the_weights_of_is_skipped():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).eval()
    example = torch.ones(1, 5, 8)
    found = inventory(model, example)
    assert [layer.name for layer in found.layers] == ["1"]
    assert found.skipped == {
        "0.self_attn.out_proj": "the forward uses its weight without calling it, as torch.nn.functional.linear and attention do",
        "0.linear1": "its weight is also used outside the layer",
        "0.linear2": "its weight is also used outside the layer",
    }
    # Products of queries, keys and values count as well; torch's own counter leaves them out.
    assert found.macs == count_macs(model, example) == counted_macs(model, example) + 2 * 5 * 5 * 8
    assert found.macs == found["1"].macs + 4 * 5 * 8 * 8 + 2 * 5 * 8 * 16 + 2 * 5 * 5 * 8


def test_resnet18():
    model = torchvision.models.resnet18(weights=None)
    example = torch.ones(1, 3, 64, 64)
    found = inventory(model, example)
    wanted = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(layer.name for layer in found.layers) == sorted(wanted)
    assert not found.skipped
    assert not any(layer.flattened for layer in found.layers)
    assert found.macs == sum(layer.macs for layer in found.layers) == counted_macs(model, example)


def test_vgg_in_little():
    model = Net(
        lambda n, x: n.classifier(torch.flatten(n.avgpool(n.features(x)), 1)),
        features=nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        avgpool=nn.AdaptiveAvgPool2d(7),
        classifier=nn.Sequential(nn.Linear(5 * 49, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 3)),
    )
    assert kernels(model) == {"features.0": (5, 4, 3, 3), "classifier.0": (6, 5, 7, 7), "classifier.3": (3, 6)}


def test_a_subclass_that_computes_the_same_is_found():
    assert kernels(nn.Sequential(Named(4, 3, 3))) == {"0": (3, 4, 3, 3)}


def test_arguments_by_name_are_seen():
    assert kernels(Net(lambda n, x: n.conv(input=x), conv=nn.Conv2d(4, 3, 3))) == {"conv": (3, 4, 3, 3)}


# --- behind a flatten ---


def through(between, size=120):
    return Net(lambda n, x: n.fc(between(n, x)), fc=nn.Linear(size, 3), norm=nn.BatchNorm1d(size), drop=nn.Dropout())


FLATTENS = {
    "nn.Flatten": lambda n, x: nn.Flatten()(x),
    "torch.flatten": lambda n, x: torch.flatten(x, 1),
    "torch.flatten by name": lambda n, x: torch.flatten(input=x, start_dim=1),
    "flatten": lambda n, x: x.flatten(1),
    "view": lambda n, x: x.view(len(x), -1),
    "view of size": lambda n, x: x.view(x.size(0), 120),
    "reshape": lambda n, x: x.reshape(x.shape[0], -1),
    "torch.reshape": lambda n, x: torch.reshape(x, (len(x), -1)),
    "relu": lambda n, x: F.relu(x.flatten(1)),
    "relu by name": lambda n, x: F.relu(input=x.flatten(1), inplace=True),
    "relu_": lambda n, x: x.flatten(1).relu_(),
    "modules": lambda n, x: nn.GELU()(n.drop(n.norm(nn.ReLU()(x.flatten(1))))),
    "tanh": lambda n, x: torch.tanh(x.flatten(1)).sigmoid(),
    "identity": lambda n, x: nn.Identity()(x.flatten(1)).contiguous(),
}
OTHERS = {
    "another layer": lambda n, x: n.between(x.flatten(1)),
    "two maps": lambda n, x: torch.cat([x.flatten(1), x.flatten(1)], 1)[:, :120],
    "another order": lambda n, x: x.flatten(1).flip(1),
    "a part of the map": lambda n, x: x.repeat(1, 2, 1, 1).reshape(2, -1),
    "positions": lambda n, x: x.repeat(1, 30, 1, 1).movedim(1, -1),
}


@pytest.mark.parametrize("between", FLATTENS.values(), ids=FLATTENS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_linear_behind_a_flatten_is_a_kernel_over_the_map(between, batch):
    found = inventory(through(between), IMAGE.repeat(batch, 1, 1, 1))["fc"]
    assert (found.weight, found.calls) == ((3, 4, 6, 5), (Call((6, 5), (1, 1)),))
    assert found.flattened


@pytest.mark.parametrize("between", OTHERS.values(), ids=OTHERS)
def test_a_linear_behind_something_else_is_none(between):
    model = through(between)
    model.between = nn.Linear(120, 120)
    found = inventory(model, IMAGE)["fc"]
    assert found.weight == (3, 120)
    assert not found.flattened


@pytest.mark.parametrize("shape", [(60, 1), (60, 1, 1), (60, 1, 1, 1), (60,), (2, 3, 2, 5, 1)])
def test_a_map_of_one_position_or_too_many_dimensions_is_a_row(shape):
    found = inventory(through(lambda n, x: x.reshape(1, *shape).flatten(1), 60), IMAGE.reshape(1, -1)[:, :60])["fc"]
    assert found.weight == (3, 60)
    assert not found.flattened


# --- examples of any nesting ---


def two_inputs(run):
    return Net(run, conv=nn.Conv2d(4, 3, 3), meta=nn.Linear(7, 5), head=nn.Linear(8, 2))


def both(n, image, meta):
    return n.head(torch.cat([n.conv(image).mean((2, 3)), n.meta(meta)], 1))


NESTED = {
    "tuple": (lambda n, x: both(n, *x), lambda image, meta: (image, meta)),
    "dict": (lambda n, x: both(n, x["image"], x["meta"]), lambda image, meta: {"image": image, "meta": meta, "scale": 2}),
    "nested": (lambda n, x: both(n, x[0]["image"], x[1][0]), lambda image, meta: [{"image": image}, (meta, torch.tensor(3.0))]),
}


@pytest.mark.parametrize(("run", "pack"), NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_nested_example_is_counted_for_one_input(run, pack, batch):
    found = inventory(two_inputs(run), pack(IMAGE.repeat(batch, 1, 1, 1), torch.ones(batch, 7)))
    assert {layer.name: layer.macs for layer in found.layers} == {"conv": 3 * 4 * 9 * 4 * 3, "meta": 35, "head": 16}
    assert found.macs == sum(layer.macs for layer in found.layers)


PASSES = {
    "nothing to skip": (lambda n, x: n.two(n.one(x)), 4),
    "one to skip": (lambda n, x: n.two(n.one(x)) + n.one.weight.sum(), 5),
}


@pytest.mark.parametrize(("run", "most"), PASSES.values(), ids=PASSES)
def test_an_inventory_runs_the_model_a_few_times(run, most):
    def counted(n, x):
        passes.append(len(x))
        return run(n, x)

    passes = []
    inventory(Net(counted, one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 2, 1)), IMAGE)
    assert len(passes) == most
