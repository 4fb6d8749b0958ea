"""VGG-16 (Simonyan and Zisserman 2015) in its usual form for CIFAR-10."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(*, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG-16 for images (batch, channels, 32, 32): thirteen 3x3 convolutions with batch normalisation, one FC layer.

    With 3 channels and 10 classes it has 14,728,266 parameters.
    """
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    into = channels
    for stage, widths in enumerate(WIDTHS, start=1):
        for number, out in enumerate(widths, start=1):
            steps[f"conv{stage}_{number}"] = nn.Conv2d(into, out, 3, padding=1)
            steps[f"norm{stage}_{number}"] = nn.BatchNorm2d(out)
            steps[f"relu{stage}_{number}"] = nn.ReLU()
            into = out
        steps[f"pool{stage}"] = nn.MaxPool2d(2)
    steps |= {"flatten": nn.Flatten(), "fc": nn.Linear(512, classes)}
    net = nn.Sequential(steps)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
