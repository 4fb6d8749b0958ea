"""The LeNets of the thesis (Salman, University of Bologna, 2018): two dense ones, one made of TD blocks, and a residual one."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ranksearch.models.td import Residual, td_conv
from ranksearch.plan import CP4


def lenet(*, channels: int = 3, classes: int = 10, dropout: float = 0.25, batch_norm: bool = False) -> nn.Sequential:
    """LeNet for images (batch, channels, 32, 32): 32, 32, pool, 64, 64, pool, FC 512, FC classes; paddings 1, 0, 1, 0.

    With 3 channels and 10 classes it has 1,250,858 parameters (Salman, University of Bologna, 2018), and 1,408 more with
    `batch_norm`, which adds batch normalisation after each layer but the last.
    """
    steps: OrderedDict[str, nn.Module] = OrderedDict()

    def behind(number: int, norm: nn.Module) -> None:
        if batch_norm:
            steps[f"norm{number}"] = norm
        steps[f"relu{number}"] = nn.ReLU()

    for number, (into, out) in enumerate([(channels, 32), (32, 32), (32, 64), (64, 64)], start=1):
        steps[f"conv{number}"] = nn.Conv2d(into, out, 3, padding=number % 2)
        behind(number, nn.BatchNorm2d(out))
        if number % 2 == 0:
            steps[f"pool{number // 2}"] = nn.MaxPool2d(2)
            steps[f"dropout{number // 2}"] = nn.Dropout(dropout)
    steps["flatten"] = nn.Flatten()
    steps["fc1"] = nn.Linear(64 * 6 * 6, 512)
    behind(5, nn.BatchNorm1d(512))
    steps["dropout3"] = nn.Dropout(dropout)
    steps["fc2"] = nn.Linear(512, classes)
    return nn.Sequential(steps)


def lenet3(*, channels: int = 3, classes: int = 10, dropout: float = 0.25) -> nn.Sequential:
    """The thesis's other LeNet, for images (batch, channels, 32, 32), with 1,415,498 parameters for 3 channels and 10 classes.

    Layers: 5x5 convolutions with 96, 128 and 256 channels, each with a pool behind it, 1x1 64, FC 256, FC classes.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 96, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(96, 128, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(128, 256, 5, padding=2),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            fc1=nn.Conv2d(256, 64, 1),
            relu4=nn.ReLU(),
            flatten=nn.Flatten(),
            dropout1=nn.Dropout(dropout),
            fc2=nn.Linear(64 * 4 * 4, 256),
            relu5=nn.ReLU(),
            dropout2=nn.Dropout(dropout),
            fc3=nn.Linear(256, classes),
        )
    )


def residual_lenet(*, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """A residual LeNet for images (batch, channels, 32, 32); searching it gives residual TD blocks, the thesis's future work.

    Layers: 32, pool, 64, pool, 128, each convolution followed by two residual ones (He et al. 2016), a mean over the map, FC
    classes. Each convolution has batch normalisation, as in a TD block. The mean replaces the LeNet's first FC layer, which
    would take a third of 27,000 parameters. With 3 channels and 10 classes it has 482,730 parameters.
    """
    steps: OrderedDict[str, nn.Module] = OrderedDict()

    def conv(into: int, out: int) -> OrderedDict[str, nn.Module]:
        return OrderedDict(conv=nn.Conv2d(into, out, 3, padding=1, bias=False), norm=nn.BatchNorm2d(out))

    for stage, (into, out) in enumerate([(channels, 32), (32, 64), (64, 128)], start=1):
        steps[f"stage{stage}"] = nn.Sequential(conv(into, out) | {"relu": nn.ReLU()})
        for number in (1, 2):
            block = Residual(nn.Sequential(conv(out, out)))
            steps[f"stage{stage}_{number}"] = nn.Sequential(OrderedDict(residual=block, relu=nn.ReLU()))
        if stage < 3:
            steps[f"pool{stage}"] = nn.MaxPool2d(2)
    steps |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(128, classes)}
    return nn.Sequential(steps)


def td_lenet(*, channels: int = 3, classes: int = 10, dropout: float = 0.25, rank: int = 15) -> nn.Sequential:
    """The thesis's LeNet made of TD blocks, for images (batch, channels, 32, 32).

    With rank 15 in the first, second and fifth block and 30 in the others, it has 27,224 parameters, as in the thesis. The
    first block has no normalisation at its end, since the thesis's count does not include one.
    """
    narrow, wide = CP4(rank), CP4(2 * rank)
    return nn.Sequential(
        OrderedDict(
            conv1=td_conv(channels, 32, 3, narrow, padding=1, norm="inner"),
            conv2=td_conv(32, 64, 3, narrow),
            pool1=nn.MaxPool2d(2),
            dropout1=nn.Dropout(dropout),
            conv3=td_conv(64, 64, 3, wide, padding=1),
            conv4=td_conv(64, 64, 3, wide),
            pool2=nn.MaxPool2d(2),
            dropout2=nn.Dropout(dropout),
            fc1=td_conv(64, 512, 6, narrow),
            dropout3=nn.Dropout(dropout),
            fc2=nn.Conv2d(512, classes, 1),
            flatten=nn.Flatten(),
        )
    )
