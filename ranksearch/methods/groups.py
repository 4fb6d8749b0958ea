"""The groups of a convolution's channels. Each group has a kernel of its own, which is decomposed alone, at the same ranks.

The kernels of all groups are stacked along their first axis, and so are the factors, as torch does with weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ranksearch.methods.parts import Shape


def shape_of_group(shape: Shape, groups: int) -> Shape:
    """The shape of one group's tensor, from that of the stack."""
    return (shape[0] // groups, *shape[1:])


def shape_of_stack(shape: Shape, groups: int) -> Shape:
    """The shape of the stack, from that of one group's tensor."""
    return (shape[0] * groups, *shape[1:])


def split(factors: Sequence[Tensor], groups: int) -> list[tuple[Tensor, ...]]:
    """The factors of each group, from those of all groups."""
    return list(zip(*(factor.tensor_split(groups) for factor in factors), strict=True))


def stack(groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The inverse of `split`."""
    return tuple(groups[0]) if len(groups) == 1 else tuple(torch.cat(factors) for factors in zip(*groups, strict=True))


def joint_errors(errors: Sequence[Sequence[float]], norms: Sequence[float]) -> list[float]:
    """The relative errors of several kernels together, from those of each and the kernels' norms."""
    if len(norms) == 1:
        return list(errors[0])
    whole = math.hypot(*norms) or 1.0  # every rank represents a kernel of zeros exactly
    lost = [[error * norm for error, norm in zip(each, norms, strict=True)] for each in zip(*errors, strict=True)]
    return [math.hypot(*each) / whole for each in lost]
