"""The sequence of layers that replaces a dense layer: the shapes of their weights, and the torch modules."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ranksearch.methods.layer import CONVOLUTIONS, ORDINARY, TRANSPOSED, Call, Padding, as_weight, groups_of

Shape: TypeAlias = tuple[int, ...]

META_DEVICE = "meta"
"""The device to create parts on. Elsewhere torch would draw initial values, which changes its global random state."""


@dataclass(frozen=True)
class Part:
    """One convolution `into` -> `out` channels of a factorized layer; its weight is one factor of the kernel.

    If the layer has groups, the part has the same number of groups, and `into` and `out` are the channels of one of them.

    Along its `axes` of the kernel (0 and up) it has the dense layer's kernel size, stride, padding and dilation; along other
    axes its size is 1. Each axis of the kernel belongs to exactly one part. If the layer is a transposed convolution, so are
    the parts that have axes.
    """

    name: str
    into: int
    out: int
    axes: tuple[int, ...] = ()
    depthwise: bool = False
    """Each channel by itself; `out` is `into`, or a multiple of it, then each channel has that many kernels."""
    as_matrix: bool = False
    """Only for a first part with all axes: its factor is a matrix, and a fully connected layer need not unflatten its input."""

    def __post_init__(self) -> None:
        if self.depthwise and self.out % self.into:
            raise ValueError(
                f"A depthwise part must have a multiple of its input channels as outputs, but {self.name!r} has {self.into} "
                f"and {self.out}."
            )

    def shape(self, weight: Shape) -> Shape:
        """The factor's shape for a kernel of shape `weight`: (out, into, *sizes of `axes`), or (out, *sizes) if depthwise, or
        (out, into * sizes) if `as_matrix`."""
        channels = (self.out,) if self.depthwise else (self.out, self.into)
        shape = (*channels, *(weight[2 + axis] for axis in self.axes))
        return (self.out, math.prod(shape[1:])) if self.as_matrix else shape

    def module(self, dense: nn.Module, weight: Shape, *, bias: bool) -> nn.Module:
        """The torch module of this part for the layer `dense`, on the device "meta".

        For a Linear seen as a kernel over its whole input map, the convolution has no padding and stride 1.
        """
        if len(weight) == 2:
            return nn.Linear(self.into, self.out, bias=bias, device=META_DEVICE)
        dims, groups = len(weight) - 2, groups_of(dense)
        into, out = groups * self.into, groups * self.out
        if not self.axes:
            return ORDINARY[dims - 1](into, out, 1, groups=groups, bias=bias, device=META_DEVICE)
        kind = TRANSPOSED if isinstance(dense, TRANSPOSED) else ORDINARY
        size, groups = self._along(weight[2:], 1), into if self.depthwise else groups
        return kind[dims - 1](into, out, size, groups=groups, bias=bias, device=META_DEVICE, **self._settings(dense))  # type: ignore[arg-type]

    def _settings(self, dense: nn.Module) -> dict[str, Any]:
        """The settings of the dense layer along the axes of this part."""
        if not isinstance(dense, CONVOLUTIONS):
            return {}
        padding = dense.padding if isinstance(dense.padding, str) else self._along(dense.padding, 0)
        settings = {"stride": self._along(dense.stride, 1), "padding": padding, "dilation": self._along(dense.dilation, 1)}
        if isinstance(dense, TRANSPOSED):
            return settings | {"output_padding": self._along(dense.output_padding, 0)}
        return settings | {"padding_mode": dense.padding_mode}

    def _along(self, values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(value if axis in self.axes else other for axis, value in enumerate(values))


def builders(parts: Sequence[Part]) -> list[int]:
    """For each part, the index of the part that is built with its factor: its own, or that of a neighbour.

    A 1x1 part with as many outputs as inputs is not built: multiplied by its factor, the neighbour's factor keeps its shape. A
    depthwise neighbour takes only a factor of one channel.
    """
    indices: list[int] = []
    for index, part in enumerate(parts):
        neighbour = indices[-1] if indices else 1
        square = part.into == part.out and not part.axes and not part.depthwise
        there = neighbour < len(parts) and neighbour != index
        taken = square and there and (part.into == 1 or not parts[neighbour].depthwise)
        indices.append(neighbour if taken else index)
    return indices


def built(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts that are built."""
    indices = builders(parts)
    return tuple(part for index, part in enumerate(parts) if indices[index] == index)


