"""How well confidences tell right disparities from wrong ones: loss, AUC and its optimum (Hu and Mordohai 2012).

Outputs are logits, targets 1 where the disparity is right, 0 where it is wrong, and NaN where nobody knows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 20
"""The share of pixels that is kept falls in steps of 5 %."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits of any shape, over the pixels whose target is known."""
    known = ~targets.isnan()
    return F.binary_cross_entropy_with_logits(outputs[known], targets[known])


def one_minus_auc(outputs: Tensor, targets: Tensor) -> float:
    """1 - AUC, averaged over the maps (maps, ...) that hold a known pixel; at best 1 - `optimal_auc`, higher is better."""
    known = ~targets.isnan()
    pairs = zip(outputs, targets, known, strict=True)
    areas = [auc(logits[valid], right[valid]) for logits, right, valid in pairs if valid.any()]
    return 1 - sum(areas) / len(areas) if areas else math.nan


def auc(confidence: Tensor, right: Tensor) -> float:
    """Area under the error rate of one map's pixels (pixels,) as the least confident are left out, 5 % at a time.

    Pixels are kept whose confidence is not below its percentiles 0, 5, .. 95; with none kept the error is taken to be 0;
    trapezoids.
    """
    order = confidence.sort().values
    count = len(order)
    # Not torch.quantile, which refuses more than 16 million pixels and interpolates.
    least = order[[min(count - 1, math.ceil(count * step / STEPS)) for step in range(STEPS)]]
    # Ties at a threshold are kept, all of them: which comes first in memory says nothing.
    sums = F.pad((1 - right.double())[confidence.argsort()].cumsum(0), (1, 0))
    below = torch.searchsorted(order, least)
    errors = (sums[-1] - sums[below]) / (count - below)
    return float(torch.trapezoid(F.pad(errors, (0, 1)), dx=1 / STEPS))


def optimal_auc(error: float) -> float:
    """The area of a confidence that puts every wrong pixel of a map below every right one; `error` is the share of wrong."""
    return error + (1 - error) * math.log(1 - error) if error < 1 else 1.0
