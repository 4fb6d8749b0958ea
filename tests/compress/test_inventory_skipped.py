"""An inventory skips layers that cannot be replaced, with the reason, and leaves the model unchanged."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize

from ranksearch.compress.inventory import count_macs, inventory
from ranksearch.errors import ModelError
from tests.layers import Noisy, Same
from tests.nets import IMAGE, Net, fails


class Rectified(nn.Conv2d):
    """A convolution whose own forward changes its result."""

    def forward(self, inputs):
        return super().forward(inputs).relu()


class Resized(nn.ConvTranspose2d):
    """A transposed convolution of one output size for inputs of any size."""

    def forward(self, inputs):
        return super().forward(inputs, [11, 9])


class Spread(nn.ConvTranspose2d):
    """A transposed convolution that pads its input by one on each side."""

    def forward(self, inputs):
        return super().forward(F.pad(inputs, (1, 1, 1, 1)))


class Conv2d(Rectified):
    """A convolution with its own forward whose class has the name of torch's class."""


class Dynamic(nn.Conv2d):
    """A convolution whose weight depends on its input."""

    def forward(self, inputs):
        return F.conv2d(inputs, self.weight * inputs.mean(), self.bias)


class Doubled(nn.Conv2d):
    """A convolution that does more in training."""

    def forward(self, inputs):
        return super().forward(inputs) * (2 if self.training else 1)


class Reflected(nn.Conv2d):
    """A convolution that pads its input by other values than zeros."""

    def forward(self, inputs):
        return super().forward(F.pad(inputs, (1, 0, 1, 0), mode="reflect"))


class Shifted(nn.Conv2d):
    """A convolution that changes its input."""

    def forward(self, inputs):
        return super().forward(inputs - 1)


class DynamicConv(nn.Module):
    """A module whose name contains Conv, but that is no convolution and returns no tensor."""

    def forward(self, inputs, scale=1):
        return {"outputs": inputs * scale}


# --- layers that are skipped ---


def with_shared_weight():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    model[1].weight = model[0].weight
    return model


def with_two_names():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return Net(lambda n, x: n.last(n.one(x)), one=conv, two=conv, last=nn.Conv2d(4, 2, 1))


def before(layer, channels=4):
    return nn.Sequential(layer, nn.Conv2d(channels, 2, 1))


def noisy():
    return parametrize.register_parametrization(nn.Conv2d(4, 4, 3), "weight", Noisy())


def with_shared_direction():
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)) for _ in range(2)), nn.Conv2d(4, 2, 1))
    model[1].parametrizations.weight.original1 = model[0].parametrizations.weight.original1
    return model


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = torch.ao.nn.quantized.dynamic.Linear(5, 3)
        return Net(lambda n, x: n[1](x), **{"0": linear, "1": nn.Conv2d(4, 2, 1)})


def complex_convolution():
    conv, last = nn.Conv2d(4, 4, 1, dtype=torch.complex64), nn.Conv2d(4, 2, 1)
    return Net(lambda n, x: n.get_submodule("1")(n.get_submodule("0")(x.to(torch.complex64)).real), **{"0": conv, "1": last})


def used(use):
    """A model that calls its layer `one`, then uses it in another way by `use(model, inputs, outputs)`."""
    return Net(lambda n, x: n.last(use(n, x, n.one(x))), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1))


def kept_in_a_list():
    model = Net(lambda n, x: n.last(n.kept[0](x)), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1))
    model.kept = [model.one]
    return model


def before_a_scale():
    model = used(lambda n, x, y: y * n.one.scale)
    model.one.scale = torch.tensor(2.0)
    return model


def hooked():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_pre_hook(lambda module, args: (F.pad(args[0], (1, 1, 1, 1)),))
    return conv


def wrapped():
    conv = nn.Conv2d(4, 4, 3)
    inner = conv.forward
    conv.forward = lambda x: inner(x).relu()
    return conv


def sized(options):
    """A model that passes options to its transposed convolution."""
    return Net(lambda n, x: n.last(n.one(x, **options(x))), one=nn.ConvTranspose2d(4, 4, 3), last=nn.Conv2d(4, 2, 1))


def of_its_type(n, x, y):
    return (y,)[0 if isinstance(n.one, nn.Conv2d) else 1]


def run_second(n, x):
    return n.get_submodule("1")(x)


