"""A narrowing keeps some channels of a model, and fits the same model again after saving and loading."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

from ranksearch.compress.export import check_reloading, load_model, save_model
from ranksearch.compress.inventory import count_macs
from ranksearch.compress.merging import merge_
from ranksearch.compress.narrowing import _copy, _prune, _read, narrow_, narrowing_of, why_not_narrowed
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.errors import ModelError, PlanError
from ranksearch.plan import SVD, Narrowing, Plan
from tests import nets

IMAGE = torch.ones(1, 1, 8, 8)


def loss(model):
    return model(nets.normal(8, 1, 8, 8, dtype=torch.float32)).square().mean()


def residual():
    class Block(nn.Sequential):
        def forward(self, x):
            return torch.relu(x + super().forward(x))

    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        Block(nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 12, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def concatenating():
    return nets.Net(
        lambda n, x: n.fc(n.both(torch.cat([n.left(x), n.right(x)], 1)).flatten(1)),
        left=nn.Conv2d(1, 8, 3, padding=1),
        right=nn.Conv2d(1, 12, 3, padding=1),
        both=nn.Conv2d(20, 10, 3, padding=1),
        fc=nn.Linear(10 * 64, 5),
    )


def depthwise():
    return nn.Sequential(
        nn.Conv2d(1, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.Conv2d(64, 5, 1),
    )


@pytest.mark.parametrize("importance", [loss, "uniform"])
@pytest.mark.parametrize("net", [nets.small, residual, concatenating, depthwise])
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_narrowed_net_has_at_most_the_share(net, importance, share):
    model = net().eval()
    before = copy.deepcopy(model.state_dict())
    narrowing = narrowing_of(model, IMAGE, share, importance=importance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = count_macs(narrow_(copy.deepcopy(model), narrowing), IMAGE) / count_macs(model, IMAGE)
    assert share - 0.2 < kept <= share
    assert Narrowing.from_dict(narrowing.to_dict()) == narrowing


@pytest.mark.parametrize("net", [nets.small, residual, concatenating])
def test_pruned_channels_of_zeros_change_nothing(net):
    model = net().double().eval()
    narrowing = narrowing_of(model, IMAGE.double(), 0.5, importance="uniform")
    for name, dims in narrowing.tensors.items():
        if 1 in dims:  # the inputs that are not kept no longer count
            tensor, kept = model.get_parameter(name), torch.tensor(narrowing.kept[dims[1]])
            mask = torch.zeros(tensor.shape[1], dtype=tensor.dtype).index_fill(0, kept, 1)
            tensor.data *= mask.view(1, -1, *[1] * (tensor.dim() - 2))
    inputs = nets.normal(4, 1, 8, 8)
    assert torch.allclose(narrow_(copy.deepcopy(model), narrowing)(inputs), model(inputs))


@pytest.mark.parametrize("net", [nets.small, residual, concatenating, depthwise])
def test_a_narrowed_net_is_the_net_that_torch_pruning_made(net):
    model = net().eval()
    pruned = _copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrowing = _read(model, pruned, IMAGE, _prune(pruned, IMAGE, 0.5, loss))
    narrowed, inputs = narrow_(copy.deepcopy(model), narrowing), nets.normal(4, 1, 8, 8, dtype=torch.float32)
    assert {name: tuple(value.shape) for name, value in narrowed.state_dict().items()} == {
        name: tuple(value.shape) for name, value in pruned.state_dict().items()
    }
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in narrowed.state_dict().items())
    assert torch.equal(narrowed(inputs), pruned(inputs))


def test_all_multiply_accumulates_keep_all_channels():
    assert narrowing_of(nets.small(), IMAGE, 1.0, importance="uniform") == Narrowing()


def test_a_narrow_model_is_saved_and_loaded(tmp_path):
    narrowing = narrowing_of(nets.small(), IMAGE, 0.5, importance=loss)
    plan = Plan.of({"fc1": SVD(3)}, width=0.5, narrowing=narrowing)
    model = factorize_(narrow_(nets.small(), narrowing), plan).eval()
    save_model(tmp_path, plan, weights_of(model))
    inputs = nets.normal(4, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(load_model(nets.small(), tmp_path)(inputs), model(inputs))
    assert Plan.from_json(plan.to_json()).narrowing == narrowing
    check_reloading(nets.small(), nets.small(), plan, inputs)
    assert merge_(model, plan, ["fc1"]) == Plan(width=0.5)
    assert merge_(model, Plan(narrowing=narrowing), []).narrowing == narrowing


def test_a_full_rank_of_a_narrow_net_changes_nothing():
    model = nets.small().double().eval()
    narrow_(model, narrowing_of(model, IMAGE.double(), 0.5, importance="uniform"))
    inputs, rank = nets.normal(4, 1, 8, 8), min(model.fc1.weight.shape)
    factorized = factorize_(copy.deepcopy(model), {"fc1": SVD(rank)})
    assert torch.allclose(factorized(inputs), model(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_nets_of_torchvision(name):
    model = torchvision.models.get_model(name)
    assert why_not_narrowed(model, torch.ones(1, 3, 64, 64)) is None


def test_models_that_cannot_be_narrowed():
    fixed = nets.Net(
        lambda n, x: n.fc(n.conv(x).view(-1, 8, 64).mean(2)), conv=nn.Conv2d(1, 8, 3, padding=1), fc=nn.Linear(8, 3)
    )
    with pytest.raises(ModelError, match=r"The model's channels must be prunable for space.widths below 1, but .* raised"):
        narrowing_of(fixed, IMAGE, 0.5, importance="uniform")
    with pytest.raises(ModelError, match=r"but only 0% of its multiply-accumulates can be removed; use space.widths = "):
        narrowing_of(nn.Conv2d(1, 8, 3), IMAGE, 0.5, importance="uniform")
    with pytest.raises(PlanError, match=r"A width must be above 0 and at most 1, but got 1.5."):
        narrowing_of(nets.small(), IMAGE, 1.5, importance="uniform")


@pytest.mark.parametrize(
    ("narrowing", "message"),
    [
        (Narrowing(((0,),), {"conv3.weight": {0: 0}}), "'conv3.weight' is no parameter or buffer of it. Did you mean"),
        (
            Narrowing(((0, 8),), {"conv1.weight": {0: 0}}),
            r"keeps index 8 in dimension 0 of 'conv1.weight', whose shape is \(8, 1",
        ),
        (Narrowing((), {}, {"conv1": {"width": 3}}), "sets 'width' of 'conv1', which has none"),
    ],
)
def test_a_narrowing_of_another_model(narrowing, message):
    model = nets.small()
    with pytest.raises(PlanError, match=f"A narrowing must fit the model, but {message}"):
        narrow_(model, narrowing)
    assert model.conv1.weight.shape == (8, 1, 3, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "A narrowing must be an object of attributes, kept, tensors, but got 3"),
        ({"kept": 3, "tensors": {}, "attributes": {}}, "A narrowing's 'kept' must be a list of lists, but got 3"),
        ({"kept": [], "tensors": 3, "attributes": {}}, "A narrowing's 'tensors' must be an object of objects, but got 3"),
        ({"kept": [[1, 0]], "tensors": {}, "attributes": {}}, "Kept channels must be different indices in ascending order"),
        (
            {"kept": [], "tensors": {"a": {"0": 0}}, "attributes": {}},
            "A narrowing of 'a' must name a dimension and one of 0 kept sets, but got 0: 0",
        ),
        (
            {"kept": [], "tensors": {}, "attributes": {"a": {"out_channels": 0}}},
            "Attribute 'out_channels' of 'a' must be a whole number of at least 1, but is 0",
        ),
    ],
)
def test_nonsense_is_no_narrowing(data, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({"format": "ranksearch-plan/1", "layers": {}, "narrowing": data})
