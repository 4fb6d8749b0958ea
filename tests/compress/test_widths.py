"""A narrower net has the same architecture and outputs of the same shape."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ranksearch import models
from ranksearch.compress.inventory import count_params
from ranksearch.compress.widths import redraw_, scale_width_
from ranksearch.errors import ModelError
from ranksearch.support.batch import repeat_batch
from tests import nets
from tests.nets import Net

DIGIT, PICTURE = torch.ones(1, 1, 8, 8), torch.ones(1, 4, 6, 5)


def residual():
    return Net(lambda n, x: n.fc((n.conv1(x) + n.conv2(n.conv1(x))).mean((2, 3))), conv1=nn.Conv2d(4, 8, 3, padding=1),
               conv2=nn.Conv2d(8, 8, 3, padding=1), fc=nn.Linear(8, 3))  # fmt: skip


def joined():
    return Net(lambda n, x: n.last(torch.cat([n.a(x), n.b(x), x], 1)), a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(4, 6, 1),
               last=nn.Conv2d(18, 2, 1))  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(8), nn.Conv2d(8, 12, 1, groups=4),
        nn.InstanceNorm2d(12, affine=True), nn.ConvTranspose2d(12, 6, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1, bias=False),
    )  # fmt: skip


def rows():
    return nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


def heads():
    """Two outputs, and a third in training mode, as of an auxiliary classifier."""

    def run(n, x):
        x = n.conv(x).mean((2, 3))
        return (n.one(x), n.two(x), n.auxiliary(x)) if n.training else (n.one(x), n.two(x))

    return Net(run, conv=nn.Conv2d(4, 8, 3), one=nn.Linear(8, 3), two=nn.Linear(8, 5), auxiliary=nn.Linear(8, 7))


CASES = [
    (nets.small, DIGIT), (residual, PICTURE), (joined, PICTURE), (grouped, PICTURE), (rows, PICTURE), (heads, PICTURE),
    (models.lenet, torch.ones(1, 3, 32, 32)), (models.lenet3, torch.ones(1, 3, 32, 32)), (models.nin, torch.ones(1, 3, 32, 32)),
    (models.resnet20, torch.ones(1, 3, 32, 32)), (partial(models.lenet, batch_norm=True), torch.ones(1, 3, 32, 32)),
]  # fmt: skip
each_net = pytest.mark.parametrize(
    ("make", "example"), CASES, ids=[getattr(make, "__name__", "lenet_norm") for make, _ in CASES]
)


def outputs(model, example):
    made = []
    for mode in (False, True):
        result = model.train(mode)(repeat_batch(example, 2))
        made += result if isinstance(result, tuple) else [result]
    return made


@each_net
def test_a_narrower_net_has_outputs_of_the_same_shapes_and_fewer_parameters(make, example):
    dense = make()
    shapes, params = [output.shape for output in outputs(dense, example)], count_params(dense)
    for share in (0.7, 0.3, 0.01):
        net = scale_width_(make(), example, share)
        assert count_params(net) < params
        params = count_params(net)
        net = redraw_(net, seed=0)
        assert [output.shape for output in outputs(net, example)] == shapes
        assert all(torch.isfinite(output).all() for output in outputs(net, example))
        sum(output.square().mean() for output in outputs(net, example)).backward()


@each_net
def test_all_channels_are_the_same_net(make, example):
    net = make()
    state = copy.deepcopy(net.state_dict())
    narrowed = scale_width_(net, example, 1.0).state_dict()
    parameters = dict(net.named_parameters())
    assert state.keys() == narrowed.keys()
    assert all(torch.equal(state[name], narrowed[name]) for name in parameters)


def test_each_layer_keeps_the_share():
    net = scale_width_(nets.small(), DIGIT, 0.5)
    assert (net.conv1.out_channels, net.conv2.in_channels, net.conv2.out_channels) == (4, 4, 8)
    assert (net.norm1.num_features, net.norm1.running_mean.shape) == (4, (4,))
    assert (net.fc1.in_features, net.fc1.out_features, net.fc2.out_features) == (8 * 16, 16, 10)


def test_depthwise_stays_depthwise_and_groups_divide():
    net = scale_width_(grouped(), PICTURE, 0.6)
    assert (net[0].out_channels, net[2].groups, net[2].in_channels) == (5, 5, 5)
    assert net[1].num_groups == 1
    assert (net[4].in_channels, net[4].out_channels, net[4].groups) == (5, 7, 1)


def test_new_weights_keep_the_variance_and_follow_the_seed():
    one, again, other = (redraw_(scale_width_(rows(), PICTURE, 1.0), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one[0].weight, again[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert float(one[3].weight.detach().std()) == pytest.approx((2 / 16) ** 0.5, rel=0.4)
    assert not one[3].bias.any()


def test_modes_of_modules_stay():
    net = nets.small().train()
    net.norm1.eval()
    scale_width_(net, DIGIT, 0.5)
    assert net.training
    assert not net.norm1.training


def tied():
    net = rows()
    net[3] = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[3][1].weight = net[3][0].weight
    return net


def frozen():
    net = nets.small()
    net.fc1.weight.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Net(lambda n, x: n.fc(n.conv(x).mean((2, 3)).view(len(x), 8)), conv=nn.Conv2d(4, 8, 3), fc=nn.Linear(8, 3)),
            r"^A net can only be made narrower if its layers alone fix the numbers of channels, but with fewer channels the "
            r"forward raised RuntimeError: shape '\[2, 8\]' is invalid for input of size .*; read the numbers from the tensors, "
            r"or set controls = 0\.$",
        ),
        (
            lambda: Net(lambda n, x: n.conv(x) + 0 * n.last(n.conv(x)), conv=nn.Conv2d(4, 8, 3), last=nn.Conv2d(8, 1, 1)),
            r"but with fewer channels the outputs changed their shapes from \[\(2, 8, 4, 3\), \(2, 8, 4, 3\)\] to \[\(2, 4, 4, 3\)",
        ),
        (tied, r"if no weights are shared, but '3.0.weight' is also '3.1.weight'; set controls = 0\.$"),
        (frozen, r"all its weights are trainable, but 'fc1.weight' is frozen; call requires_grad_\(\), or set controls = 0\.$"),
    ],
)
def test_a_net_that_cannot_be_made_narrower(make, message):
    with pytest.raises(ModelError, match=message):
        scale_width_(make(), DIGIT if make is frozen else PICTURE, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "regnet_y_400mf"])
def test_nets_of_torchvision(name):
    import torchvision

    net, example = getattr(torchvision.models, name)(num_classes=7), torch.randn(1, 3, 64, 64)
    params = count_params(net)
    assert scale_width_(net, example, 0.5).eval()(example).shape == (1, 7)
    assert 2 < params / count_params(net) < 4.5
