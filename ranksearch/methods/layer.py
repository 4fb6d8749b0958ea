"""One decomposable layer of a network, as methods need to know it: its shape and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerLatency:
    """How long a layer takes where it will run, in milliseconds: dense, and as a model of its work for each method.

    `methods` holds, by the name of a method, a coefficient for each number of `Method.work`; none is negative, so the time
    never falls as a rank rises, except where a part is no longer built.
    """

    dense: float
    methods: Mapping[str, tuple[float, ...]] = field(hash=False)

    def ms(self, method: str, work: Sequence[float]) -> float:
        """Milliseconds of that much work by that method."""
        return sum(coefficient * amount for coefficient, amount in zip(self.methods[method], work, strict=True))


@dataclass(frozen=True)
class Layer:
    """One decomposable module of the dense model at the study's input size.

    `weight` is the kernel's shape (out, in, *kernel); (out, in) for a fully connected layer. `in_size` and `out_size`
    are the spatial sizes before and after, () for a fully connected layer, `calls` how often it is applied to one
    input: to each position, or to each part of an input whose parts the model folds into the batch. A fully connected
    layer behind a flatten has `flattened` set: its weight is seen as a kernel that covers the whole map, as the thesis
    does, and its sizes are those of that convolution. Where the channels were not the first axis of the map, `order` is the
    order of its axes in the flattened row, as in `Factorization.order`. `latency` is there once the layer was timed.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    bias: bool
    in_size: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    calls: int = 1
    flattened: bool = False
    order: tuple[int, ...] | None = None
    latency: LayerLatency | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size; () for a fully connected layer."""
        return self.weight[2:]

    @property
    def params(self) -> int:
        """Parameters of the dense layer, weight and bias."""
        return math.prod(self.weight) + (self.weight[0] if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one input."""
        return math.prod(self.weight) * math.prod(self.out_size) * self.calls

    @property
    def costs(self) -> dict[str, float]:
        """Every cost of the dense layer by its name."""
        timed = {"latency": self.latency.dense} if self.latency else {}
        return {"params": self.params, "macs": self.macs} | timed
