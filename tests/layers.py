"""Layers that compute in each pass what they hand to torch: their weights or their padding."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight in each pass and scales it by a learned gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, inputs):
        weight = self.gain * (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std()
        return F.conv2d(inputs, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """A convolution padded as in TensorFlow: one output for each `stride` positions of an input of any size."""

    def padded(self, inputs):
        amounts = []
        for size, kernel, stride, apart in zip(inputs.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            around = max(0, (-(-size // stride) - 1) * stride + apart * (kernel - 1) + 1 - size)
            amounts = [around // 2, around - around // 2, *amounts]
        return F.pad(inputs, amounts)

    def forward(self, inputs):
        return F.conv2d(self.padded(inputs), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardisedSame(Standardised, Same):
    """A convolution that does both."""

    def forward(self, inputs):
        return Standardised.forward(self, self.padded(inputs))


class Cast(nn.Linear):
    """A fully connected layer that brings its weight into the dtype of its inputs."""

    def forward(self, inputs):
        return F.linear(inputs, self.weight.to(inputs.dtype), self.bias.to(inputs.dtype))


class Noisy(nn.Module):
    """A parametrisation that gives another weight each time."""

    def forward(self, weight):
        return weight + torch.rand(())


def normalised(layer):
    """A layer under the old weight normalisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", amount=0.5)
