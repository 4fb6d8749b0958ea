"""Copies of modules."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def deep_copy(module: M) -> M:
    """A deep copy of a module, also if it keeps results of autograd as attributes.

    The old `weight_norm`, `spectral_norm` and `prune` keep the weight of the last pass like this, and compute it again in the
    next one; `copy.deepcopy` alone refuses such a tensor.
    """
    values = [value for part in module.modules() for value in vars(part).values()]
    results = {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}
    return copy.deepcopy(module, results)
