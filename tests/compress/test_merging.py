"""A merged model computes what the factorized one computes, with the modules of the dense model."""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from ranksearch.compress.merging import merge_
from ranksearch.compress.saved import load_model, write_model
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.errors import PlanError
from ranksearch.plan import CP, CP4, SVD, TT, Plan, Spatial, Tucker2
from tests import nets
from tests.compress.test_surgery import INPUTS, PLAN, assert_same_state, net
from tests.geometries import BY_NAME, PAIRS, assert_close, given_geometry, some_ranks
from tests.nets import normal

# torch warns that an even kernel with padding 'same' pads one side more, as intended.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
contract = pytest.mark.parametrize(("geometry", "name"), PAIRS)


@contract
def test_a_merged_layer_computes_what_its_factors_do(geometry, name):
    model, inputs, layer = given_geometry(geometry)
    method = BY_NAME[name]
    for ranks in some_ranks(method, layer):
        value = method.value(layer, ranks)
        small = factorize_(copy.deepcopy(model), {"layer": value})
        merged = copy.deepcopy(small)
        assert merge_(merged, Plan.of({"layer": value}), ["layer"]) == Plan()
        assert_close(merged(inputs), small(inputs))
        assert repr(merged) == repr(model)
        assert merged.state_dict().keys() == model.state_dict().keys()
        assert vars(merged.layer).keys() == vars(model.layer).keys()


OF_MAPS = [SVD(3), Spatial(3), Tucker2(2, 3), CP(3), CP4(3), TT(2, 3, 2)]
ORDERED = [(value, order) for value in OF_MAPS for order in ((1, 2, 0), (2, 0, 1))]


@pytest.mark.parametrize(("value", "order"), [*ORDERED, (Tucker2(2, 3), (2, 0, 3, 1)), (CP(3), (0, 2, 1, 3))], ids=str)
def test_a_fully_connected_layer_behind_a_map_in_any_order(value, order):
    size = (2, 3, 2)[: len(order) - 1]
    features = 4 * math.prod(size)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(features, 6))).double()
    plan = Plan.of({"fc": replace(value, kernel=size, order=order)})
    inputs = normal(3, features, seed=4)
    small = factorize_(copy.deepcopy(model), plan)
    merged = copy.deepcopy(small)
    merge_(merged, plan, ["fc"])
    assert_close(merged(inputs), small(inputs))
    assert repr(merged) == repr(model)


@pytest.mark.parametrize("names", [[], ["fc"], ["stem", "block.0.conv", "last"], [name for name, _ in PLAN]], ids=str)
def test_only_the_layers_named_are_merged_and_the_plan_is_that_of_the_others(names, tmp_path):
    model = factorize_(net(), PLAN).eval()
    before, outputs = dict(model.named_modules()), model(INPUTS)
    left = merge_(model, PLAN, names)
    assert left == Plan.of({name: value for name, value in PLAN if name not in names})
    assert all((model.get_submodule(name) is before[name]) == (name not in names) for name, _ in PLAN)
    torch.testing.assert_close(model(INPUTS), outputs)
    write_model(tmp_path, left, weights_of(model))
    back = load_model(net(seed=1), tmp_path)
    assert torch.equal(back(INPUTS), model(INPUTS))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_grad_and_mode_survive(dtype, grad, training):
    model = net().to(dtype)
    model.last.weight.requires_grad_(grad)
    model.last.bias.requires_grad_(not grad)
    model.stem.requires_grad_(grad).train(not training)
    wanted = copy.deepcopy(model)
    merge_(factorize_(model, PLAN), PLAN, [name for name, _ in PLAN])
    for (name, found), (_, old) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert (found.dtype, found.shape, found.requires_grad, found.is_leaf) == (dtype, old.shape, old.requires_grad, True), (
            name
        )
    assert model.stem.training == wanted.stem.training


@pytest.mark.parametrize(
    ("plan", "names", "message"),
    [
        (PLAN, ["stem", "lst"], "Only layers that the plan factorizes can be merged, but 'lst' is none. Did you mean 'last'?"),
        (PLAN, ["stem", "block.2"], "Only layers that the plan factorizes can be merged, but 'block.2' is none."),
        (
            Plan.of({**dict(PLAN), "tail": SVD(2)}),
            ["stem", "tail"],
            "A plan must name layers of the model, but 'tail' is none.",
        ),
        (
            Plan.of({**dict(PLAN), "last": SVD(3)}),
            ["stem", "last"],
            "Layer 'last' must consist of the parts of SVD 3, but is another Sequential; give the plan that the "
            "model was factorized by.",
        ),
        (
            Plan.of({**dict(PLAN), "block.2": CP(2)}),
            ["stem", "block.2"],
            "Layer 'block.2' must consist of the parts of CP 2, but is another Conv2d; give the plan that the model "
            "was factorized by.",
        ),
    ],
)
def test_all_or_nothing(plan, names, message):
    model = factorize_(net(), PLAN)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        merge_(model, plan, names)
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)


def test_a_trained_model_is_merged_with_its_new_bias(trained):
    plan = Plan.of({"conv1": Tucker2(1, 4), "fc1": CP(5, kernel=(4, 4))})
    model = factorize_(copy.deepcopy(trained.model), plan).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 10)
    inputs = nets.few_digits().validation.tensors[0][:20]
    outputs = model(inputs)
    merge_(model, plan, ["conv1", "fc1"])
    torch.testing.assert_close(model(inputs), outputs, rtol=1e-4, atol=1e-4)
    assert repr(model) == repr(trained.model)
