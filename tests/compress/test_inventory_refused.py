"""Models and examples that an inventory refuses, each with a message of one sentence."""

import re
import warnings

import pytest
import torch
from torch import nn

from ranksearch.compress.inventory import inventory
from ranksearch.errors import ModelError
from tests.compress.test_inventory_skipped import SMALL_DEPTHWISE, DynamicConv
from tests.nets import IMAGE, Net, fails


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
        "Weights must be initialised, but '0.weight' has no shape yet; run the model once on its data first.",
    ),
    "one line": (Net(fails, conv=nn.Conv2d(4, 3, 3), norm=nn.BatchNorm2d(3)), ACCEPT.format("ValueError: a broken forward")),
    "no message": (Net(lambda n, x: next(iter(())), conv=nn.Conv2d(4, 3, 3)), ACCEPT.format("StopIteration: no message")),
    "no layer": (nn.Sequential(nn.Flatten()), NOTHING.format("it holds no Conv or Linear module")),
    "none left": (
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), DynamicConv()),
        NOTHING.format(f"0: {SMALL_DEPTHWISE}; 1: DynamicConv is not supported"),
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


def compiled_within(model):
    model[0] = torch.compile(model[0])
    return model


def compiled_forward(model):
    model[0].forward = torch.compile(model[0].forward)
    return model


def compiled_in_place(model):
    model.compile()
    return model


@pytest.mark.parametrize(
    ("compiled", "which"),
    [(torch.compile, "it"), (compiled_in_place, "it"), (compiled_within, "'0'"), (compiled_forward, "'0'")],
    ids=["whole", "in place", "within", "forward"],
)
def test_a_compiled_model_is_refused(compiled, which):
    model = compiled(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()))
    message = f"The model must not be compiled, but {which} went through torch.compile; pass the original model, and"
    with pytest.raises(ModelError, match=message):
        inventory(model, torch.ones(1, 4, 8, 8))


@pytest.mark.parametrize("holds", ["a lambda", "a wrapped forward"])
def test_a_forward_that_holds_the_model_is_refused(holds):
    model = Net(lambda n, x: n.last(n.conv(x)), conv=nn.Conv2d(4, 4, 3), last=nn.Conv2d(4, 2, 1))
    if holds == "a lambda":
        model.run = lambda _, inputs: model.last(model.conv(inputs))
    else:
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    words = (
        "A copy of the model must run its own layers, but a copy never calls 'conv': the forward reaches it through a lambda"
    )
    with pytest.raises(ModelError, match=words):
        inventory(model, IMAGE)


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(4, 2, 1)).eval(), IMAGE)
    with pytest.raises(
        ModelError, match="The model must be a Python module, but is TorchScript, whose layers cannot be replaced"
    ):
        inventory(scripted, IMAGE)


EXAMPLES = {
    "two arguments as one": (
        Net(lambda n, x: n.head(x), head=nn.Linear(7, 2)),
        (IMAGE, torch.ones(1, 7)),
        "The model must accept one input of shape ((1, 4, 6, 5), (1, 7)), but its forward raised TypeError: linear(): argument "
        "'input' (position 1) must be Tensor, not tuple; a tuple holds the arguments of a forward that takes as many, and else is its "
        "only argument; wrap the model.",
    ),
    "sizes that differ": (
        Net(lambda n, x: n.head(x[0]), head=nn.Linear(7, 2)),
        (torch.ones(2, 7), torch.ones(3, 7)),
        "An example must be a batch of inputs, whose tensors all have the same first size, but has ((2, 7), (3, 7)).",
    ),
    "no tensor": (
        Net(lambda n, x: n.head(x), head=nn.Linear(7, 2)),
        {"image": 3},
        "An example must be a batch of inputs, whose tensors all have the same first size, but has {'image': 3}.",
    ),
    "half precision": (
        nn.Sequential(nn.Conv2d(4, 2, 1)).half(),
        IMAGE,
        "The model must accept one input of shape (1, 4, 6, 5), but its forward raised RuntimeError: Input type (float) and "
        "bias type (c10::Half) should be the same; its weights are float16 and the input is float32: call .float() on the "
        "model, or convert the data.",
    ),
}


@pytest.mark.parametrize(("model", "example", "message"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_that_the_model_does_not_take_is_refused(model, example, message):
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        inventory(model, example)
