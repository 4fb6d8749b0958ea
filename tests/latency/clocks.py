"""Functions that stand for devices: they count instead of measuring, so that times are the same each time."""

from __future__ import annotations

import math

from torch import nn

from ranksearch.compress.inventory import count_macs, count_params
from ranksearch.methods.layer import CONVOLUTIONS
from ranksearch.support.nesting import tensors_in


def counting(module: nn.Module, inputs: object) -> float:
    """A hundredth of a millisecond a convolution or product, and a nanosecond a multiply-accumulate."""
    layers = sum(isinstance(part, (*CONVOLUTIONS, nn.Linear)) for part in module.modules())
    return 0.01 * layers + 1e-6 * count_macs(module, inputs) + 0.001 * len(tensors_in(inputs))


def streaming(module: nn.Module, inputs: object) -> float:
    """As `counting`, where weights must be read from memory unless a layer is timed by itself."""
    read = 0.0 if len(list(module.children())) < 4 else 1e-6 * count_params(module)
    return counting(module, inputs) + read


def broken(module: nn.Module, inputs: object) -> float:
    """A device that gives no time."""
    return math.nan


def silent(module: nn.Module, inputs: object) -> None:
    """A device that gives nothing."""