USED = "the forward uses its weight without calling it, as torch.nn.functional.linear and attention do"
OUTSIDE = "its weight is also used outside the layer"
PARAMETRISED = "its weight is parametrised or pruned; make that permanent first, by remove_parametrizations or prune.remove"
SIZED = "the forward passes it an output_size, which its replacement does not take"
SMALL_DEPTHWISE = "it is depthwise, without a 2-D kernel of at least 5 x 5"
SKIPPED = {
    "depthwise": (before(nn.Conv2d(4, 4, 3, groups=4)), SMALL_DEPTHWISE),
    "depthwise, long": (before(nn.Conv2d(4, 4, (5, 3), groups=4)), SMALL_DEPTHWISE),
    "depthwise, a point": (before(nn.Conv2d(4, 4, 1, groups=4)), SMALL_DEPTHWISE),
    "depthwise sequence": (
        Net(
            lambda n, x: n.last(n.one(x.flatten(2)).unflatten(2, (2, 12))),
            one=nn.Conv1d(4, 4, 7, groups=4),
            last=nn.Conv2d(4, 2, 1),
        ),
        SMALL_DEPTHWISE,
    ),
    "shared weight": (with_shared_weight(), "its weight is shared by 0.weight, 1.weight"),
    "two names": (with_two_names(), "its weight is shared by one.weight, two.weight"),
    "never called": (
        Net(lambda n, x: n.last(x), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1)),
        "it is never called by the forward pass",
    ),
    "weights that differ each time": (before(noisy()), PARAMETRISED),
    "shared direction": (
        with_shared_direction(),
        "its weight is shared by 0.parametrizations.weight.original1, 1.parametrizations.weight.original1",
    ),
    "complex": (complex_convolution(), "its weight is complex64, which is not real"),
    "transposed, sized": (sized(lambda x: {"output_size": [8, 7]}), SIZED),
    "transposed, sized by position": (
        Net(lambda n, x: n.last(n.one(x, x.shape[2:])), one=nn.ConvTranspose2d(4, 4, 1), last=nn.Conv2d(4, 2, 1)),
        SIZED,
    ),
    "transposed, sized by none": (sized(lambda x: {"output_size": None}), SIZED),
    "transposed, depthwise": (before(nn.ConvTranspose2d(4, 4, 4, stride=2, groups=4)), SMALL_DEPTHWISE),
    "transposed, of one size": (before(Resized(4, 4, 3, stride=2, padding=1)), "Resized has a forward of its own"),
    "transposed, padded": (before(Spread(4, 4, 3)), "Spread has a forward of its own"),
    "grouped, more in training": (before(Doubled(4, 4, 3, groups=2)), "Doubled has a forward of its own"),
    "bilinear": (Net(lambda n, x: n.last(n.one(x, x)), one=nn.Bilinear(5, 5, 5), last=nn.Conv2d(4, 2, 1)), None),
    "own forward": (before(Rectified(4, 4, 3)), "Rectified has a forward of its own"),
    "weight by input": (before(Dynamic(4, 4, 3)), "Dynamic has a forward of its own"),
    "more in training": (before(Doubled(4, 4, 3)), "Doubled has a forward of its own"),
    "reflected": (before(Reflected(4, 4, 3)), "Reflected has a forward of its own"),
    "another input": (before(Shifted(4, 4, 3)), "Shifted has a forward of its own"),
    "no tensor": (
        Net(lambda n, x: n.last(n.one(x, scale=2)["outputs"]), one=DynamicConv(), last=nn.Conv2d(4, 2, 1)),
        "DynamicConv is not supported",
    ),
    "quantised": (
        Net(run_second, **{"0": quantised().get_submodule("0"), "1": nn.Conv2d(4, 2, 1)}),
        "torch.ao.nn.quantized.dynamic.modules.linear.Linear is not supported",
    ),
    "weight without a call": (
        Net(lambda n, x: n.last(F.conv2d(x, n.one.weight)), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1)),
        USED,
    ),
    "part of a weight without a call": (
        Net(lambda n, x: n.last(x * n.one.weight[:, 0, 0].mean()), one=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1)),
        USED,
    ),
    "named as torch's own": (before(Conv2d(4, 4, 3)), "tests.compress.test_inventory_skipped.Conv2d has a forward of its own"),
    "weight in a function": (used(lambda n, x, y: y + F.conv2d(x, n.one.weight, n.one.bias)), OUTSIDE),
    "weight as a matrix": (used(lambda n, x, y: y.movedim(1, -1).matmul(n.one.weight.flatten(1).T).movedim(-1, 1)), OUTSIDE),
    "weight in a penalty": (used(lambda n, x, y: y + n.one.weight.pow(2).sum()), OUTSIDE),
    "weight's type": (used(lambda n, x, y: y.to(n.one.weight.dtype)), OUTSIDE),
    "bias": (used(lambda n, x, y: y - n.one.bias[:, None, None]), "its bias is also used outside the layer"),
    "tensor of its own": (before_a_scale(), "its scale is also used outside the layer"),
    "kept in a list": (
        kept_in_a_list(),
        "the forward does not call it by its name, but through another reference, such as a list",
    ),
    "hooked": (before(hooked()), "it has forward hooks, which its replacement would not have; remove them first"),
    "forward of the instance": (before(wrapped()), "its forward was replaced by another function"),
    "another result": (
        used(lambda n, x, y: y.exp() if isinstance(n.one, nn.Conv2d) else y),
        "the forward gives another result when it is replaced",
    ),
    "weight in training": (used(lambda n, x, y: y + n.one.weight.sum() if n.training else y), f"{OUTSIDE}, in training"),
    "of its type": (
        used(of_its_type),
        "the forward fails when it is replaced (IndexError: tuple index out of range)",
    ),
    "padded in two ways": (
        Net(
            lambda n, x: n.last(n.one(x)) + n.last(n.one(x[..., 1:])).mean(),
            one=Same(4, 4, 3, stride=2),
            last=nn.Conv2d(4, 2, 1),
        ),
        "it pads its inputs by their size, which differs from call to call",
    ),
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


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["plain", "used", "typed", "branch"]), min_size=1, max_size=7))
def test_only_those_that_the_forward_needs_are_skipped(kinds):
    def run(n, x):
        for kind, layer in zip(kinds, n.layers, strict=True):
            x = layer(x) * (layer.weight.norm() / 2 if kind == "used" else 1)
            x = x + 1 if kind == "branch" and isinstance(layer, nn.Conv2d) else x
            assert kind != "typed" or isinstance(layer, nn.Conv2d), "another type"
        return n.last(x)

    model = Net(run, layers=nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in kinds), last=nn.Conv2d(4, 2, 1))
    for layer in model.layers:
        # The identity, so that the effect of each layer reaches the output.
        nn.init.dirac_(layer.weight)
    reasons = {"used": OUTSIDE, "typed": "the forward fails when it is replaced (AssertionError: another type)"}
    reasons["branch"] = "the forward gives another result when it is replaced"
    assert inventory(model, IMAGE).skipped == {f"layers.{i}": reasons[kind] for i, kind in enumerate(kinds) if kind in reasons}


