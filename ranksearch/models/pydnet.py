"""PyD-Net, which predicts depth from one picture on a CPU (Poggi, Aleotti, Tosi and Mattoccia, IROS 2018)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

ENCODER = (16, 32, 64, 96, 128, 192)
"""The channels of the six levels of the encoder, from half the picture's resolution to a 64th."""
DECODER = (96, 64, 32, 8)
"""The channels of the four convolutions of each decoder."""
SLOPE = 0.2
"""The slope of the leaky ReLUs for negative inputs."""
MAX_DISPARITY = 0.3
"""The largest disparity that the net can predict, as a share of the picture's width."""
SIDE_MULTIPLE = 2 ** len(ENCODER)
"""The sides of a picture must be multiples of this, so that each level is exactly half the one before."""


class PydNet(nn.Module):
    """The net of `pydnet`: `encoder1` to `encoder6`, `decoder1` to `decoder6`, and `up2` to `up6` between the decoders."""

    def __init__(self) -> None:
        super().__init__()
        for level, (into, out) in enumerate(pairwise((3, *ENCODER)), start=1):
            self.add_module(f"encoder{level}", _convolutions((into, out, out), stride=2))
            # A decoder takes the features of its level, and what the decoder of the next coarser level hands on.
            handed_on = DECODER[-1] if level < len(ENCODER) else 0
            decoder = _convolutions((out + handed_on, *DECODER))
            self.add_module(f"decoder{level}", decoder[:-1])  # no activation at its end
            if level > 1:
                up = nn.ConvTranspose2d(DECODER[-1], DECODER[-1], 2, stride=2)
                self.add_module(f"up{level}", nn.Sequential(OrderedDict(conv=up, relu=nn.LeakyReLU(SLOPE))))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                assert module.bias is not None
                # Without normalisation, torch's own initialisation would leave the coarse levels with hardly a signal.
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        height, width = pictures.shape[2:]
        if height % SIDE_MULTIPLE or width % SIDE_MULTIPLE:
            raise ValueError(f"the sides of a picture must be multiples of {SIDE_MULTIPLE}, but it is {height} x {width}")
        features, current = [], pictures
        for level in range(1, len(ENCODER) + 1):
            current = self.get_submodule(f"encoder{level}")(current)
            features.append(current)
        disparities, current = [], features.pop()
        for level in range(len(ENCODER), 0, -1):
            decoded = self.get_submodule(f"decoder{level}")(current)
            disparities.append(MAX_DISPARITY * torch.sigmoid(decoded[:, :2]))
            if level > 1:
                current = torch.cat([features.pop(), self.get_submodule(f"up{level}")(decoded)], 1)
        return tuple(reversed(disparities))


def _convolutions(channels: tuple[int, ...], *, stride: int = 1) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, the first of them with a stride, and leaky ReLUs."""
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (into, out) in enumerate(pairwise(channels), start=1):
        steps[f"conv{number}"] = nn.Conv2d(into, out, 3, stride if number == 1 else 1, padding=1)
        steps[f"relu{number}"] = nn.LeakyReLU(SLOPE)
    return nn.Sequential(steps)


def pydnet() -> PydNet:
    """PyD-Net for pictures (batch, 3, height, width) in 0..1, whose sides are multiples of 64: 1,971,624 parameters.

    It outputs a pyramid of six maps, the finest first: (batch, 2, height / 2, width / 2) to (batch, 2, height / 64,
    width / 64). The first channel is the disparity of the picture's pixels, the second that of a right camera's, both as a
    share of the width. As in the authors' code, of the eight channels of a decoder the first two become disparities, and all
    go to the next level. Initial weights are He et al.'s, where theirs are Glorot and Bengio's.
    """
    return PydNet()
