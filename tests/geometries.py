"""Models with a layer called `layer`, for every geometry that a method can store, and helpers to compare them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import OrderedDict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.compress.inventory import inventory
from ranksearch.methods import METHODS
from ranksearch.methods.layer import as_kernel
from tests.nets import normal


class Frames(nn.Module):
    """Applies a convolution to each frame of a (batch, frames, channels, height, width) input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        frames = self.layer(inputs.flatten(0, 1))
        return frames.reshape(*inputs.shape[:2], *frames.shape[1:])


def alone(layer):
    return nn.Sequential(OrderedDict(layer=layer))


def behind_flatten(*size, out=6, bias=True):
    layer = nn.Linear(int(torch.Size(size).numel()), out, bias=bias)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), layer=layer)), size


KERNEL_1D, KERNEL_2D, KERNEL_3D = {"tucker2", "cp"}, {"spatial", "tucker2", "cp", "cp4", "tt"}, {"tucker2", "cp"}
DEPTHWISE = {"spatial"}
CONV1D, CONV2D, CONV3D, SAME = (4, 11), (4, 9, 8), (3, 6, 7, 5), {"padding": "same"}
# id: (model, size of one input, methods that can store its layer)
GEOMETRIES = {
    "conv1d": (alone(nn.Conv1d(4, 6, 3)), CONV1D, KERNEL_1D),
    "conv1d strided": (alone(nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2, bias=False)), CONV1D, KERNEL_1D),
    "conv1d circular": (alone(nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular")), CONV1D, KERNEL_1D),
    "conv1d 1": (alone(nn.Conv1d(4, 6, 1, stride=3)), CONV1D, {"svd"}),
    "conv2d": (alone(nn.Conv2d(4, 6, 3, padding=1)), CONV2D, KERNEL_2D),
    "conv2d no bias": (alone(nn.Conv2d(4, 6, 3, bias=False)), CONV2D, KERNEL_2D),
    "conv2d one input": (alone(nn.Conv2d(1, 6, 3)), (1, 9, 8), KERNEL_2D),
    "conv2d three inputs": (alone(nn.Conv2d(3, 8, 3, stride=2, padding=1)), (3, 9, 8), KERNEL_2D),
    "conv2d patches": (alone(nn.Conv2d(3, 6, 4, stride=4)), (3, 8, 12), KERNEL_2D),
    "conv2d one output": (alone(nn.Conv2d(4, 1, 3)), CONV2D, KERNEL_2D),
    "conv2d asymmetric stride": (alone(nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(0, 2))), CONV2D, KERNEL_2D),
    "conv2d asymmetric dilation": (alone(nn.Conv2d(4, 6, 3, dilation=(1, 3), padding=(1, 3))), CONV2D, KERNEL_2D),
    "conv2d 3x5": (alone(nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(1, 0))), CONV2D, KERNEL_2D),
    "conv2d 1x3": (alone(nn.Conv2d(4, 6, (1, 3), padding=(0, 1))), CONV2D, {"tucker2", "cp"}),
    "conv2d same": (alone(nn.Conv2d(4, 6, (3, 5), **SAME, dilation=(2, 1))), CONV2D, KERNEL_2D),
    "conv2d same even": (alone(nn.Conv2d(4, 6, (2, 4), **SAME)), CONV2D, KERNEL_2D),
    "conv2d same reflect": (alone(nn.Conv2d(4, 6, (2, 3), **SAME, padding_mode="reflect")), CONV2D, KERNEL_2D),
    "conv2d valid": (alone(nn.Conv2d(4, 6, 3, padding="valid")), CONV2D, KERNEL_2D),
    "conv2d reflect": (alone(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect")), CONV2D, KERNEL_2D),
    "conv2d replicate": (alone(nn.Conv2d(4, 6, 3, stride=2, padding=2, padding_mode="replicate")), CONV2D, KERNEL_2D),
    "conv2d circular": (alone(nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular")), CONV2D, KERNEL_2D),
    "conv2d 1x1": (alone(nn.Conv2d(4, 6, 1, bias=False)), CONV2D, {"svd"}),
    "conv2d 1x1 strided": (alone(nn.Conv2d(4, 6, 1, stride=(2, 3), padding=1)), CONV2D, {"svd"}),
    "conv2d of frames": (Frames(nn.Conv2d(4, 6, 3)), (5, *CONV2D), KERNEL_2D),
    "conv3d": (alone(nn.Conv3d(3, 5, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 1))), CONV3D, KERNEL_3D),
    "conv3d replicate": (alone(nn.Conv3d(3, 5, 3, padding=1, padding_mode="replicate", bias=False)), CONV3D, KERNEL_3D),
    "conv3d 1": (alone(nn.Conv3d(3, 5, 1)), CONV3D, {"svd"}),
    "conv1d 2 groups": (alone(nn.Conv1d(4, 6, 3, groups=2)), CONV1D, KERNEL_1D),
    "conv1d 4 groups strided": (alone(nn.Conv1d(4, 8, 5, 2, 3, 2, groups=4, bias=False)), CONV1D, KERNEL_1D),
    "conv1d 2 groups circular": (alone(nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", groups=2)), CONV1D, KERNEL_1D),
    "conv2d 2 groups": (alone(nn.Conv2d(4, 6, 3, padding=1, groups=2)), CONV2D, KERNEL_2D),
    "conv2d 4 groups": (alone(nn.Conv2d(8, 12, 3, (2, 1), (0, 2), (1, 2), groups=4, bias=False)), (8, 9, 8), KERNEL_2D),
    "conv2d 2 groups same reflect": (
        alone(nn.Conv2d(4, 6, (2, 3), **SAME, padding_mode="reflect", groups=2)),
        CONV2D,
        KERNEL_2D,
    ),
    "conv2d 2 groups 1x1 strided": (alone(nn.Conv2d(4, 6, 1, stride=(2, 3), padding=1, groups=2)), CONV2D, {"svd"}),
    "conv2d 4 groups of one input": (alone(nn.Conv2d(4, 8, 3, groups=4)), CONV2D, KERNEL_2D),
    "conv2d 2 groups of one output": (alone(nn.Conv2d(4, 2, 3, groups=2)), CONV2D, KERNEL_2D),
    "conv2d 2 groups of frames": (Frames(nn.Conv2d(4, 6, 3, groups=2)), (5, *CONV2D), KERNEL_2D),
    "conv2d depthwise": (alone(nn.Conv2d(4, 4, 5, padding=2, groups=4)), CONV2D, DEPTHWISE),
    "conv2d depthwise strided": (alone(nn.Conv2d(4, 4, (5, 7), (1, 2), (0, 3), groups=4, bias=False)), CONV2D, DEPTHWISE),
    "conv3d 2 groups": (
        alone(nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 1), groups=2)),
        (4, 6, 7, 5),
        KERNEL_3D,
    ),
    "transposed 1d": (alone(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)), CONV1D, KERNEL_1D),
    "transposed 1d dilated": (alone(nn.ConvTranspose1d(4, 6, 5, 2, padding=3, dilation=2, bias=False)), CONV1D, KERNEL_1D),
    "transposed": (alone(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)), CONV2D, KERNEL_2D),
    "transposed stride 1": (alone(nn.ConvTranspose2d(4, 6, 3, padding=2, bias=False)), CONV2D, KERNEL_2D),
    "transposed patches": (alone(nn.ConvTranspose2d(6, 3, 2, stride=2)), (6, 4, 5), KERNEL_2D),
    "transposed 2x2 of stride 3": (alone(nn.ConvTranspose2d(4, 6, 2, stride=3)), CONV2D, KERNEL_2D),
    "transposed 3x5": (alone(nn.ConvTranspose2d(4, 6, (3, 5), (3, 1), (1, 0), (2, 0), dilation=(1, 2))), CONV2D, KERNEL_2D),
    "transposed one output": (alone(nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1, bias=False)), CONV2D, KERNEL_2D),
    "transposed of a point": (alone(nn.ConvTranspose2d(8, 5, 3, bias=False)), (8, 1, 1), KERNEL_2D),
    "transposed 1x1": (alone(nn.ConvTranspose2d(4, 6, 1, stride=2)), CONV2D, {"svd"}),
    "transposed 2 groups": (alone(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)), CONV2D, KERNEL_2D),
    "transposed 4 groups": (alone(nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=4, bias=False)), (8, 4, 3), KERNEL_2D),
    "transposed depthwise": (alone(nn.ConvTranspose2d(4, 4, 6, stride=2, padding=2, groups=4)), CONV2D, DEPTHWISE),
    "transposed of frames": (Frames(nn.ConvTranspose2d(4, 6, 3, stride=2)), (5, 4, 3, 2), KERNEL_2D),
    "transposed 3d": (alone(nn.ConvTranspose3d(3, 5, (3, 2, 1), (1, 2, 1), (1, 0, 0))), (3, 4, 3, 2), KERNEL_3D),
    "transposed 3d groups": (alone(nn.ConvTranspose3d(4, 6, 3, 2, 1, (0, 1, 1), groups=2)), (4, 3, 2, 3), KERNEL_3D),
    "linear": (alone(nn.Linear(9, 6)), (9,), {"svd"}),
    "linear no bias": (alone(nn.Linear(5, 8, bias=False)), (5,), {"svd"}),
    "linear as large as its SVD of half the rank": (alone(nn.Linear(4, 4)), (4,), {"svd"}),
    "linear of positions": (alone(nn.Linear(9, 6)), (7, 9), {"svd"}),
    "linear of a grid": (alone(nn.Linear(4, 6)), (3, 5, 4), {"svd"}),
    "linear behind a map": (*behind_flatten(4, 3, 5), {"svd"} | KERNEL_2D),
    "linear behind a sequence": (*behind_flatten(4, 5, bias=False), {"svd"} | KERNEL_1D),
    "linear behind a volume": (*behind_flatten(3, 2, 3, 2), {"svd"} | KERNEL_3D),
    "linear behind a column": (*behind_flatten(4, 5, 1), {"svd", "tucker2", "cp"}),
    "linear behind a point": (*behind_flatten(4, 1, 1), {"svd"}),
}
BY_NAME = {kind.method: method for kind, method in METHODS.items()}
# Every geometry with one method, the methods in turn, plus every method with the plain geometries.
PLAIN_GEOMETRIES = {
    "conv1d", "conv2d", "conv2d 2 groups", "conv2d depthwise", "conv3d", "transposed", "transposed 2 groups", "transposed 3d",
    "linear", "linear behind a map",
}  # fmt: skip
IN_TURN = {(geometry, sorted(names)[at % len(names)]) for at, (geometry, (*_, names)) in enumerate(GEOMETRIES.items())}
PAIRS = [
    (geometry, name)
    for geometry, (*_, names) in GEOMETRIES.items()
    for name in sorted(names)
    if geometry in PLAIN_GEOMETRIES or (geometry, name) in IN_TURN
]