# --- the model is unchanged ---


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


def fails_when_replaced(n, x):
    return n.more([n.drop(n.norm(n.conv(x)))][0 if isinstance(n.conv, nn.Conv2d) else 1])


@pytest.mark.parametrize("run", [lambda n, x: n.more(n.drop(n.norm(n.conv(x)))), fails_when_replaced, fails])
@pytest.mark.parametrize("use", [inventory, count_macs])
def test_the_model_is_left_as_it_was(run, use):
    model = frozen_in_part(run)
    modes, modules = [module.training for module in model.modules()], list(model.named_modules())
    state, everywhere = copy.deepcopy(model.state_dict()), hooks()
    assert everywhere
    if run is fails:
        with pytest.raises((ModelError, ValueError), match="a broken forward"):
            use(model, IMAGE)
    else:
        use(model, IMAGE)
    assert [module.training for module in model.modules()] == modes
    assert list(model.named_modules()) == modules
    assert hooks() == everywhere
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_are_left_out_at_random_are_found_all_the_same():
    def forward(net, inputs):
        if net.training and random.random() < 0.5:
            return net.last(inputs)
        return net.last(net.conv(inputs) + inputs)

    model = Net(forward, conv=nn.Conv2d(4, 4, 3, padding=1), last=nn.Conv2d(4, 2, 1))
    random.seed(5)
    before = random.getstate()
    found = {tuple(layer.name for layer in inventory(model, IMAGE).layers) for _ in range(20)}
    assert found == {("conv", "last")}
    assert random.getstate() == before
