"""What an inventory finds and why not the rest; and that it leaves the model as it was."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.errors import ModelError
from ranksearch.layers import count_macs, count_params, inventory

IMAGE, ROW = torch.ones(1, 4, 6, 5), torch.ones(1, 4)


class Net(nn.Module):
    """Modules by name, in order of definition, and a function of the net and its input that runs them."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs):
        return self.run(self, inputs)


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as weight standardisation has."""

    def forward(self, inputs):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(inputs, weight, self.bias)


class Named(nn.Conv2d):
    """A convolution of another name that computes what torch's does."""


class DynamicConv(nn.Module):
    """Something called Conv that is none, and returns no tensor."""

    def forward(self, inputs, scale=1):
        return {"outputs": inputs * scale}


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


# --- what is found ---


def test_layers_come_in_call_order():
    model = Net(lambda n, x: n.last(n.first(n.middle(x)).mean((2, 3))), **{
        "last": nn.Linear(3, 2), "first": nn.Conv2d(5, 3, 1), "middle": nn.Conv2d(4, 5, 3)
    })  # fmt: skip
    assert list(kernels(model)) == ["middle", "first", "last"]


def test_a_layer_is_described_as_it_is():
    model = nn.Sequential(nn.Conv2d(4, 7, (3, 2), stride=(2, 1), bias=False), nn.Flatten(2), nn.Linear(8, 3))
    conv, linear = inventory(model, IMAGE).layers
    assert (conv.name, conv.kind, conv.weight, conv.kernel, conv.bias) == ("0", "Conv2d", (7, 4, 3, 2), (3, 2), False)
    assert (conv.in_size, conv.out_size, conv.calls, conv.flattened) == ((6, 5), (2, 4), 1, False)
    assert (linear.name, linear.kind, linear.weight, linear.kernel, linear.bias) == ("2", "Linear", (3, 8), (), True)
    assert (linear.in_size, linear.out_size, linear.calls, linear.flattened) == ((), (), 7, False)


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
        assert [layer.calls for layer in found.layers] == [5, 5]
        assert found["fc"].weight == (2, 3, 4, 3)
        assert found.macs == sum(layer.macs for layer in found.layers) == counted_macs(folded, torch.ones(1, 5, 4, 6, 5))


def test_positions_before_the_batch_are_calls():
    model = Net(lambda n, x: n.fc(x.transpose(0, 1)), fc=nn.Linear(8, 3))
    found = inventory(model, torch.ones(1, 7, 8))
    assert found["fc"].calls == 7
    assert found.macs == found["fc"].macs == 7 * 24


def test_attention_counts_whole_and_its_output_projection_is_skipped():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    example = torch.ones(1, 5, 8)
    found = inventory(model, example)
    assert [layer.name for layer in found.layers] == ["linear1", "linear2"]
    assert found.skipped == {"self_attn.out_proj": "it is never called by the forward pass"}
    assert found.macs == count_macs(model, example) == counted_macs(model, example)
    assert found.macs > sum(layer.macs for layer in found.layers) + 4 * 5 * 8 * 8


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
    assert (found.weight, found.in_size, found.out_size, found.calls) == ((3, 4, 6, 5), (6, 5), (1, 1), 1)
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


# --- why not the rest ---


def with_shared_weight():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    model[1].weight = model[0].weight
    return model


def with_two_names():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return Net(lambda n, x: n.last(n.one(x)), one=conv, two=conv, last=nn.Conv2d(4, 2, 1))


def before(layer, channels=4):
    return nn.Sequential(layer, nn.Conv2d(channels, 2, 1))


def pruned():
    conv = nn.Conv2d(4, 4, 3)
    prune.l1_unstructured(conv, "weight", amount=0.5)
    return conv


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = torch.ao.nn.quantized.dynamic.Linear(5, 3)
        return Net(lambda n, x: n[1](x), **{"0": linear, "1": nn.Conv2d(4, 2, 1)})


def complex_convolution():
    conv, last = nn.Conv2d(4, 4, 1, dtype=torch.complex64), nn.Conv2d(4, 2, 1)
    return Net(lambda n, x: n.get_submodule("1")(n.get_submodule("0")(x.to(torch.complex64)).real), **{"0": conv, "1": last})


def run_second(n, x):
    return n.get_submodule("1")(x)