def fitting(layer):
    return [method for method in METHODS.values() if method.applies(layer.weight, linear=layer.kind == "Linear")]


def prepared(model, size, seed=0):
    """The model in float64 with fixed weights, one input, and the layer called `layer`."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + number))
    inputs = normal(1, *size, seed=seed + 9)
    return model, inputs, inventory(model, inputs)["layer"]


def kernels_of(model, layer):
    """The kernel of each group of the layer."""
    return as_kernel(model.layer, model.layer.weight.detach()).reshape(layer.groups, *layer.weight).unbind()


@functools.cache
def _prepared(geometry):
    model, size, _ = GEOMETRIES[geometry]
    return prepared(model, size)


def given_geometry(geometry):
    """A copy of the model in float64 with fixed weights, one input, and the layer called `layer`."""
    model, inputs, layer = _prepared(geometry)
    return copy.deepcopy(model), inputs.clone(), layer


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8 * float(wanted.detach().abs().max()))


def some_ranks(method, layer):
    """Rank 1, half and full rank; of two ranks all combinations, of three a third of them, which hold all pairs."""
    levels = [sorted({1, (bound + 1) // 2, bound}) for bound in method.bounds(layer.weight)]
    places = itertools.product(*(range(len(ranks)) for ranks in levels))
    chosen = [place for place in places if len(levels) < 3 or min(map(len, levels)) < 3 or sum(place) % 3 == 0]
    return [tuple(ranks[at] for ranks, at in zip(levels, place, strict=True)) for place in chosen]


def counted_macs(model, inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2
