"""The contract that every decomposition fulfils: ranks <-> cost <-> modules.

One file holds one decomposition. `factor_shapes` is the single source of its size: the parameter count, the
multiply-accumulates and the empty structure that weights are loaded into all follow from it.
"""

from __future__ import annotations

import abc
import bisect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ranksearch.methods.layer import CONVOLUTIONS, Conv, Layer
from ranksearch.plan import Factorization

Shape: TypeAlias = tuple[int, ...]
Prepared: TypeAlias = Mapping[str, Tensor]
"""What one layer's decomposition needs so that every rank is cheap; plain tensors by name, so that it can be stored."""

NOWHERE = "meta"
"""The device parts are made on: no initial values are drawn, which would move torch's global random state."""


@dataclass(frozen=True)
class RankConstraints:
    """Which candidates are offered for a layer. A layer never grows: a candidate that is not smaller than dense in every
    cost of `smaller_in` ("params", "macs") is not.

    Ranks are multiples of `multiple`, as some hardware wants them; a rank whose bound lies below it is held at that bound.
    """

    multiple: int = 1
    smaller_in: tuple[str, ...] = ("params",)


FEWER_PARAMS = RankConstraints()
"""Any rank at which the layer has fewer parameters: what is offered unless a study says otherwise."""


class Method(abc.ABC):
    """One decomposition. Stateless; shapes are the kernel's (out, in, *kernel), factors come in the order they apply."""

    kind: ClassVar[type[Factorization]]

    @abc.abstractmethod
    def applies(self, weight: Shape, *, linear: bool) -> bool:
        """Whether this decomposition can store a kernel of this shape; `linear`: of a fully connected layer."""

    @abc.abstractmethod
    def bounds(self, weight: Shape) -> tuple[int, ...]:
        """The ranks at which a kernel of this shape is reproduced exactly; more would be waste."""

    @abc.abstractmethod
    def limits(self, weight: Shape) -> tuple[int, ...]:
        """The largest ranks that are worth a look, whatever they cost."""

    @abc.abstractmethod
    def from_vbmf(self, rank_in: int, rank_out: int) -> tuple[int, ...]:
        """The ranks that VBMF estimates of the input and the output unfolding suggest."""

    @abc.abstractmethod
    def factor_shapes(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Shape, ...]:
        """The shapes of the factors of a kernel of shape `weight`, in the order they apply."""

    @abc.abstractmethod
    def holds(self, weight: Shape) -> tuple[tuple[int, ...], ...]:
        """For each factor, the kernel's input modes (1: channels, 2 and up: positions) that its last axes hold, a run."""

    @abc.abstractmethod
    def positions(self, layer: Layer) -> tuple[int, ...]:
        """How many positions each factor is applied to in one of the layer's calls."""

    @abc.abstractmethod
    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int) -> Prepared:
        """The part of the work that all ranks share, for a kernel (out, in, *kernel); `ranks` are those looked at."""

    @abc.abstractmethod
    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        """The factors at `ranks`; a pure function of its arguments.

        `sweeps` more of alternating least squares lower the error of those that are not the best at their ranks.
        """

    @abc.abstractmethod
    def balanced(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same kernel by factors that fine-tuning starts better from, after a metric was folded into `factors`."""

    @abc.abstractmethod
    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        """The relative errors (Frobenius) of the kernel at some of the prepared ranks, without rebuilding it."""

    @abc.abstractmethod
    def reconstruct(self, factors: Sequence[Tensor], weight: Shape) -> Tensor:
        """The kernel of shape `weight` that the factors stand for."""

    @abc.abstractmethod
    def build(self, module: nn.Module, weight: Shape, factors: Sequence[Tensor]) -> nn.Sequential:
        """Plain torch modules that compute what `module` would with the reconstructed kernel."""

    # --- what follows from the above; not overridden ---

    def value(self, layer: Layer, ranks: tuple[int, ...]) -> Factorization:
        """The plan's value for this layer at these ranks."""
        matrix = (layer.weight[0], math.prod(layer.weight[1:]))
        # Factors are of the kernel in its usual order, those of a matrix too.
        as_kernel = layer.flattened and (layer.order is not None or not self.applies(matrix, linear=True))
        return self.kind(*ranks, kernel=layer.kernel if as_kernel else None, order=layer.order if as_kernel else None)

    def params(self, layer: Layer, ranks: tuple[int, ...]) -> int:
        """Parameters of the factorized layer, bias included."""
        factors = sum(map(math.prod, self.factor_shapes(layer.weight, ranks)))
        return factors + (layer.weight[0] if layer.bias else 0)

    def macs(self, layer: Layer, ranks: tuple[int, ...]) -> int:
        """Multiply-accumulates of the factorized layer for one input."""
        shapes, positions = self.factor_shapes(layer.weight, ranks), self.positions(layer)
        return sum(math.prod(shape) * count for shape, count in zip(shapes, positions, strict=True)) * layer.calls

    def costs(self, layer: Layer, ranks: tuple[int, ...]) -> dict[str, float]:
        """Every cost of the factorized layer by its name."""
        return {"params": self.params(layer, ranks), "macs": self.macs(layer, ranks)}

    def rank_ranges(self, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> tuple[range, ...]:
        """The ranks of each kind that pay while the others are at their least: a search's range, empty where none pays."""
        least = tuple(min(constraints.multiple, bound) for bound in self.bounds(layer.weight))
        return tuple(
            self._rank_range(layer, constraints, least, axis, limit) for axis, limit in enumerate(self.limits(layer.weight))
        )

    def shrinks(self, layer: Layer, ranks: tuple[int, ...], constraints: RankConstraints = FEWER_PARAMS) -> bool:
        """Whether the factorized layer is smaller than the dense one in every cost that the offer names."""
        return all(getattr(self, cost)(layer, ranks) < getattr(layer, cost) for cost in constraints.smaller_in)

    def _rank_range(self, layer: Layer, constraints: RankConstraints, least: tuple[int, ...], axis: int, limit: int) -> range:
        def grows(rank: int) -> bool:
            return not self.shrinks(layer, (*least[:axis], rank, *least[axis + 1 :]), constraints)

        # A bound below the multiple is itself the step, and the only one that fits.
        ranks = range(least[axis], limit + 1, least[axis])
        # The costs rise with the rank, so the first rank that does not pay can be bisected for.
        return ranks[: bisect.bisect_left(ranks, True, key=grows)]


def nearest_rank(ranks: range, wanted: float) -> int:
    """The rank of `ranks`, one kind's from `Method.rank_ranges`, that is nearest to `wanted`."""
    return ranks[min(len(ranks), max(1, round(wanted / ranks.step))) - 1]


def stack(module: nn.Module, weight: Shape, parts: Sequence[tuple[str, nn.Module, Tensor]]) -> nn.Sequential:
    """The parts as one `nn.Sequential`, weights filled in, on the device and in the dtype of `module`.

    A fully connected `module` is entered and left as one: the map is unflattened before and flattened after. Its bias
    goes to the last part. The parts come from `pointwise` and `spatial`, without memory.
    """
    kernel, bias = module.weight, module.bias
    assert isinstance(kernel, Tensor)
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    as_kernel = isinstance(module, nn.Linear) and len(weight) > 2
    if as_kernel:
        steps["unflatten"] = nn.Unflatten(1, weight[1:])
    for name, part, values in parts:
        # In the final dtype before the values come, which would otherwise be rounded to the default one.
        steps[name] = part.to(kernel.dtype).to_empty(device=kernel.device).requires_grad_(kernel.requires_grad)
        assert isinstance(part.weight, Tensor)
        with torch.no_grad():
            part.weight.copy_(values.reshape(part.weight.shape))
    if isinstance(bias, Tensor):
        last = parts[-1][1]
        assert isinstance(last.bias, Tensor)
        with torch.no_grad():
            last.bias.copy_(bias)
        last.bias.requires_grad_(bias.requires_grad)
    if as_kernel:
        steps["flatten"] = nn.Flatten()
    return nn.Sequential(steps).train(module.training)


def pointwise(weight: Shape, in_channels: int, out_channels: int, *, bias: bool = False) -> nn.Module:
    """A 1x1 convolution of as many dimensions as the kernel has; a Linear where it has none."""
    dims = len(weight) - 2
    if dims == 0:
        return nn.Linear(in_channels, out_channels, bias=bias, device=NOWHERE)
    return CONVOLUTIONS[dims - 1](in_channels, out_channels, 1, bias=bias, device=NOWHERE)


def spatial(module: nn.Module, weight: Shape, channels: tuple[int, int], *, axes: Sequence[int], groups: int = 1,
            bias: bool = False) -> Conv:  # fmt: skip
    """A convolution with the kernel, stride, padding and dilation that `module` has along `axes`, and 1, 1, 0, 1 elsewhere.

    For a Linear seen as a kernel over its whole map the convolution is valid, with stride 1.
    """
    dims = len(weight) - 2
    conv = module if isinstance(module, CONVOLUTIONS) else None

    def along(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(values[axis] if axis in axes else other for axis in range(dims))

    ones = (1,) * dims
    padding: str | tuple[int, ...] = (0,) * dims
    if conv is not None:
        padding = conv.padding if isinstance(conv.padding, str) else along(conv.padding, 0)
    return CONVOLUTIONS[dims - 1](
        *channels,
        along(weight[2:], 1),  # type: ignore[arg-type]
        stride=along(conv.stride if conv else ones, 1),  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=along(conv.dilation if conv else ones, 1),  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=conv.padding_mode if conv else "zeros",
        device=NOWHERE,
    )
