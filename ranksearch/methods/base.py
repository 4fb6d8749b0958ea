"""`Method`, the base class of every decomposition: from ranks to costs, factors and modules.

`Method.parts` is the single source of a decomposition's size and structure: the parameters, the multiply-accumulates, the
modules and the reconstructed kernel all follow from it. Not every part is built: a 1x1 part with as many outputs as inputs,
such as the first of Tucker-2 if its rank is the number of input channels, is multiplied into its neighbour, and costs nothing,
unless that neighbour is depthwise (`parts.builders`).
"""

from __future__ import annotations

import abc
import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ranksearch.methods.groups import shape_of_stack, split, stack
from ranksearch.methods.layer import Layer, Padding, groups_of
from ranksearch.methods.parts import Part, Shape, assemble, builders, built, built_factors, composed, map_sizes
from ranksearch.plan import Factorization
from ranksearch.tensors.matrix import Rows

Prepared: TypeAlias = Mapping[str, Tensor]
"""Results for one layer from which factors at any rank are cheap to compute; tensors by name, so that they can be stored."""
Estimate: TypeAlias = Literal["in", "out", "larger"]
"""Which VBMF rank to use: of the unfolding by input channels, of that by output channels, or the larger of the two."""

MAX_RANK_VALUES = 10
"""How many values of each rank a profile tries, evenly spaced on a log scale, for methods with one or two ranks."""
MAX_CANDIDATES = 128
"""How many combinations of ranks a profile tries at most for one layer and method; with three ranks, five values each."""
MAX_ALS_RANK = 512
"""The largest rank that ALS fits, since it solves linear systems of this size. Only fully connected layers behind a map reach
it. For VGG-16's first one, 4096x512x49, all fits of a profile up to rank 1,024 take two minutes on one core, up to 512 a third
of that."""

CHANNEL_BLOCK = 16
"""Channels that a processor's vector instructions take at once, in float32: 8 or 16."""


@dataclass(frozen=True)
class RankConstraints:
    """Which ranks are allowed for a layer.

    Attributes:
        multiple: ranks must be multiples of this, as suits some hardware. A rank whose bound is smaller is fixed at its bound.
        smaller_in: the costs ("params", "macs") in which the layer must be smaller than dense.
    """

    multiple: int = 1
    smaller_in: tuple[str, ...] = ("params",)


FEWER_PARAMS = RankConstraints()
"""The default: every rank at which the layer has fewer parameters than dense."""


