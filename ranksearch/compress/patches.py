"""The input patches of a convolution: the values that each of its outputs is computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.methods.layer import TRANSPOSED, Conv, PlainConv, Transposed


def patches(module: Conv, inputs: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """The patches (count, in, *kernel) of inputs (batch, in, *size) at some positions of the output.

    An output, without the bias, is the sum of kernel times patch; also that of a transposed convolution.

    Args:
        module: the convolution.
        inputs: a batch of its inputs.
        draw: from the number of positions of the output, the indices of those to take.
    """
    if isinstance(module, TRANSPOSED):
        views, strides = _spread(module, inputs), (1,) * len(module.stride)
    else:
        views, strides = _padded(module, inputs), module.stride
    for axis, (size, step, apart) in enumerate(zip(module.kernel_size, strides, module.dilation, strict=True)):
        views = views.unfold(2 + axis, apart * (size - 1) + 1, step)[..., ::apart]
    sizes = views.shape[2 : 2 + len(strides)]
    places: list[Any] = list(torch.unravel_index(draw(math.prod(sizes)), sizes))
    taken = views[:, :, *places].transpose(1, 2).flatten(0, 1)
    return taken.flip(tuple(range(2, taken.dim()))) if isinstance(module, TRANSPOSED) else taken


def _padded(module: PlainConv, inputs: Tensor) -> Tensor:
    """The inputs with the convolution's padding."""
    amounts: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        around = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if isinstance(module.padding, str):
            amounts += [around // 2, around - around // 2] if module.padding == "same" else [0, 0]
        else:
            amounts += [module.padding[axis]] * 2
    return F.pad(inputs, amounts, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def _spread(module: Transposed, inputs: Tensor) -> Tensor:
    """The inputs with zeros in between and around, of which a convolution with the reversed kernel computes the same."""
    sizes = [step * (size - 1) + 1 for step, size in zip(module.stride, inputs.shape[2:], strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *sizes)
    spread[:, :, *(slice(None, None, step) for step in module.stride)] = inputs
    amounts: list[int] = []
    for axis in reversed(range(len(sizes))):
        before = module.dilation[axis] * (module.kernel_size[axis] - 1) - int(module.padding[axis])
        amounts += [before, before + module.output_padding[axis]]
    return F.pad(spread, amounts)  # negative amounts crop
