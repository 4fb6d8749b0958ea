"""The built-in models have the parameter counts of their sources, and TD blocks equal the convolutions they replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ranksearch.compress.inventory import count_params, inventory
from ranksearch.errors import ModelError
from ranksearch.methods import METHODS
from ranksearch.models import ccnn, lenet, lenet3, nin, residual_lenet, resnet20, resnet56, td_ccnn, td_conv, td_lenet, vgg16
from ranksearch.plan import CP, CP4, SVD, TT, Dense, Spatial, Tucker2
from ranksearch.references import resolve


@pytest.mark.parametrize(
    ("model", "params", "image", "output", "decomposable"),
    [
        (lenet, 1_250_858, (3, 32, 32), (10,), 6),
        (lambda: lenet(batch_norm=True), 1_252_266, (3, 32, 32), (10,), 6),
        (lenet3, 1_415_498, (3, 32, 32), (10,), 6),
        (residual_lenet, 482_730, (3, 32, 32), (10,), 10),
        (lambda: nin(batch_norm=False), 1_004_042, (3, 32, 32), (10,), 10),
        (nin, 1_007_242, (3, 32, 32), (10,), 10),
        (ccnn, 128_125, (1, 9, 9), (1, 1, 1), 7),
        (td_lenet, 27_224, (3, 32, 32), (10,), 11),
        (td_ccnn, 36_357, (1, 9, 9), (1, 1, 1), 11),
        (lambda: td_ccnn(pointwise_rank=20), 27_277, (1, 9, 9), (1, 1, 1), 13),
        (resnet20, 269_722, (3, 32, 32), (10,), 20),
        (resnet56, 853_018, (3, 32, 32), (10,), 56),
        (vgg16, 14_728_266, (3, 32, 32), (10,), 14),
    ],
)
def test_parameter_counts(model, params, image, output, decomposable):
    net = model()
    found = inventory(net, torch.zeros(1, *image))
    assert found.params == count_params(net) == params
    assert len(found.layers) == decomposable
    with torch.no_grad():
        assert net.eval()(torch.zeros(2, *image)).shape == (2, *output)


def test_a_study_can_name_torchvisions_models():
    net = resolve("torchvision.models:resnet18", key="task.model")(num_classes=10)
    assert len(inventory(net, torch.zeros(1, 3, 64, 64)).layers) == 21


def test_the_ccnn_runs_over_whole_maps():
    """Each pixel of the output equals the output for the patch around it."""
    net = ccnn().eval()
    whole = torch.rand(1, 1, 20, 30)
    with torch.no_grad():
        found = net(whole)
        assert found.shape == (1, 1, 12, 22)
        torch.testing.assert_close(net(whole[:, :, 5:14, 11:20])[0, 0, 0, 0], found[0, 0, 5, 11])


@pytest.mark.parametrize("value", [CP(5), CP4(5), Tucker2(4, 5), Spatial(5), TT(4, 5, 6)], ids=str)
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_a_td_block_stands_for_its_convolution(value, stride, padding):
    block = td_conv(6, 8, 3, value, stride=stride, padding=padding, norm="none")
    conv = nn.Conv2d(6, 8, 3, stride=stride, padding=padding)
    inputs = torch.rand(2, 6, 9, 9)
    assert block(inputs).shape == conv(inputs).shape
    shapes = METHODS[type(value)].factor_shapes((8, 6, 3, 3), value.ranks)
    weights = [p for name, p in block.named_parameters() if name.endswith("weight")]
    assert [p.numel() for p in weights] == [torch.Size(shape).numel() for shape in shapes]


def test_a_td_block_begins_with_no_convolution_that_a_neighbour_can_do():
    block = td_conv(1, 8, 3, Tucker2(1, 4))
    assert [name for name, _ in block.named_children()] == ["core", "core_norm", "expand", "expand_norm", "activation"]
    assert block(torch.rand(2, 1, 5, 5)).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("value", [CP(16), CP4(16), Tucker2(16, 16)])
@pytest.mark.parametrize("norm", ["all", "inner", "none"])
def test_td_blocks_keep_the_scale_of_their_input(value, norm):
    """Four layers in a row. torch's own initialisation keeps a third of the variance in each layer, so almost none at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(*(td_conv(64, 64, 3, value, padding=1, norm=norm) for _ in range(4)))
    with torch.no_grad():
        scale = net(torch.randn(8, 64, 16, 16)).pow(2).mean().sqrt()
    assert 0.2 < scale < 3


def test_normalisation_where_it_is_asked_for():
    def norms(norm):
        block = td_conv(6, 8, 3, CP4(5), norm=norm)
        return [type(module).__name__ for module in block].count("BatchNorm2d")

    assert (norms("all"), norms("inner"), norms("none")) == (4, 3, 0)
    assert [type(m) for m in td_conv(6, 8, 3, CP(5), activation=nn.Tanh)][-1] is nn.Tanh
    assert sum(isinstance(m, nn.ReLU) for m in td_conv(6, 8, 3, CP(5)).modules()) == 1


def test_a_residual_block_adds_its_input():
    block = td_conv(6, 6, 3, CP(4), padding=1, norm="none", residual=True)
    inputs = torch.rand(2, 6, 5, 5)
    torch.testing.assert_close(block(inputs), torch.relu(inputs + block.block.block(inputs)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((6, 8, 3, CP(4)), {"norm": "al"}, "norm must be one of all, inner, none, but got 'al'. Did you mean 'all'?"),
        ((6, 8, 3, CP(4)), {"padding": 1, "residual": True}, "A residual block must keep the shape of its input, but got 6 -> 8 channels"),
        ((6, 6, 3, CP(4)), {"residual": True}, "stride 1 and padding 0 around a kernel of 3"),
        ((6, 8, 1, Spatial(4)), {}, "A TD block needs a factorization that can store its kernel, but got spatial SVD 4 for 1x1"),
        ((6, 8, 3, SVD(4)), {}, "A TD block needs a factorization that can store its kernel, but got SVD 4 for 3x3"),
        ((6, 8, 3, Dense()), {}, "A TD block needs a factorization that can store its kernel, but got dense for 3x3"),
    ],
)  # fmt: skip
def test_blocks_that_are_refused(arguments, options, message):
    with pytest.raises(ModelError, match=message):
        td_conv(*arguments, **options)