PARAMETRISED = "its weight is parametrised; remove the parametrisation first"
SKIPPED = {
    "depthwise": (before(nn.Conv2d(4, 4, 3, groups=4)), "it is depthwise"),
    "depthwise, several out": (before(nn.Conv2d(4, 8, 3, groups=4), 8), "it is depthwise"),
    "grouped": (before(nn.Conv2d(4, 6, 3, groups=2), 6), "it has 2 groups"),
    "shared weight": (with_shared_weight(), "its weight is shared by 0.weight, 1.weight"),
    "two names": (with_two_names(), "its weight is shared by one.weight, two.weight"),
    "called twice": (
        Net(lambda n, x: n.last(n.one(n.one(x))), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1)),
        "it is called 2 times in one pass",
    ),
    "never called": (
        Net(lambda n, x: n.last(x), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1)),
        "it is never called by the forward pass",
    ),
    "parametrised": (before(parametrizations.weight_norm(nn.Conv2d(4, 4, 3))), PARAMETRISED),
    "pruned": (before(pruned()), PARAMETRISED),
    "complex": (complex_convolution(), "its weight is complex"),
    "transposed": (before(nn.ConvTranspose2d(4, 4, 3)), "ConvTranspose2d is not supported"),
    "bilinear": (Net(lambda n, x: n.last(n.one(x, x)), one=nn.Bilinear(5, 5, 5), last=nn.Conv2d(4, 2, 1)), None),
    "own forward": (before(Standardised(4, 4, 3)), "Standardised has a forward of its own"),
    "no tensor": (
        Net(lambda n, x: n.last(n.one(x, scale=2)["outputs"]), one=DynamicConv(), last=nn.Conv2d(4, 2, 1)),
        "DynamicConv is not supported",
    ),
    "quantised": (Net(run_second, **{"0": quantised().get_submodule("0"), "1": nn.Conv2d(4, 2, 1)}), "Linear is not supported"),
    "unbatched convolution": (
        Net(lambda n, x: n.last(n.one(x[0])[None]), one=nn.Conv2d(4, 4, 3), last=nn.Conv2d(4, 2, 1)),
        "it is called without a batch dimension",
    ),
    "unbatched linear": (
        Net(lambda n, x: n.last(x) + n.one(x[0, 0, 0]).sum(), one=nn.Linear(5, 5), last=nn.Conv2d(4, 2, 1)),
        "it is called without a batch dimension",
    ),
}


@pytest.mark.parametrize(("model", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_cannot_be_decomposed_is_skipped_with_the_reason(model, reason):
    found = inventory(model, IMAGE)
    names = [name for name, module in model.named_modules() if name]
    assert names
    assert set(found.skipped.values()) == ({reason} if reason else set())
    assert [layer.name for layer in found.layers] == names[-1:]
    assert set(found.skipped) | {names[-1]} <= set(names)


def test_a_subclass_that_computes_the_same_is_found():
    assert kernels(nn.Sequential(Named(4, 3, 3))) == {"0": (3, 4, 3, 3)}


def test_arguments_by_name_are_seen():
    assert kernels(Net(lambda n, x: n.conv(input=x), conv=nn.Conv2d(4, 3, 3))) == {"conv": (3, 4, 3, 3)}


# --- the model stays as it was ---


def hooks():
    return [
        len(value)
        for name, value in sorted(vars(module_hooks).items())
        if name.startswith("_global_") and name.endswith("hooks")
    ]


def frozen_in_part(run):
    model = Net(run, conv=nn.Conv2d(4, 3, 3), norm=nn.BatchNorm2d(3), drop=nn.Dropout(), more=nn.Sequential(nn.Conv2d(3, 3, 1)))
    model.train()
    model.norm.eval()
    model.more[0].eval()
    return model


def fails(n, x):
    n.norm(n.conv(x))
    raise ValueError("a broken forward\nwith details")


@pytest.mark.parametrize("run", [lambda n, x: n.more(n.drop(n.norm(n.conv(x)))), fails])
@pytest.mark.parametrize("use", [inventory, count_macs])
def test_the_model_is_left_as_it_was(run, use):
    model = frozen_in_part(run)
    modes = [module.training for module in model.modules()]
    state, everywhere = copy.deepcopy(model.state_dict()), hooks()
    assert everywhere
    if run is fails:
        with pytest.raises((ModelError, ValueError), match="a broken forward"):
            use(model, IMAGE)
    else:
        use(model, IMAGE)
    assert [module.training for module in model.modules()] == modes
    assert hooks() == everywhere
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- messages ---


def not_finite(value):
    model = nn.Sequential(nn.Conv2d(4, 3, 3))
    with torch.no_grad():
        model[0].bias[1] = value
    return model


FINITE = "Weights must be finite, but '0.bias' holds NaN or infinity; load or train the model again."
ACCEPT = (
    "The model must accept one input of shape (1, 4, 6, 5), but its forward raised {}; "
    "check the model's arguments against the data."
)
NOTHING = "The model must have a decomposable layer, but has none ({})."
MESSAGES = {
    "nan": (not_finite(float("nan")), FINITE),
    "infinity": (not_finite(float("-inf")), FINITE),
    "lazy": (
        nn.Sequential(nn.LazyConv2d(3, 3)),
        "Weights must be there, but '0.weight' has no shape yet; run the model once on its data first.",
    ),
    "one line": (Net(fails, conv=nn.Conv2d(4, 3, 3), norm=nn.BatchNorm2d(3)), ACCEPT.format("ValueError: a broken forward")),
    "no message": (Net(lambda n, x: next(iter(())), conv=nn.Conv2d(4, 3, 3)), ACCEPT.format("StopIteration: no message")),
    "no layer": (nn.Sequential(nn.Flatten()), NOTHING.format("it holds no Conv or Linear module")),
    "none left": (
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2)),
        NOTHING.format("0: it is depthwise; 1: it has 2 groups"),
    ),
    "the model itself": (
        nn.Conv2d(4, 3, 3),
        NOTHING.format("Conv2d: it is the model itself; put it into an nn.Sequential"),
    ),
}


@pytest.mark.parametrize(("model", "message"), MESSAGES.values(), ids=MESSAGES)
def test_a_model_that_cannot_be_searched_is_refused(model, message):
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        inventory(model, IMAGE)


def test_an_input_of_another_shape_is_refused_in_torchs_words():
    with pytest.raises(
        ModelError, match=r"^The model must accept one input of .* raised RuntimeError: .*\(24x5 and 7x3\); check"
    ):
        inventory(nn.Sequential(nn.Linear(7, 3)), IMAGE)
