"""What methods know of a decomposable layer: its shape, its sizes and its costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Padding: TypeAlias = tuple[tuple[int, int], ...]
"""How many zeros are put before and after a map along each of its axes."""


@dataclass(frozen=True)
class LayerLatency:
    """How long a layer takes where it will run, in milliseconds: dense, and as a model of its work for each method.

    `methods` holds, by the name of a method, a coefficient for each number of `Method.work`; none is negative, so the time
    never falls as a rank rises, except where a part is no longer built.
    """

    dense: float
    methods: Mapping[str, tuple[float, ...]] = field(hash=False)

    def ms(self, method: str, work: Sequence[float]) -> float:
        """Milliseconds of that much work by that method; infinite for a method without ranks that may be chosen."""
        if method not in self.methods:
            return math.inf
        return sum(coefficient * amount for coefficient, amount in zip(self.methods[method], work, strict=True))


@dataclass(frozen=True)
class Call:
    """One call of a layer in a pass: the spatial sizes of its input and output, and how often it is applied to one input there.

    That is more than once if a fully connected layer is applied to each position, or if the model folds parts of an input into
    the batch.
    """

    in_size: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    times: int = 1

    @property
    def positions(self) -> int:
        """How many output positions it computes for one input."""
        return math.prod(self.out_size) * self.times


@dataclass(frozen=True)
class Layer:
    """One decomposable module of the dense model at the study's input size.

    Attributes:
        name: its name in the model.
        kind: its class, for example "Conv2d" or "Linear".
        weight: shape of the kernel, (out, in, *kernel), or (out, in) for a fully connected layer.
        bias: whether it has a bias.
        calls: its calls in one pass: several in a siamese net. The sizes are () for a fully connected layer.
        flattened: whether it is a fully connected layer behind a flatten. Then `weight` and the sizes are those of a
            convolution with a kernel that covers the whole map, as in the thesis.
        order: as `Factorization.order`: the order of the map's axes in the flattened row, if channels do not come first.
        padding: as `Factorization.padding`: the zeros around its input, if their number depends on the input's size.
        held: the parameters that it holds, if it computes its weight from them; None if they are kernel and bias.
        latency: its latency, once it was measured.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    bias: bool
    calls: tuple[Call, ...] = (Call(),)
    flattened: bool = False
    order: tuple[int, ...] | None = None
    padding: Padding | None = None
    held: int | None = None
    latency: LayerLatency | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size; () for a fully connected layer."""
        return self.weight[2:]

    @property
    def params(self) -> int:
        """Parameters of the dense layer, including the bias."""
        if self.held is not None:
            return self.held
        return math.prod(self.weight) + (self.weight[0] if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one input."""
        return math.prod(self.weight) * sum(call.positions for call in self.calls)

    @property
    def costs(self) -> dict[str, float]:
        """All costs of the dense layer by name."""
        timed = {"latency": self.latency.dense} if self.latency else {}
        return {"params": self.params, "macs": self.macs} | timed
