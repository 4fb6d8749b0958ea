"""Loss, score and pictures of confidences of disparities: cross-entropy, AUC and the optimal AUC (Hu and Mordohai 2012).

Outputs are logits. Targets are 1 for a right disparity, 0 for a wrong one, and NaN where the truth is not known.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ranksearch.data.colours import coloured, in_gray

AUC_STEPS = 20
"""The number of steps in which the share of kept pixels falls from 1 to 0, each by 5 %."""
RIGHT, WRONG = (255, 255, 255), (214, 51, 51)
"""The colours of right and wrong disparities; those that are not known are black."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits of any shape over the pixels with a known target."""
    known = ~targets.isnan()
    return F.binary_cross_entropy_with_logits(outputs[known], targets[known])


def one_minus_auc(outputs: Tensor, targets: Tensor) -> float:
    """1 - AUC, averaged over the maps (maps, ...) with known pixels. Higher is better; the best is 1 - `optimal_auc`."""
    known = ~targets.isnan()
    pairs = zip(outputs, targets, known, strict=True)
    areas = [auc(logits[valid], right[valid]) for logits, right, valid in pairs if valid.any()]
    return 1 - sum(areas) / len(areas) if areas else math.nan


def auc(confidence: Tensor, right: Tensor) -> float:
    """Area under the error rate of one map's pixels (pixels,) while the least confident are left out, 5 % at a time.

    Step by step, pixels with a confidence below its percentile 0, 5, .. 95 are left out. At the end, with no pixels, the error
    rate counts as 0. Integrated by trapezoids.
    """
    order = confidence.sort().values
    count = len(order)
    # Not by torch.quantile, which interpolates, and raises for more than 16 million pixels.
    thresholds = order[[min(count - 1, math.ceil(count * step / AUC_STEPS)) for step in range(AUC_STEPS)]]
    # Pixels tied at a threshold are all kept, since their order in memory means nothing.
    sums = F.pad((1 - right.double())[confidence.argsort()].cumsum(0), (1, 0))
    below = torch.searchsorted(order, thresholds)
    errors = (sums[-1] - sums[below]) / (count - below)
    return float(torch.trapezoid(F.pad(errors, (0, 1)), dx=1 / AUC_STEPS))


def optimal_auc(error: float) -> float:
    """The AUC of a confidence that ranks all right pixels of a map above its wrong ones; `error` is the share of wrong ones."""
    return error + (1 - error) * math.log(1 - error) if error < 1 else 1.0


def show(kind: str, value: Tensor) -> NDArray[np.uint8]:
    """A disparity map, its target or the confidence of one map (1, height, width) as a picture (height, width, 3).

    Disparities go from dark violet to the largest, yellow; targets are white where right, red where wrong; confidences go from
    black to white.
    """
    (pixels,) = value
    if kind == "input":
        return coloured(pixels / pixels.max().clamp_min(1e-6))
    if kind == "output":
        return in_gray(pixels.sigmoid())
    picture = np.zeros((*pixels.shape, 3), np.uint8)
    picture[(pixels == 1).numpy()] = RIGHT
    picture[(pixels == 0).numpy()] = WRONG
    return picture
