"""Small nets and made-up data with several inputs and outputs, nested in tuples, dicts and lists."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from ranksearch.data import Splits

IMAGE, VECTOR = (2, 8, 8), 5


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict whose entries are attributes too, which torch's pytree does not know."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Samples(Dataset):
    """Samples that a function makes of a random image, a random vector and a class that depends on both."""

    def __init__(self, make, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, *IMAGE, generator=generator)
        self.vectors = torch.randn(count, VECTOR, generator=generator)
        self.labels = (self.images.mean((1, 2, 3)) * 8 + self.vectors[:, 0] > 0).long()
        self.make = make

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.make(self.images[index], self.vectors[index], int(self.labels[index]))


def splits(make, *, classes=None, collate=None):
    return Splits(
        *(Samples(make, count, seed) for seed, count in enumerate((96, 40, 40))), classes, "made-up images and vectors", collate
    )


def tower():
    """Two convolutions that give 12 features of an image."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class TwoInputs(nn.Module):
    """An image and a vector -> two classes."""

    def __init__(self):
        super().__init__()
        self.tower, self.dense, self.head = tower(), nn.Linear(VECTOR, 8), nn.Linear(20, 2)

    def forward(self, image, vector):
        return self.head(torch.cat([self.tower(image), self.dense(vector).relu()], 1))


class TwoHeads(nn.Module):
    """An image -> the outputs of two heads, nested as `pack` says."""

    def __init__(self, pack):
        super().__init__()
        self.tower, self.label, self.size, self.pack = tower(), nn.Linear(12, 2), nn.Linear(12, 1), pack

    def forward(self, image):
        features = self.tower(image)
        return self.pack(self.label(features), self.size(features))


class WithLoss(nn.Module):
    """As Hugging Face's: computes its loss, in both modes, of labels among its inputs."""

    def __init__(self):
        super().__init__()
        self.tower, self.head = tower(), nn.Linear(12, 2)

    def forward(self, image, labels=None):
        logits = self.head(self.tower(image))
        return ModelOutput(loss=F.cross_entropy(logits, labels), logits=logits)


class Siamese(nn.Module):
    """Two images -> the distance of their features, of two towers that share nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = tower(), tower()

    def forward(self, images):
        first, second = images
        return (self.first(first) - self.second(second)).square().mean(1)


def as_dict(label, size):
    return {"label": label, "size": size}


def as_tuple(label, size):
    return label, [size]


def as_model_output(label, size):
    return ModelOutput(label=label, size=size)


def share_right(outputs, targets):
    return float((outputs.argmax(1) == targets).double().mean())


def loss_of_dict(outputs, targets):
    return F.cross_entropy(outputs["label"], targets["label"]) + F.mse_loss(outputs["size"], targets["size"])


def score_of_dict(outputs, targets):
    return share_right(outputs["label"], targets["label"])


def loss_of_tuple(outputs, targets):
    return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1][0], targets[1])


def score_of_tuple(outputs, targets):
    return share_right(outputs[0], targets[0])


def loss_of_output(outputs, targets):
    return F.cross_entropy(outputs.label, targets)


def score_of_output(outputs, targets):
    return share_right(outputs.label, targets)


def loss_of_distance(outputs, targets):
    return F.binary_cross_entropy(1 - torch.exp(-outputs).clamp(1e-4, 1 - 1e-4), targets.float())


def score_of_distance(outputs, targets):
    return float(((outputs > 0.7).long() == targets).double().mean())
