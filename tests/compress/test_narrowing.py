"""Narrower nets have the wanted share of the MACs, equal the nets that Torch-Pruning makes, and survive saving and loading."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ranksearch.compress import narrowing as narrowing_module
from ranksearch.compress.channels import without
from ranksearch.compress.merging import merge_
from ranksearch.compress.narrowing import check_width, narrow_, narrowing_of
from ranksearch.compress.saved import load_model, write_model
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.watch import Watch
from ranksearch.compress.weights import weights_of
from ranksearch.errors import ModelError, PlanError, SpecError
from ranksearch.plan import CP, SVD, Narrowing, Plan
from tests import nets


def residual():
    def run(net, x):
        x = net.first(x).relu()
        return net.fc(net.norm(net.second(x) + x).relu().mean((2, 3)))

    return nets.Net(
        run,
        first=nn.Conv2d(4, 8, 3, padding=1),
        second=nn.Conv2d(8, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        fc=nn.Linear(8, 3),
    )


def concatenated():
    def run(net, x):
        return net.fc(net.last(torch.cat([net.one(x), net.two(x).relu()], 1)).flatten(1))

    return nets.Net(run, one=nn.Conv2d(4, 6, 1), two=nn.Conv2d(4, 10, 1), last=nn.Conv2d(16, 8, 3), fc=nn.Linear(8 * 4 * 3, 5))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 3, groups=2),
        nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(16, 6),
    )  # fmt: skip


def flattened():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 3, 20), nn.ReLU(), nn.Linear(20, 5))


LOSSES = [lambda model: model(torch.cat([nets.IMAGE] * 2)).square().mean()]
MODELS = [residual, concatenated, depthwise, flattened]


def seeded(make):
    torch.manual_seed(3)
    return make().eval()


def macs(model):
    return Watch(model).run(nets.IMAGE)


@pytest.fixture(params=[0.8, 0.5])
def share(request):
    return request.param


@pytest.mark.parametrize("make", MODELS)
def test_a_narrower_net_has_at_most_the_share_and_the_same_outputs_as_torch_pruning_gives(make, share, monkeypatch):
    removed = []
    monkeypatch.setattr(narrowing_module, "without", lambda model, units: removed.append(list(units)) or without(model, units))
    model = seeded(make)
    before = copy.deepcopy(model.state_dict())
    narrowing = narrowing_of(model, nets.IMAGE, share, LOSSES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    narrow = narrow_(copy.deepcopy(model), narrowing)
    assert 0.6 * share < macs(narrow) / macs(model) <= share
    pruned = without(model, removed[-1])
    assert torch.equal(narrow(nets.IMAGE), pruned(nets.IMAGE))
    assert narrow(nets.IMAGE).shape == model(nets.IMAGE).shape
    assert str(narrow) == str(pruned)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.08, 0.02])
def test_whole_blocks_of_channels_are_kept(share):
    model = nn.Sequential(
        nn.Conv2d(4, 48, 3), nn.ReLU(), nn.Conv2d(48, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 12), nn.Linear(12, 7)
    )  # fmt: skip
    narrowing = narrowing_of(model, nets.IMAGE, share, LOSSES, in_blocks=True)
    narrow = narrow_(copy.deepcopy(model), narrowing)
    assert macs(narrow) <= share * macs(model)
    for layer, channels in ((narrow[0], 48), (narrow[2], 20), (narrow[5], 12)):
        kept = layer.weight.shape[0]
        assert kept in {1, 2, 3, 4, 8, 16, 32, channels}
    assert narrow(nets.IMAGE).shape == (1, 7)


@pytest.mark.parametrize("make", MODELS)
def test_the_whole_share_keeps_everything(make):
    model = seeded(make)
    assert narrowing_of(model, nets.IMAGE, 1.0, LOSSES) == Narrowing()
    assert torch.equal(narrow_(copy.deepcopy(model), Narrowing())(nets.IMAGE), model(nets.IMAGE))


@pytest.mark.parametrize("make", MODELS)
def test_json_gives_the_narrowing_back(make):
    plan = Plan.of({}, 0.5, narrowing_of(seeded(make), nets.IMAGE, 0.5, LOSSES))
    back = Plan.from_json(plan.to_json())
    assert back.narrowing == plan.narrowing
    assert back == plan == replace(plan, narrowing=None)
    assert hash(back) == hash(plan)


def test_a_narrower_factorized_net_is_saved_and_loaded(tmp_path):
    narrowing = narrowing_of(seeded(flattened), nets.IMAGE, 0.5, LOSSES)
    plan = Plan.of({"3": CP(3, kernel=(4, 3)), "5": SVD(2)}, 0.5, narrowing)
    model = factorize_(narrow_(seeded(flattened), narrowing), plan)
    write_model(tmp_path, plan, weights_of(model))
    torch.manual_seed(9)
    assert torch.equal(load_model(flattened(), tmp_path)(nets.IMAGE), model(nets.IMAGE))
    left = merge_(model, plan, ["5"])
    assert left.narrowing is narrowing
    write_model(tmp_path, left, weights_of(model))
    assert torch.equal(load_model(flattened(), tmp_path)(nets.IMAGE), model(nets.IMAGE))


def test_at_full_rank_a_factorized_narrower_net_equals_the_narrower_net():
    narrowing = narrowing_of(seeded(flattened), nets.IMAGE, 0.5, LOSSES)
    narrow = narrow_(seeded(flattened), narrowing)
    factorized = factorize_(copy.deepcopy(narrow), Plan.of({"5": SVD(min(narrow[5].weight.shape))}))
    torch.testing.assert_close(factorized(nets.IMAGE), narrow(nets.IMAGE), rtol=1e-4, atol=1e-5)


def test_a_width_without_a_narrowing_cannot_be_loaded(tmp_path):
    write_model(tmp_path, Plan.of({}, 0.5), weights_of(flattened()))
    with pytest.raises(PlanError, match=r"A plan of width 0.5 must hold its narrowing, but that in .* does not; save both"):
        load_model(flattened(), tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (residual, "A narrowing must be made for the model, but the model has no '0.weight'"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 5)),
            r"A narrowing must be made for the model, but it keeps \d+ of 8 channels along dimension 0 of '0.weight', which has the shape",
        ),
    ],
)
def test_a_narrowing_of_another_model(model, message):
    narrowing = narrowing_of(seeded(flattened), nets.IMAGE, 0.5, LOSSES)
    with pytest.raises(PlanError, match=message):
        narrow_(model(), narrowing)


def test_a_narrowing_names_attributes_of_the_model():
    with pytest.raises(PlanError, match=r"A narrowing must be made for the model, but the model has no 0\.channels"):
        narrow_(flattened(), Narrowing(attributes={"0": {"channels": 3}}))


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_shares_are_shares(share):
    with pytest.raises(PlanError, match=f"The share of a narrower net must be above 0 and at most 1, but is {share}"):
        narrowing_of(flattened(), nets.IMAGE, share, LOSSES)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(120, 4)), "no layer has channels that other layers read"),
        (
            lambda: nets.Net(lambda n, x: n.fc(n.conv(x).view(-1, 96)), conv=nn.Conv2d(4, 8, 3), fc=nn.Linear(96, 4)),
            "without one of them it fails .RuntimeError: .*",
        ),
        (
            lambda: nets.Net(lambda n, x: torch.from_numpy(n.conv(x).numpy()).mean((2, 3)), conv=nn.Conv2d(4, 8, 3)),
            "Torch-Pruning cannot follow it .RuntimeError: Can't call numpy.*",
        ),
    ],
)
def test_models_that_cannot_be_narrowed(model, reason):
    with pytest.raises(
        ModelError,
        match=rf"Channels of the model must be removable to make a narrower net, but {reason}; use space.widths = \[1.0\]",
    ):
        narrowing_of(model(), nets.IMAGE, 0.001, LOSSES)


def test_a_width_must_leave_each_layer_a_channel():
    message = (
        r"A width in space.widths must leave each layer a channel, which takes 0\.\d+ of this model's multiply-accumulates, "
        r"but got 0.001; raise it\."
    )
    with pytest.raises(SpecError, match=f"^{message}$"):
        narrowing_of(seeded(flattened), nets.IMAGE, 0.001, LOSSES)
    with pytest.raises(SpecError, match=f"^{message}$"):
        check_width(seeded(flattened), nets.IMAGE, 0.001)
    check_width(seeded(flattened), nets.IMAGE, 0.5)
