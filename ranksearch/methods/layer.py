"""What methods know of a decomposable layer: its shape, its sizes and its costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn

OrdinaryConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Conv = OrdinaryConv | Transposed
ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (*ORDINARY, *TRANSPOSED)
MAX_DIMS = len(ORDINARY)
"""The most dimensions of a kernel that torch can convolve with."""

Padding: TypeAlias = tuple[tuple[int, int], ...]
"""How many zeros are put before and after a map along each of its axes."""

MIN_DEPTHWISE = 5
"""The smallest side of a depthwise convolution's kernel that is decomposed: 3 x 3 could only become 3 x 1 and 1 x 3."""


def groups_of(module: nn.Module) -> int:
    """The number of groups of a layer's channels; 1 for a fully connected layer."""
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def as_kernel(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight of `module` as the kernel (out, in, *kernel), stacked over the groups.

    That of a transposed convolution is (in, out, *kernel), stacked over the groups; any other weight is the kernel.
    """
    return _swapped(weight, module.groups) if isinstance(module, TRANSPOSED) else weight


def kernel_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the kernel (out, in, *kernel) of each group."""
    assert isinstance(module.weight, Tensor)
    first, *others = as_kernel(module, module.weight).shape
    return (first // groups_of(module), *others)


def as_weight(module: nn.Module, kernel: Tensor) -> Tensor:
    """The inverse of `as_kernel`. The kernel may have another shape of as many numbers."""
    assert isinstance(module.weight, Tensor)
    if not isinstance(module, TRANSPOSED):
        return kernel.reshape(module.weight.shape)
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return _swapped(kernel.reshape(shape), module.groups)


def _swapped(stacked: Tensor, groups: int) -> Tensor:
    """Swap the first two axes of each group's tensor."""
    return stacked.reshape(groups, -1, *stacked.shape[1:]).transpose(1, 2).flatten(0, 1)


def is_small_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a depthwise convolution whose kernel is not decomposed."""
    if not isinstance(module, CONVOLUTIONS) or not module.groups == module.in_channels == module.out_channels > 1:
        return False
    return len(module.kernel_size) != 2 or min(module.kernel_size) < MIN_DEPTHWISE


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
        weight: shape of the kernel, (out, in, *kernel), or (out, in) for a fully connected layer. If the layer has groups, each
            has a kernel of this shape.
        bias: whether it has a bias.
        calls: its calls in one pass: several in a siamese net. The sizes are () for a fully connected layer.
        flattened: whether it is a fully connected layer behind a flatten. Then `weight` and the sizes are those of a
            convolution with a kernel that covers the whole map, as in the thesis.
        order: as `Factorization.order`: the order of the map's axes in the flattened row, if channels do not come first.
        padding: as `Factorization.padding`: the zeros around its input, if their number depends on the input's size.
        held: the parameters that it holds, if it computes its weight from them; None if they are kernel and bias.
        latency: its latency, once it was measured.
        groups: the number of groups of its channels.
        transposed: whether it is a transposed convolution.
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
    groups: int = 1
    transposed: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size; () for a fully connected layer."""
        return self.weight[2:]

    @property
    def params(self) -> int:
        """Parameters of the dense layer, including the bias."""
        if self.held is not None:
            return self.held
        return self.groups * (math.prod(self.weight) + (self.weight[0] if self.bias else 0))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one input."""
        sizes = ((call.in_size if self.transposed else call.out_size, call.times) for call in self.calls)
        return self.groups * math.prod(self.weight) * sum(math.prod(size) * times for size, times in sizes)

    @property
    def costs(self) -> dict[str, float]:
        """All costs of the dense layer by name."""
        timed = {"latency": self.latency.dense} if self.latency else {}
        return {"params": self.params, "macs": self.macs} | timed
