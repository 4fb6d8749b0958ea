"""Small models and data for tests; study files name them as `tests.nets:small`."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ranksearch.data import Splits, digits
from tests.layers import Same, Standardised, normalised, pruned

SMALL = """
name = "small"
seed = 0

[task]
model = "tests.nets:small"
data = "tests.nets:few_digits"

[dense]
epochs = 12
learning_rate = 1e-2
batch_size = 32

[search]
trials = 8

[finetune]
epochs = 1

[finalists]
count = 3
epochs = 1
"""

IMAGE = torch.ones(1, 4, 6, 5)


class Net(nn.Module):
    """A net of named modules, and a function `run(net, input)` that is its forward."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs):
        return self.run(self, inputs)


class Siamese(nn.Module):
    """Compares two images (batch, 2, channels, height, width) by the same layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 6 * 5, 8), nn.Linear(16, 2)

    def forward(self, inputs):
        return self.last(torch.cat([self.fc(self.conv(image).relu().flatten(1)) for image in inputs.unbind(1)], 1))


class Pyramid(nn.Module):
    """A detector in little: one head over three levels of a pyramid, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head, self.scores = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, inputs):
        levels = [self.stem(inputs)]
        for _ in range(2):
            levels.append(self.down(levels[-1].relu()))
        return torch.cat([self.scores(self.head(level).relu().flatten(2).mT) for level in levels], 1)


class Decoder(nn.Module):
    """Makes a map larger in two steps, by one grouped convolution and one transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down, self.mix = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up, self.last = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, inputs):
        small = self.mix(self.down(inputs).relu()).relu()
        large = self.mix(self.up(small).relu()).relu()
        return self.last(self.up(large))


class Recurrent(nn.Module):
    """A convolution over frames (batch, frames, channels, height, width) and its own last output."""

    def __init__(self):
        super().__init__()
        self.gates, self.last = nn.Conv2d(3 + 4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, inputs):
        state = inputs.new_zeros(len(inputs), 4, *inputs.shape[3:])
        for frame in inputs.unbind(1):
            state = torch.tanh(self.gates(torch.cat([frame, state], 1)))
        return self.last(state)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fails(n, x):
    """A `run` that raises."""
    n.norm(n.conv(x))
    raise ValueError("a broken forward\nwith details")


def entropic():
    """The small net with an activation that ONNX has no operator for."""
    return nn.Sequential(small(), Net(lambda net, inputs: torch.special.entr(inputs.abs())))


def scores_of_whole_splits(data: Splits, values: Iterable[float], rest: float) -> Callable[[Tensor, Tensor], float]:
    """A score that gives these values, one after the other, and then `rest`; also for the resamples of a bootstrap in between."""
    left = iter(values)
    whole = [torch.cat([torch.as_tensor(target).reshape(1) for _, target in split]) for split in (data.validation, data.test)]

    def score(outputs: Tensor, targets: Tensor) -> float:
        is_whole = len(targets) <= 2 or any(torch.equal(targets, each) for each in whole)
        return next(left, rest) if is_whole else rest

    return score


def small(classes: int = 10) -> nn.Sequential:
    """A small LeNet for digits of 8x8: two convolutions and fully connected layers behind a flatten."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            norm1=nn.BatchNorm2d(8),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * 4 * 4, 32),
            relu3=nn.ReLU(),
            fc2=nn.Linear(32, classes),
        )
    )


