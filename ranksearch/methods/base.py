"""The contract that every decomposition fulfils: ranks <-> cost <-> modules.

One file holds one decomposition. `parts` is the single source of its size and structure: the parameter count, the
multiply-accumulates, the modules and the kernel that factors stand for all follow from it. Not every part is built: a 1x1 part
with as many outputs as inputs, such as the first of Tucker-2 if its rank is the number of input channels, is multiplied into
its neighbour, and costs nothing.
"""

from __future__ import annotations

import abc
import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ranksearch.methods.layer import Layer
from ranksearch.methods.parts import Part, Shape, assemble, builders, built, built_factors, composed
from ranksearch.plan import Factorization
from ranksearch.tensors.matrix import Principal, norm_of

Prepared: TypeAlias = Mapping[str, Tensor]
"""What one layer's decomposition needs so that every rank is cheap; plain tensors by name, so that it can be stored."""
FactorsAt: TypeAlias = Callable[[tuple[int, ...]], Sequence[Tensor]]
"""The factors of one kernel at any ranks."""
Rows: TypeAlias = Callable[[], Principal]
"""The principal vectors of a kernel's rows, computed when they are first asked for."""
Estimate: TypeAlias = Literal["in", "out", "larger"]
"""The VBMF rank of the unfolding by input channels, by output channels, or the larger of the two."""

LEVELS = 10
"""How many values of one rank a profile looks at, evenly spaced on a log scale, for methods of one or two ranks."""
MAX_CANDIDATES = 128
"""How many combinations of ranks a profile looks at for one layer and method: of three ranks five levels each."""
MAX_TERMS = 512
"""The largest rank that ALS fits. Only fully connected layers behind a map reach it, such as the first of VGG-16 (4096x512x49):
the fits of a profile up to 1,024 terms take two minutes of a core there, up to 512 terms a third of that."""