class Method(abc.ABC):
    """One decomposition, without state. `weight` is always a kernel's shape (out, in, *kernel); factors are in forward order.

    If a layer has groups, `weight` is the kernel of one group, and so are the kernels and factors that a subclass sees.

    A subclass defines the attributes and the abstract methods; it overrides nothing else.
    """

    kind: ClassVar[type[Factorization]]
    """The type of the plan's values that select this method."""
    vbmf: ClassVar[tuple[Estimate, ...]]
    """For each rank, the VBMF estimate to take it from."""
    vbmf_turn: ClassVar[int] = 100
    """The method's turn to lead the VBMF plans, the lowest first; a leading method is used for every layer that it can store.
    A method with turn 0 leads only if no other method can."""
    by_als: ClassVar[bool] = False
    """Whether alternating least squares fits the factors."""

    @abc.abstractmethod
    def applies(self, weight: Shape, *, linear: bool) -> bool:
        """Whether this decomposition can store a kernel of this shape; `linear` is True for a fully connected layer."""

    @abc.abstractmethod
    def bounds(self, weight: Shape) -> tuple[int, ...]:
        """The ranks at which every kernel of this shape is reproduced exactly, so the largest useful ones."""

    @abc.abstractmethod
    def parts(self, weight: Shape, ranks: tuple[int, ...]) -> tuple[Part, ...]:
        """The sequence of convolutions that stores a kernel of shape `weight` at these ranks; the first is not depthwise.

        Their number and `axes` do not depend on the ranks. `parts.builders` says which of them are built.
        """

    @abc.abstractmethod
    def prepare(self, kernel: Tensor, ranks: Sequence[tuple[int, ...]], seed: int, rows: Rows | None = None) -> Prepared:
        """Do the work for one kernel (out, in, *kernel) that all `ranks` share. Names and shapes do not depend on its values.

        `rows` is that of `kernel.flatten(1)`, which methods share.
        """

    @abc.abstractmethod
    def factors(
        self, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int, sweeps: int = 0
    ) -> tuple[Tensor, ...]:
        """The factors at `ranks`, with the shapes of `factor_shapes`; a pure function of its arguments.

        Where prepared factors are not optimal at their ranks, `sweeps` further sweeps of alternating least squares refine them.
        """

    @abc.abstractmethod
    def errors(self, prepared: Prepared, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        """The relative errors (Frobenius) of the kernel at some of the prepared ranks, without reconstructing it."""

    # --- Derived from the methods above; not overridden. ---

    @property
    def is_foreign(self) -> bool:
        """Whether the method is not one of this package, whose tests hold its errors to its factors."""
        return not type(self).__module__.startswith("ranksearch.")

    def limits(self, weight: Shape) -> tuple[int, ...]:
        """The largest ranks to try, regardless of cost."""
        if not self.by_als:
            return self.bounds(weight)
        # With more terms than the larger number of channels ALS is overcomplete: terms cancel each other instead of fitting.
        return tuple(min(max(weight[:2]), bound, MAX_ALS_RANK) for bound in self.bounds(weight))

    def from_vbmf(self, rank_in: int, rank_out: int) -> tuple[int, ...]:
        """The method's ranks from the VBMF ranks of the input and the output unfolding."""
        estimates = {"in": rank_in, "out": rank_out, "larger": max(rank_in, rank_out)}
        return tuple(estimates[name] for name in self.vbmf)

    def factor_shapes(self, weight: Shape, ranks: tuple[int, ...], groups: int = 1) -> tuple[Shape, ...]:
        """The shapes of the factors of a kernel of shape `weight`, in forward order, stacked over the groups."""
        return tuple(shape_of_stack(part.shape(weight), groups) for part in self.parts(weight, ranks))

    def holds(self, weight: Shape) -> tuple[tuple[int, ...], ...]:
        """For each factor, the kernel's input modes (1: channels, 2 and up: positions) that its last axes stand for."""
        first, *others = [tuple(2 + axis for axis in part.axes) for part in self._structure(weight)]
        return (1, *first), *others

    def positions(self, layer: Layer) -> tuple[int, ...]:
        """For each factor, the number of positions it is applied to for one input, over all calls of the layer.

        They are the positions of the part's output, or, if the layer is a transposed convolution, of the part's input.
        """
        return self._positions(layer, before=layer.transposed)

    def balanced(self, factors: tuple[Tensor, ...], weight: Shape) -> tuple[Tensor, ...]:
        """Rescale `factors` after the whitening was undone, so that fine-tuning starts better; the kernel stays the same."""
        first, second, *_ = self._structure(weight)
        if first.axes or second.depthwise or not second.axes:
            return factors
        # Make the basis of the input channels orthonormal again: this lowered the cross-entropy after three epochs for each of
        # ten Tucker-2 plans of the digits LeNet, by 0.03 on average. For other methods scaling made no difference.
        reduce, core = factors[0].double(), factors[1].double()
        basis, scales = torch.linalg.qr(reduce.T)
        turned = torch.einsum("pq...,rq->pr...", core, scales)
        return basis.T.to(factors[0].dtype), turned.to(factors[1].dtype), *factors[2:]

    def reconstruct(self, factors: Sequence[Tensor], weight: Shape, groups: int = 1) -> Tensor:
        """The kernel of shape `weight` that the factors represent, stacked over the groups."""
        parts = self._structure(weight)
        return stack([(composed(parts, each, weight),) for each in split(factors, groups)])[0]

    def build(
        self,
        module: nn.Module,
        weight: Shape,
        ranks: tuple[int, ...],
        factors: Sequence[Tensor],
        padding: Padding | None = None,
    ) -> nn.Sequential:
        """Plain torch modules that compute the same as `module` with the reconstructed kernel, after zeros around its input."""
        parts = self.parts(weight, ranks)
        groups = [built_factors(parts, each) for each in split(factors, groups_of(module))]
        return assemble(module, weight, built(parts), stack(groups), padding)

    def value(self, layer: Layer, ranks: tuple[int, ...]) -> Factorization:
        """The plan's value for this layer at these ranks."""
        matrix = (layer.weight[0], math.prod(layer.weight[1:]))
        # Factors assume the usual order of the map's axes, so the value must record any other order, even for a matrix.
        as_kernel = layer.flattened and (layer.order is not None or not self.applies(matrix, linear=True))
        kernel, order = (layer.kernel, layer.order) if as_kernel else (None, None)
        return self.kind(*ranks, kernel=kernel, order=order, padding=layer.padding)

    def params(self, layer: Layer, ranks: tuple[int, ...]) -> int:
        """Parameters of the factorized layer, including the bias."""
        factors = sum(math.prod(part.shape(layer.weight)) for part in built(self.parts(layer.weight, ranks)))
        return layer.groups * (factors + (layer.weight[0] if layer.bias else 0))

    def macs(self, layer: Layer, ranks: tuple[int, ...]) -> int:
        """Multiply-accumulates of the factorized layer for one input."""
        return sum(self._part_macs(layer, ranks, ranks))

    def costs(self, layer: Layer, ranks: tuple[int, ...]) -> dict[str, float]:
        """All costs of the factorized layer by name."""
        timed = {"latency": self.latency(layer, ranks)} if layer.latency else {}
        return {"params": self.params(layer, ranks), "macs": self.macs(layer, ranks)} | timed

    def latency(self, layer: Layer, ranks: tuple[int, ...]) -> float:
        """Predicted milliseconds of the factorized layer, which must have been timed."""
        assert layer.latency is not None
        return layer.latency.ms(self.kind.method, self.work(layer, ranks))

    def work(self, layer: Layer, ranks: tuple[int, ...]) -> tuple[float, ...]:
        """What the latency of the factorized layer depends on, for one input; none of these numbers falls as a rank rises,
        except where a part is no longer built.

        They are the number of parts that are built, the multiply-accumulates of each part (0 if it is not built), the same with
        ranks rounded up to `CHANNEL_BLOCK`, the values passed between parts, and the parameters.
        """
        blocks = tuple(-(-rank // CHANNEL_BLOCK) * CHANNEL_BLOCK for rank in ranks)
        macs = [float(count) for counted in (ranks, blocks) for count in self._part_macs(layer, ranks, counted)]
        parts, positions = self.parts(layer.weight, ranks), self._positions(layer, before=False)
        outputs = [layer.groups * parts[index].out * positions[index] for index in sorted(set(builders(parts)))]
        return float(len(outputs)), *macs, float(sum(outputs[:-1])), float(self.params(layer, ranks))

    def rank_ranges(self, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> tuple[range, ...]:
        """For each rank, the values at which the layer shrinks with some values of the others; empty if none."""
        steps = (min(constraints.multiple, bound) for bound in self.bounds(layer.weight))
        # If the bound is below the multiple, it is the start and the step, so the only rank.
        ranges = [range(step, limit + 1, step) for step, limit in zip(steps, self.limits(layer.weight), strict=True)]
        return tuple(self._rank_range(layer, constraints, ranges, axis) for axis in range(len(ranges)))

    def rank_grid(self, layer: Layer, constraints: RankConstraints = FEWER_PARAMS) -> list[tuple[int, ...]]:
        """The ranks that a profile tries: log-spaced values of `rank_ranges`, in all combinations that shrink the layer.

        The more ranks a method has, the fewer values of each.
        """
        ranges = self.rank_ranges(layer, constraints)
        values = max(2, min(MAX_RANK_VALUES, int(MAX_CANDIDATES ** (1 / len(ranges)))))
        axes = [_log_spaced(ranks, values) for ranks in ranges]
        return [ranks for ranks in itertools.product(*axes) if self.shrinks(layer, ranks, constraints)]

    def shrinks(self, layer: Layer, ranks: tuple[int, ...], constraints: RankConstraints = FEWER_PARAMS) -> bool:
        """Whether the factorized layer is smaller than the dense one in every cost that the constraints name."""
        return all(getattr(self, cost)(layer, ranks) < layer.costs[cost] for cost in constraints.smaller_in)

    def _structure(self, weight: Shape) -> tuple[Part, ...]:
        """The parts at rank 1, for everything that does not depend on the ranks."""
        return self.parts(weight, (1,) * len(self.kind.rank_names()))

    def _positions(self, layer: Layer, *, before: bool) -> tuple[int, ...]:
        """For each part, the number of positions of its output for one input, over all calls, or of its input if `before`."""
        counts = [0] * len(self._structure(layer.weight))
        for call in layer.calls:
            sizes = map_sizes(self._structure(layer.weight), call)
            for index, size in enumerate(sizes[:-1] if before else sizes[1:]):
                counts[index] += math.prod(size) * call.times
        return tuple(counts)

    def _part_macs(self, layer: Layer, ranks: tuple[int, ...], counted: tuple[int, ...]) -> list[int]:
        """Multiply-accumulates of each part for one input with the ranks `counted`; 0 if it is not built at `ranks`."""
        indices = builders(self.parts(layer.weight, ranks))
        shapes, positions = self.factor_shapes(layer.weight, counted, layer.groups), self.positions(layer)
        return [
            math.prod(shape) * count if builder == index else 0
            for index, (builder, shape, count) in enumerate(zip(indices, shapes, positions, strict=True))
        ]

    def _rank_range(self, layer: Layer, constraints: RankConstraints, ranges: Sequence[range], axis: int) -> range:
        def grows(rank: int) -> bool:
            # Costs rise with a rank, but may fall at the last one, where a part is not built.
            ends = [{rank} if other == axis else {*ranks[:1], *ranks[-1:]} for other, ranks in enumerate(ranges)]
            return not any(self.shrinks(layer, each, constraints) for each in itertools.product(*ends))

        ranks = ranges[axis]
        shrinking = ranks[: bisect.bisect_left(ranks[:-1], True, key=grows)]
        if not ranks or grows(ranks[-1]):
            return shrinking
        return ranks if shrinking else ranks[-1:]


def nearest_rank(ranks: range, wanted: float) -> int:
    """The value of `ranks`, one of `Method.rank_ranges`, that is nearest to `wanted`."""
    return ranks[min(len(ranks), max(1, round(wanted / ranks.step))) - 1]


def _log_spaced(ranks: range, values: int) -> list[int]:
    counts = [math.exp(math.log(len(ranks)) * step / (values - 1)) for step in range(values)] if ranks else []
    return sorted({nearest_rank(ranks, ranks.step * count) for count in counts})