def computed() -> nn.Sequential:
    """A net for digits of 8x8 whose layers compute their weights or paddings in each pass."""
    return nn.Sequential(
        OrderedDict(
            conv1=Standardised(1, 8, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=Same(8, 16, 3, stride=2, groups=2),
            relu2=nn.ReLU(),
            conv3=normalised(nn.Conv2d(16, 16, 3, padding=1, groups=2)),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.utils.parametrizations.spectral_norm(nn.Linear(16 * 4 * 4, 32)),
            relu4=nn.ReLU(),
            fc2=pruned(nn.Linear(32, 10)),
        )
    )


def grouped(classes: int = 10) -> nn.Sequential:
    """A small net of grouped and depthwise convolutions for digits of 8x8."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            point=nn.Conv2d(16, 24, 1, groups=2, bias=False),
            norm=nn.BatchNorm2d(24),
            relu2=nn.ReLU(),
            block=nn.Conv2d(24, 32, 3, stride=2, padding=1, groups=4),
            relu3=nn.ReLU(),
            shuffle=nn.ChannelShuffle(4),
            wide=nn.Conv2d(32, 32, 5, padding=2, groups=32),
            small=nn.Conv2d(32, 32, 3, padding=1, groups=32),
            relu4=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(32, classes),
        )
    )


class UNet(nn.Module):
    """A small U-Net for images of one channel whose sides are multiples of four; its output is a map of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 12, 3, padding=1)
        self.middle = nn.Conv2d(12, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(16, 12, 3, stride=2, padding=1, output_padding=1)
        self.join2 = nn.Conv2d(24, 12, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.join1 = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first = self.down1(inputs).relu()
        second = self.down2(self.pool(first)).relu()
        below = self.up2(self.middle(self.pool(second)).relu())
        joined = self.join2(torch.cat([second, below], 1)).relu()
        return self.last(self.join1(torch.cat([first, self.up1(joined)], 1)).relu())


def unet() -> UNet:
    return UNet()


def generator() -> nn.Sequential:
    """A small DCGAN generator: from codes (batch, 12, 1, 1) to images (batch, 1, 16, 16)."""
    return nn.Sequential(
        OrderedDict(
            first=nn.ConvTranspose2d(12, 16, 4, bias=False),
            norm1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(),
            second=nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, groups=2, bias=False),
            norm2=nn.BatchNorm2d(8),
            relu2=nn.ReLU(),
            last=nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
            tanh=nn.Tanh(),
        )
    )


read_digits = functools.cache(functools.partial(digits, size=8))
"""All digits of 8x8, read once, since that takes as long as many a test."""


def few_digits(count: int = 200) -> Splits:
    """Digits of 8x8: `count` for training, 100 each for validation and test."""
    whole = read_digits()

    def first(split: TensorDataset, many: int) -> TensorDataset:
        return TensorDataset(*(tensor[:many].clone() for tensor in split.tensors))

    return Splits(first(whole.train, count), first(whole.validation, 100), first(whole.test, 100), 10, "a few digits")


class Deadly(nn.Module):
    """Kills its own process when it is trained, while the file named by the variable DEADLY exists; not in checks with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        path = os.environ.get("DEADLY", "")
        if self.training and torch.is_grad_enabled() and len(inputs) > 2 and path and os.path.exists(path):  # noqa: PTH110
            os.unlink(path)  # noqa: PTH108
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(inputs)


def deadly() -> Deadly:
    return Deadly()


class Versioned(nn.Module):
    """Loads states of its own version and of the version before, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.loaded: int | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        version = local_metadata.get("version")
        if version not in (2, 3):
            raise ValueError(f"version must be 2 or 3, but is {version}")
        self.loaded = version
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def versioned() -> Versioned:
    return Versioned()


def not_a_number() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    return model


def nothing_to_decompose() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.ReLU())


def not_a_model() -> int:
    return 3


def wrong_labels() -> Splits:
    good = few_digits()
    inputs, targets = good.validation.tensors
    return Splits(good.train, TensorDataset(inputs, targets + 1), good.test, 10, "labels 1..10")


class Odd(Dataset):
    """A data set whose inputs cannot make a batch: no tensors, or tensors of different shapes."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.kind(index), index


def pictures() -> Splits:
    return Splits(*[Odd(lambda index: object())] * 3, 10, "what is no tensor")


def ragged() -> Splits:
    return Splits(*[Odd(lambda index: torch.zeros(1, 8, 8 + index))] * 3, 10, "images of several sizes")


def larger_test() -> Splits:
    found = few_digits()
    return replace(found, test=TensorDataset(torch.zeros(10, 1, 16, 16), torch.arange(10)))


class Log:
    """A value that can be copied but not pickled."""

    def __deepcopy__(self, memo):
        return self

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle a log")


def unpicklable() -> nn.Module:
    model = small()
    model.log = Log()
    return model


def uncopyable() -> nn.Module:
    model = small()
    model.log = sys.stdout
    return model


NUMBER = 3


def raises() -> nn.Module:
    raise FileNotFoundError("no such file: pictures.npz")