CHANNEL_BLOCK = 16
"""Channels that a processor's vector instructions take at once, in float32: 8 or 16."""


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
    """One decomposition. Stateless; shapes are the kernel's (out, in, *kernel), factors come in the order they apply.

    A subclass says what differs: these attributes and the abstract methods. The rest follows from them and is not overridden.
    """

    kind: ClassVar[type[Factorization]]
    """The type of a plan's values for this method."""
    vbmf: ClassVar[tuple[Estimate, ...]]
    """For each rank, the VBMF estimate that suggests it."""
    vbmf_turn: ClassVar[int] = 100
    """The method's turn to lead a plan at VBMF ranks, in which all layers that it suits take it: the lowest number first. A
    method of turn 0 leads no plan if another can."""
    by_als: ClassVar[bool] = False
    """Whether alternating least squares fits the factors."""

    @abc.abstractmethod
    def applies(self, weight: Shape, *, linear: bool) -> bool:
        """Whether this decomposition can store a kernel of this shape; `linear`: of a fully connected layer."""

    @abc.abstractmethod
    def bounds(self, weight: Shape) -> tuple[int, ...]:
        """The ranks at which a kernel of this shape is reproduced exactly; more would be waste."""

    @abc.abstractmethod
    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        """The convolutions in a row that store a kernel of shape `weight` at these ranks; the first is not depthwise.

        Their number and `axes` do not depend on the ranks. `parts.builders` says which of them are built.
        """

    @abc.abstractmethod
    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        """The part of the work that all ranks share, for a kernel (out, in, *kernel); `ranks` are those looked at.

        `rows` gives `principal(kernel.flatten(1))`, which another method may have computed already.
        """

    @abc.abstractmethod
    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        """The factors at `ranks`, of the shapes of `factor_shapes`; a pure function of its arguments.

        `sweeps` more of alternating least squares lower the error of those that are not the best at their ranks.
        """

    @abc.abstractmethod
    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        """The relative errors (Frobenius) of the kernel at some of the prepared ranks, without rebuilding it."""

    def distances(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], factors_at: FactorsAt) -> list[float]:
        """The norms (Frobenius) of `kernel` minus what its factors at these ranks stand for.

        `factors_at` gives factors that were folded back from a whitening, so that they need not be orthogonal any more. A
        method whose factors are nested may know them without rebuilding a kernel for each of the ranks.
        """
        return [self.distance(kernel, factors_at(each)) for each in ranks]

    # --- what follows from the above; not overridden ---

    def distance(self, kernel: Tensor, factors: Sequence[Tensor]) -> float:
        """The norm (Frobenius) of `kernel` minus what the factors stand for."""
        return norm_of(self.reconstruct(factors, tuple(kernel.shape)).sub_(kernel))

    def limits(self, weight: Shape) -> tuple[int, ...]:
        """The largest ranks that are worth a look, whatever they cost."""
        if not self.by_als:
            return self.bounds(weight)
        # More terms than the largest channel mode make ALS overcomplete: they cancel rather than fit.
        return tuple(min(max(weight[:2]), bound, MAX_TERMS) for bound in self.bounds(weight))

    def from_vbmf(self, rank_in: int, rank_out: int) -> tuple[int, ...]:
        """The ranks that VBMF estimates of the input and the output unfolding suggest."""
        estimates = {"in": rank_in, "out": rank_out, "larger": max(rank_in, rank_out)}
        return tuple(estimates[name] for name in self.vbmf)

    def factor_shapes(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Shape, ...]:
        """The shapes of the factors of a kernel of shape `weight`, in the order they apply."""
        return tuple(part.shape(weight) for part in self.parts(weight, ranks))

    def holds(self, weight: Shape) -> tuple[tuple[int, ...], ...]:
        """For each factor, the kernel's input modes (1: channels, 2 and up: positions) that its last axes hold, a run."""
        first, *others = [tuple(2 + axis for axis in part.axes) for part in self._structure(weight)]
        return (1, *first), *others

    def positions(self, layer: Layer) -> tuple[int, ...]:
        """How many positions each factor is applied to in one of the layer's calls."""
        size, counts = list(layer.in_size), []
        for part in self._structure(layer.weight):
            for axis in part.axes:
                size[axis] = layer.out_size[axis]
            counts.append(math.prod(size))
        return tuple(counts)

    def balanced(self, factors: tuple[Tensor, ...], weight: Shape) -> tuple[Tensor, ...]:
        """The same kernel by factors that fine-tuning starts better from, after a whitening was folded into `factors`."""
        first, second, *_ = self._structure(weight)
        if first.axes or second.depthwise or not second.axes:
            return factors
        # An orthonormal basis of the input channels again: over ten plans of the digits LeNet with Tucker-2, the cross-entropy
        # after three epochs was lower for each of them, by 0.03 on average. For other methods scales made no difference.
        reduce, core = factors[0].double(), factors[1].double()
        basis, scales = torch.linalg.qr(reduce.T)
        turned = torch.einsum("pq...,rq->pr...", core, scales)
        return basis.T.to(factors[0].dtype), turned.to(factors[1].dtype), *factors[2:]

    def reconstruct(self, factors: Sequence[Tensor], weight: Shape) -> Tensor:
        """The kernel of shape `weight` that the factors stand for."""
        return composed(self._structure(weight), factors, weight)

    def build(self, module: nn.Module, weight: Shape, ranks: tuple[int, ...], factors: Sequence[Tensor]) -> nn.Sequential:
        """Plain torch modules that compute what `module` would with the reconstructed kernel."""
        parts = self.parts(weight, ranks)
        return assemble(module, weight, built(parts), built_factors(parts, factors))

    def value(self, layer: Layer, ranks: tuple[int, ...]) -> Factorization:
        """The plan's value for this layer at these ranks."""
        matrix = (layer.weight[0], math.prod(layer.weight[1:]))
        # Factors are of the kernel in its usual order, those of a matrix too.
        as_kernel = layer.flattened and (layer.order is not None or not self.applies(matrix, linear=True))
        return self.kind(*ranks, kernel=layer.kernel if as_kernel else None, order=layer.order if as_kernel else None)

    def params(self, layer: Layer, ranks: tuple[int, ...]) -> int:
        """Parameters of the factorized layer, bias included."""
        factors = sum(math.prod(part.shape(layer.weight)) for part in built(self.parts(layer.weight, ranks)))
        return factors + (layer.weight[0] if layer.bias else 0)

    def macs(self, layer: Layer, ranks: tuple[int, ...]) -> int:
        """Multiply-accumulates of the factorized layer for one input."""
        return sum(self._part_macs(layer, ranks, ranks))

    def costs(self, layer: Layer, ranks: tuple[int, ...]) -> dict[str, float]:
        """Every cost of the factorized layer by its name."""
        timed = {"latency": layer.latency.ms(self.kind.method, self.work(layer, ranks))} if layer.latency else {}
        return {"params": self.params(layer, ranks), "macs": self.macs(layer, ranks)} | timed

    def work(self, layer: Layer, ranks: tuple[int, ...]) -> tuple[float, ...]:
        """What the latency of the factorized layer depends on, for one input; none of these numbers falls as a rank rises,
        except where a part is no longer built.

        They are 1, the multiply-accumulates of each part (0 if it is not built), the same with ranks rounded up to
        `CHANNEL_BLOCK`, the values passed between parts, and the parameters.
        """
        blocks = tuple(-(-rank // CHANNEL_BLOCK) * CHANNEL_BLOCK for rank in ranks)
        macs = [float(count) for counted in (ranks, blocks) for count in self._part_macs(layer, ranks, counted)]
        parts, positions = self.parts(layer.weight, ranks), self.positions(layer)
        outputs = [parts[index].out * positions[index] for index in sorted(set(builders(parts)))]
        return 1.0, *macs, float(sum(outputs[:-1]) * layer.calls), float(self.params(layer, ranks))

    def rank_ranges(self, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> tuple[range, ...]:
        """For each rank, from the least to the largest that pays with some others: a search's range, empty where none pays."""
        steps = (min(constraints.multiple, bound) for bound in self.bounds(layer.weight))
        # A bound below the multiple is itself the step, and the only one that fits.
        ranges = [range(step, limit + 1, step) for step, limit in zip(steps, self.limits(layer.weight), strict=True)]
        return tuple(self._rank_range(layer, constraints, ranges, axis) for axis in range(len(ranges)))

    def rank_grid(self, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> list[tuple[int, ...]]:
        """The ranks that a profile looks at: on a log scale from the least to the largest that pays, in all combinations that
        pay; the more ranks a method has, the fewer levels of each."""
        ranges = self.rank_ranges(layer, constraints)
        levels = max(2, min(LEVELS, int(MAX_CANDIDATES ** (1 / len(ranges)))))
        axes = [_log_spaced(ranks, levels) for ranks in ranges]
        return [ranks for ranks in itertools.product(*axes) if self.shrinks(layer, ranks, constraints)]

    def shrinks(self, layer: Layer, ranks: tuple[int, ...], constraints: RankConstraints = FEWER_PARAMS) -> bool:
        """Whether the factorized layer is smaller than the dense one in every cost that the constraints name."""
        costs = self.costs(layer, ranks)
        return all(costs[cost] < layer.costs[cost] for cost in constraints.smaller_in)

    def _structure(self, weight: Shape) -> tuple[Part, ...]:
        """The parts at the least ranks, for what does not depend on ranks."""
        return self.parts(weight, (1,) * len(self.kind.rank_names()))

    def _part_macs(self, layer: Layer, ranks: tuple[int, ...], counted: tuple[int, ...]) -> list[int]:
        """Multiply-accumulates of each part for one input with the ranks `counted`; 0 if it is not built at `ranks`."""
        indices = builders(self.parts(layer.weight, ranks))
        shapes, positions = self.factor_shapes(layer.weight, counted), self.positions(layer)
        return [
            math.prod(shape) * count * layer.calls if builder == index else 0
            for index, (builder, shape, count) in enumerate(zip(indices, shapes, positions, strict=True))
        ]

    def _rank_range(self, layer: Layer, constraints: RankConstraints, ranges: Sequence[range], axis: int) -> range:
        def grows(rank: int) -> bool:
            # Costs rise with a rank, but may fall at the last one, where a part is not built.
            ends = [{rank} if other == axis else {*ranks[:1], *ranks[-1:]} for other, ranks in enumerate(ranges)]
            return not any(self.shrinks(layer, each, constraints) for each in itertools.product(*ends))

        ranks = ranges[axis]
        paying = ranks[: bisect.bisect_left(ranks[:-1], True, key=grows)]
        if not ranks or grows(ranks[-1]):
            return paying
        return ranks if paying else ranks[-1:]


def root(energy: Tensor | float) -> float:
    """The root of an energy that rounding may have made negative."""
    return math.sqrt(max(0.0, float(energy)))


def nearest_rank(ranks: range, wanted: float) -> int:
    """The rank of `ranks`, one kind's from `Method.rank_ranges`, that is nearest to `wanted`."""
    return ranks[min(len(ranks), max(1, round(wanted / ranks.step))) - 1]


def _log_spaced(ranks: range, levels: int) -> list[int]:
    counts = [math.exp(math.log(len(ranks)) * step / (levels - 1)) for step in range(levels)] if ranks else []
    return sorted({nearest_rank(ranks, ranks.step * count) for count in counts})


def has_positions(weight: Shape) -> bool:
    """Whether a kernel (out, in, *kernel) covers more than one position."""
    return math.prod(weight[2:]) > 1


def is_separable(weight: Shape) -> bool:
    """Whether a kernel has a height and a width to be separated."""
    return len(weight) == 4 and min(weight[2:]) > 1


def every_axis(weight: Shape) -> tuple[int, ...]:
    """The axes of a kernel (out, in, *kernel) for a `Part` that covers all of its positions."""
    return tuple(range(len(weight) - 2))
