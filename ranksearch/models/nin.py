"""Network in Network (Lin, Chen and Yan 2014), as the thesis compressed it."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def nin(*, channels: int = 3, classes: int = 10, batch_norm: bool = True, dropout: float = 0.5) -> nn.Sequential:
    """Network in Network for images (batch, channels, height, width): three convolutions, each followed by two 1x1 ones.

    With 3 channels and 10 classes it has 1,004,042 parameters without `batch_norm`, as in the thesis; `batch_norm` adds 3,200
    parameters, after each convolution but the last.
    """
    steps: OrderedDict[str, nn.Module] = OrderedDict()

    def conv(number: int, into: int, out: int, kernel: int = 1) -> None:
        steps[f"conv{number}"] = nn.Conv2d(into, out, kernel, padding=kernel // 2)
        if batch_norm:
            steps[f"norm{number}"] = nn.BatchNorm2d(out)
        steps[f"relu{number}"] = nn.ReLU()

    conv(1, channels, 192, 5)
    conv(2, 192, 160)
    conv(3, 160, 96)
    steps["pool1"] = nn.MaxPool2d(3, 2, 1)
    steps["dropout1"] = nn.Dropout(dropout)
    conv(4, 96, 192, 5)
    conv(5, 192, 192)
    conv(6, 192, 192)
    steps["pool2"] = nn.AvgPool2d(3, 2, 1)
    steps["dropout2"] = nn.Dropout(dropout)
    conv(7, 192, 192, 3)
    conv(8, 192, 192)
    conv(9, 192, 192)
    steps["conv10"] = nn.Conv2d(192, classes, 1)
    steps["pool3"] = nn.AdaptiveAvgPool2d(1)
    steps["flatten"] = nn.Flatten()
    return nn.Sequential(steps)
