"""CCNN, which predicts the confidence of each disparity of a stereo map (Poggi and Mattoccia 2016), dense and of TD blocks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ranksearch.models.td import td_conv
from ranksearch.plan import CP4, SVD


def ccnn() -> nn.Sequential:
    """CCNN for disparities (batch, 1, height, width), with 128,125 parameters.

    It outputs logits (batch, 1, height - 8, width - 8), each from a patch of 9x9 pixels.
    """
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, 5):
        steps[f"conv{number}"] = nn.Conv2d(1 if number == 1 else 64, 64, 3)
        steps[f"relu{number}"] = nn.ReLU()
    steps |= {
        "fc1": nn.Conv2d(64, 100, 1),
        "relu5": nn.ReLU(),
        "fc2": nn.Conv2d(100, 100, 1),
        "relu6": nn.ReLU(),
        "fc3": nn.Conv2d(100, 1, 1),
    }
    return nn.Sequential(steps)


def td_ccnn(*, rank: int = 40, pointwise_rank: int = 0) -> nn.Sequential:
    """CCNN made of TD blocks without normalisation, as in the thesis: 36,357 parameters, or 27,277 with `pointwise_rank` 20.

    Args:
        rank: rank of the four 3x3 blocks.
        pointwise_rank: rank of the first two 1x1 convolutions; 0 leaves them dense.
    """
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, 5):
        steps[f"conv{number}"] = td_conv(1 if number == 1 else 64, 64, 3, CP4(rank), norm="none")
    for number, into in ((1, 64), (2, 100)):
        if pointwise_rank:
            steps[f"fc{number}"] = td_conv(into, 100, 1, SVD(pointwise_rank), norm="none")
        else:
            steps[f"fc{number}"] = nn.Conv2d(into, 100, 1)
            steps[f"relu{number + 4}"] = nn.ReLU()
    steps["fc3"] = nn.Conv2d(100, 1, 1)
    return nn.Sequential(steps)