def built_factors(parts: Sequence[Part], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors of the parts that are built, from those of all parts, multiplied in float64; all of one group."""
    indices, made = builders(parts), list(factors)
    for index, builder in enumerate(indices):
        if builder != index:
            factor, other = factors[index].double(), made[builder].double()
            if parts[builder].depthwise:
                product = factor.reshape(()) * other  # one channel becomes one channel
            elif index > builder:
                product = torch.tensordot(factor, other, 1)
            else:
                product = torch.tensordot(other, factor, ([1], [0])).movedim(-1, 1)
            made[builder] = product.to(factors[index].dtype)
    return tuple(factor for index, factor in enumerate(made) if indices[index] == index)


def map_sizes(parts: Sequence[Part], call: Call) -> list[tuple[int, ...]]:
    """The sizes of the map before the first part and after each part, in a call of the layer."""
    sizes = [call.in_size]
    for part in parts:
        after = enumerate(zip(sizes[-1], call.out_size, strict=True))
        sizes.append(tuple(out if axis in part.axes else size for axis, (size, out) in after))
    return sizes


def assemble(
    module: nn.Module, weight: Shape, parts: Sequence[Part], factors: Sequence[Tensor], padding: Padding | None = None
) -> nn.Sequential:
    """The parts as one `nn.Sequential` with the factors, stacked over the groups, as weights.

    It is on the device and in the dtype of `module`.

    The last part gets the bias of `module`. If `module` is fully connected and stored as convolutions, its input is unflattened
    to a map before the parts, and the output flattened after them. Each part puts the zeros of `padding` around its axes first.
    """
    kernel, bias = module.weight, module.bias
    assert isinstance(kernel, Tensor)
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    as_kernel = isinstance(module, nn.Linear) and len(weight) > 2
    if as_kernel and parts[0].as_matrix:
        parts = [Part(part.name, part.shape(weight)[1], part.out) for part in parts]
        weight, as_kernel = (weight[0], math.prod(weight[1:])), False
    if as_kernel:
        steps["unflatten"] = nn.Unflatten(1, weight[1:])
    for part, factor in zip(parts, factors, strict=True):
        layer = part.module(module, weight, bias=bias is not None and part is parts[-1])
        around = [pair if axis in part.axes else (0, 0) for axis, pair in enumerate(padding or ())]
        if any(map(any, around)):
            steps[f"{part.name}_padding"] = zeros_around(around)
        # Set the final dtype before copying, or values would be rounded to the default dtype in between.
        steps[part.name] = layer.to(kernel.dtype).to_empty(device=kernel.device).requires_grad_(kernel.requires_grad)
        assert isinstance(layer.weight, Tensor)
        with torch.no_grad():
            layer.weight.copy_(as_weight(layer, factor))
    if isinstance(bias, Tensor):
        last = steps[parts[-1].name].bias
        assert isinstance(last, Tensor)
        with torch.no_grad():
            last.copy_(bias)
        last.requires_grad_(bias.requires_grad)
    if as_kernel:
        steps["flatten"] = nn.Flatten()
    return nn.Sequential(steps).train(module.training)


def zeros_around(padding: Sequence[tuple[int, int]]) -> nn.Module:
    """The module that puts these zeros around a map, (before, after) for each axis."""
    kind = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[len(padding) - 1]
    return kind(tuple(count for pair in reversed(padding) for count in pair))  # type: ignore[arg-type]


def composed(parts: Sequence[Part], factors: Sequence[Tensor], weight: Shape) -> Tensor:
    """The kernel of shape `weight` that the parts of one group apply together; the first part is not depthwise."""
    axes = list(parts[0].axes)
    kernel = factors[0].reshape(-1, weight[1], *(weight[2 + axis] for axis in axes))
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        if part.depthwise:
            # kernel (c, in, *axes), factor (n c, *more) -> (n c, in, *axes, *more)
            kernel = kernel.repeat_interleave(part.out // part.into, 0)
            expanded = factor.reshape(len(factor), *(1,) * (kernel.dim() - 1), *factor.shape[1:])
            kernel = kernel.reshape(*kernel.shape, *(1,) * len(part.axes)) * expanded
        else:
            # kernel (c, in, *axes), factor (o, c, *more) -> (o, *more, in, *axes) -> (o, in, *axes, *more)
            count = len(part.axes)
            product = torch.tensordot(factor.movedim(1, -1), kernel, 1)
            kernel = product.movedim(tuple(range(1, 1 + count)), tuple(range(-count, 0)))
        axes += part.axes
    return kernel.permute(0, 1, *(2 + axes.index(axis) for axis in sorted(axes))).reshape(weight)


def has_positions(weight: Shape) -> bool:
    """Whether a kernel (out, in, *kernel) covers more than one position."""
    return math.prod(weight[2:]) > 1


def is_separable(weight: Shape) -> bool:
    """Whether a kernel is 2-D with a height and a width above 1, so that they can be separated."""
    return len(weight) == 4 and min(weight[2:]) > 1


def mixes_channels(weight: Shape) -> bool:
    """Whether a kernel has several channels in or out. A kernel of one channel can only be separated in space."""
    return max(weight[:2]) > 1


def every_axis(weight: Shape) -> tuple[int, ...]:
    """The axes of a kernel (out, in, *kernel) for a `Part` that covers all of its positions."""
    return tuple(range(len(weight) - 2))
