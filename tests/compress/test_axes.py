"""The order of the channels behind a flatten is found, however the map was permuted and reshaped before."""

import copy
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranksearch.compress.axes import as_maps
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.saved import load_model, write_model
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.methods import METHODS
from ranksearch.plan import CP, SVD, Plan, Tucker2
from tests.nets import Net

IMAGE = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def behind(between, size=120, **modules):
    return Net(lambda n, x: n.fc(between(n, x)), **modules, fc=nn.Linear(size, 7))


def seen(model, example=IMAGE):
    layer = inventory(model, example)["fc"]
    return layer.weight[1:], layer.order


FOLLOWED = {
    "permute": (lambda n, x: x.permute(0, 2, 3, 1).reshape(len(x), -1), (1, 2, 0)),
    "permute by name": (lambda n, x: torch.permute(input=x, dims=(0, 3, 2, 1)).flatten(1), (2, 1, 0)),
    "transpose": (lambda n, x: x.transpose(1, -1).flatten(1), (2, 1, 0)),
    "transpose in place": (lambda n, x: x.clone().transpose_(1, 2).flatten(1), (1, 0, 2)),
    "movedim": (lambda n, x: torch.flatten(x.movedim(1, -1), 1), (1, 2, 0)),
    "moveaxis": (lambda n, x: torch.moveaxis(x, (1, 2), (3, 1)).flatten(1), (1, 2, 0)),
    "swapaxes": (lambda n, x: x.swapaxes(2, 3).flatten(1), (0, 2, 1)),
    "mT": (lambda n, x: x.mT.flatten(1), (0, 2, 1)),
    "there and back": (lambda n, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).flatten(1), None),
    "memory format": (lambda n, x: x.contiguous(memory_format=torch.channels_last).flatten(1), None),
    "tokens": (lambda n, x: x.flatten(2).transpose(1, 2).flatten(1), (1, 2, 0)),
    "tokens, norm, gelu": (lambda n, x: F.gelu(n.norm(x.flatten(2).mT)).flatten(1), (1, 2, 0)),
    "squeezed and unsqueezed": (lambda n, x: x.unsqueeze(1).squeeze(1).permute(0, 2, 3, 1).flatten(1), (1, 2, 0)),
    "added": (lambda n, x: (x.permute(0, 2, 3, 1) + torch.ones(4)).flatten(1), (1, 2, 0)),
    "relu behind": (lambda n, x: F.relu(x.permute(0, 2, 3, 1).flatten(1)), (1, 2, 0)),
    "channel shuffle": (lambda n, x: x.view(len(x), 2, 2, 6, 5).transpose(1, 2).reshape(len(x), 4, 6, 5).flatten(1), None),
    "linear, channels last": (lambda n, x: n.mix(x.permute(0, 2, 3, 1)).flatten(1), (1, 2, 0)),
    "convolution": (lambda n, x: n.conv(x.transpose(2, 3)).flatten(1), None),
}


@pytest.mark.parametrize(("between", "order"), FOLLOWED.values(), ids=FOLLOWED)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_kernel_has_the_channels_first_and_the_order_is_kept(between, order, batch):
    model = behind(between, norm=nn.LayerNorm(4), mix=nn.Linear(4, 4), conv=nn.Conv2d(4, 4, 1))
    size, found = seen(model, IMAGE.repeat(batch, 1, 1, 1))
    assert found == order
    assert size == ((4, 5, 6) if between is FOLLOWED["convolution"][0] else (4, 6, 5))


NOT_FOLLOWED = {
    "einsum": lambda n, x: torch.einsum("nchw->nhwc", x).reshape(len(x), -1),
    "channels last, then another size": lambda n, x: x.permute(0, 2, 3, 1)[:, 1:, :].flatten(1),
    "channels last, rows mixed": lambda n, x: x.permute(0, 2, 3, 1).flatten(1).flip(1),
    "positions between the channels": lambda n, x: x.view(len(x), 2, 2, 6, 5).permute(0, 1, 3, 2, 4).flatten(1),
    "width folded into the batch": lambda n, x: x.permute(0, 3, 1, 2).reshape(-1, 24),
}


@pytest.mark.parametrize("between", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_what_cannot_be_followed_stays_a_matrix(between):
    with torch.no_grad():
        size = between(None, IMAGE).shape[1]
    assert seen(behind(between, size)) == ((size,), None)


@settings(max_examples=40, deadline=None)
@given(st.permutations([1, 2, 3]), st.integers(1, 3), st.data())
def test_rows_go_back_to_the_map_that_they_were_flattened_from(axes, batch, data):
    shape = [batch, *(data.draw(st.integers(1, 5)) for _ in range(3))]
    maps = torch.randn(shape)
    layer = inventory(behind(lambda n, x: x.permute(0, *axes).flatten(1), prod(shape[1:])), maps)["fc"]
    if not layer.flattened:
        # With one position, a row needs no order.
        assert prod(shape[2:]) == 1
        return
    rows = maps.permute(0, *axes).flatten(1)
    assert torch.equal(as_maps(rows, layer.weight[1:], layer.order), maps)


KERNELS = [method for method in METHODS.values() if method.applies((7, 4, 6, 5), linear=True)]


@pytest.mark.parametrize("method", KERNELS, ids=lambda method: method.kind.method)
@pytest.mark.parametrize("axes", [(2, 3, 1), (3, 1, 2), (2, 1, 3)])
def test_full_rank_is_the_identity_and_the_model_can_be_loaded(method, axes, tmp_path):
    model = behind(lambda n, x: n.drop(x.permute(0, *axes).flatten(1)), drop=nn.Dropout()).eval()
    found = inventory(model, IMAGE)
    layer = found["fc"]
    value = method.value(layer, method.bounds(layer.weight))
    assert value.order == layer.order
    plan = Plan.of({"fc": value})
    assert Plan.from_json(plan.to_json()) == plan
    small = factorize_(copy.deepcopy(model), plan)
    inputs = torch.randn(3, 4, 6, 5)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-3, atol=1e-4)
    write_model(tmp_path, plan, weights_of(small))
    assert torch.equal(load_model(model, tmp_path)(inputs), small(inputs))


def test_data_aware_factors_are_those_of_the_same_net_with_its_channels_first():
    first = behind(lambda n, x: x.flatten(1)).eval()
    last = behind(lambda n, x: x.permute(0, 2, 3, 1).flatten(1)).eval()
    with torch.no_grad():
        last.fc.weight.copy_(as_maps(first.fc.weight, (4, 6, 5), None).permute(0, 2, 3, 1).flatten(1))
        last.fc.bias.copy_(first.fc.bias)
    inputs = torch.randn(64, 4, 6, 5)
    torch.testing.assert_close(last(inputs), first(inputs))
    methods, made = [METHODS[kind] for kind in (Tucker2, CP, SVD)], []
    for model in (first, last):
        found = inventory(model, IMAGE)
        layers = profile(model, found, {"fc": methods}, inputs=inputs)
        for method in methods:
            plan = Plan.of({"fc": method.value(found["fc"], tuple(min(3, b) for b in method.bounds((7, 4, 6, 5))))})
            factors = layers.factors(plan)
            small = factorize_(
                copy.deepcopy(model), plan, factors=factors, bias_corrections=layers.bias_corrections(plan, factors)
            )
            made.append(small(inputs))
    half = len(made) // 2
    torch.testing.assert_close(made[half:], made[:half], rtol=1e-3, atol=1e-4)
