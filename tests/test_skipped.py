"""What an inventory leaves out and why, what it refuses, and that it leaves the model as it was."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, prune

from ranksearch.errors import ModelError
from ranksearch.layers import count_macs, inventory
from tests.nets import Net

IMAGE = torch.ones(1, 4, 6, 5)


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as weight standardisation has."""

    def forward(self, inputs):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(inputs, weight, self.bias)


class DynamicConv(nn.Module):
    """Something called Conv that is none, and returns no tensor."""

    def forward(self, inputs, scale=1):
        return {"outputs": inputs * scale}


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
