"""The LeNet of the thesis: four 3x3 convolutions and two fully connected layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def lenet(*, channels: int = 3, classes: int = 10, dropout: float = 0.25) -> nn.Sequential:
    """LeNet for images (batch, channels, 32, 32): 32, 32, pool, 64, 64, pool, FC 512, FC classes; paddings 1, 0, 1, 0.

    With 3 channels and 10 classes it has 1,250,858 parameters (Salman, University of Bologna, 2018).
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 3),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            dropout1=nn.Dropout(dropout),
            conv3=nn.Conv2d(32, 64, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(64, 64, 3),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            dropout2=nn.Dropout(dropout),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * 6 * 6, 512),
            relu5=nn.ReLU(),
            dropout3=nn.Dropout(dropout),
            fc2=nn.Linear(512, classes),
        )
    )
