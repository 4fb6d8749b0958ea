"""The residual networks for CIFAR-10 (He et al. 2016), with 6n + 2 layers and shortcuts without parameters."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block of two 3x3 convolutions. With stride 2, the shortcut takes every other pixel of the input."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(inputs)))))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        # The shortcut's additional channels are zero, half of them on either side: option A of the paper.
        added = residual.shape[1] - shortcut.shape[1]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, added // 2, added - added // 2))
        result: Tensor = self.relu2(residual + shortcut)
        return result


def _resnet(blocks: int, channels: int, classes: int) -> nn.Sequential:
    steps: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, 16, 3, padding=1, bias=False), norm=nn.BatchNorm2d(16), relu=nn.ReLU()
    )
    into = 16
    for stage, out in enumerate((16, 32, 64), start=1):
        for number in range(1, blocks + 1):
            steps[f"stage{stage}_{number}"] = Block(into, out, 2 if stage > 1 and number == 1 else 1)
            into = out
    steps |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(64, classes)}
    net = nn.Sequential(steps)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def resnet20(*, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """ResNet-20 for images (batch, channels, 32, 32): 269,722 parameters with 3 channels and 10 classes."""
    return _resnet(3, channels, classes)


def resnet56(*, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """ResNet-56 for images (batch, channels, 32, 32): 853,018 parameters with 3 channels and 10 classes."""
    return _resnet(9, channels, classes)
