"""The profile of a model: for each layer and each candidate factorization, its costs and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress.inventory import Inventory
from ranksearch.compress.preparing import Work, done_at_once
from ranksearch.compress.whitening import Whitening, source, whitenings
from ranksearch.methods import FEWER_PARAMS, METHODS, Method, Prepared, RankConstraints
from ranksearch.methods.groups import joint_errors, split, stack
from ranksearch.methods.layer import Layer
from ranksearch.plan import KINDS, Factorization, Plan
from ranksearch.results.costs import Counts
from ranksearch.tensors.matrix import norm_of


@dataclass(frozen=True)
class Candidate(Counts):
    """One factorization of one layer, with its relative error and its costs by name.

    The error is that of the whitened kernel, which estimates the error of the layer's outputs; without data that of the kernel.
    For SVD it is within 7 % of the true error of the outputs, for Tucker-2 and CP, whose whitening is a Kronecker product, only
    within 50 %. So predictions are less exact between methods than within one.
    """

    value: Factorization
    error: float
    costs: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class GroupProfile:
    """The decompositions of one kernel (out, in, *kernel): of a layer, or of one of its groups.

    Each method decomposes its own `whitened` kernel, the kernel times the roots of the whitening, and its factors are folded
    back. Without data the whitened kernel is the kernel itself.
    """

    kernel: Tensor
    prepared: Mapping[str, Prepared]
    whitening: Whitening
    whitened: Mapping[str, Tensor]
    seed: int

    def factors(self, value: Factorization, sweeps: int) -> tuple[Tensor, ...]:
        """The factors of `value`, refined by `sweeps`: a pure function of both, the kernel, the whitening and the seed."""
        method, name, weight = METHODS[type(value)], value.method, tuple(self.kernel.shape)
        found = method.factors(self.whitened[name], self.prepared[name], value.ranks, self.seed, sweeps)
        if not self.whitening.roots:
            return found
        return method.balanced(self.whitening.fold(found, method.holds(weight), weight), weight)

    def of(self, kernel: Tensor, value: Factorization) -> GroupProfile:
        """The decomposition of another kernel by `value` only, with the same whitening."""
        method, name = METHODS[type(value)], value.method
        whitened = self.whitening.whiten(kernel, method.holds(tuple(kernel.shape)))
        prepared = {name: method.prepare(whitened, [value.ranks], self.seed)}
        return replace(self, kernel=kernel, prepared=prepared, whitened={name: whitened})


@dataclass(frozen=True)
class LayerProfile:
    """The decompositions of one layer, by group, and its VBMF ranks. A layer without groups is one group."""

    layer: Layer
    groups: tuple[GroupProfile, ...]
    vbmf: tuple[int | None, int | None]
    constraints: RankConstraints = FEWER_PARAMS

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods that were prepared."""
        return tuple(self.groups[0].prepared)

    @property
    def kernel(self) -> Tensor:
        """The kernel (out, in, *kernel), stacked over the groups."""
        return stack([(group.kernel,) for group in self.groups])[0]

    def factors(self, value: Factorization, *, sweeps: int = 0) -> tuple[Tensor, ...]:
        """The factors of `value`, refined by `sweeps`, stacked over the groups."""
        return stack([group.factors(value, sweeps) for group in self.groups])

    def of(self, kernel: Tensor, value: Factorization) -> LayerProfile:
        """The same layer with another stacked kernel, for example after training, prepared for `value` only.

        The whitening stays that of the original inputs.
        """
        kernels = split([kernel], len(self.groups))
        groups = [group.of(one, value) for group, (one,) in zip(self.groups, kernels, strict=True)]
        return replace(self, groups=tuple(groups))

    def bias_correction(self, value: Factorization, factors: Sequence[Tensor]) -> Tensor | None:
        """The term (out,) to add to the layer's bias so that the mean input keeps its output with the factors of `value`.

        None if nothing is to be added.
        """
        means = [group.whitening.mean.flatten() for group in self.groups if group.whitening.mean is not None]
        if not means:
            return None
        rebuilt = METHODS[type(value)].reconstruct(factors, self.layer.weight, self.layer.groups)
        differences = (rebuilt - self.kernel).flatten(1).tensor_split(len(means))
        return -torch.cat([difference @ mean for difference, mean in zip(differences, means, strict=True)])

    def candidates(self) -> Iterator[Candidate]:
        """Every method at every rank of its `rank_grid`: all are smaller than the dense layer."""
        for name in self.methods:
            method = METHODS[KINDS[name]]
            grid = method.rank_grid(self.layer, self.constraints)
            for ranks, error in zip(grid, self._errors(method, grid), strict=True):
                yield Candidate(method.value(self.layer, ranks), error, method.costs(self.layer, ranks))

    def _errors(self, method: Method, grid: Sequence[tuple[int, ...]]) -> list[float]:
        """The relative errors of the whitened kernels at some prepared ranks, over all groups."""
        name = method.kind.method
        errors = [method.errors(group.prepared[name], grid) for group in self.groups]
        weights = [math.sqrt(group.whitening.variance) for group in self.groups]
        norms = [weight * norm_of(group.whitened[name]) for weight, group in zip(weights, self.groups, strict=True)]
        return joint_errors(errors, norms)


@dataclass(frozen=True)
class Profile:
    """The profiles of the layers of one model, in call order."""

    layers: Mapping[str, LayerProfile]

    @property
    def vbmf(self) -> dict[str, tuple[int | None, int | None]]:
        """By layer, the VBMF ranks of its input and output unfolding."""
        return {name: layer.vbmf for name, layer in self.layers.items()}

    def factors(self, plan: Plan, *, sweeps: int = 0) -> dict[str, tuple[Tensor, ...]]:
        """The factors of every layer that the plan names, refined by `sweeps`."""
        return {name: self.layers[name].factors(value, sweeps=sweeps) for name, value in plan}

    def bias_corrections(self, plan: Plan, factors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The terms to add to the biases of the plan's layers, given its factors; layers without a correction are left out."""
        found = {name: self.layers[name].bias_correction(value, factors[name]) for name, value in plan}
        return {name: bias_correction for name, bias_correction in found.items() if bias_correction is not None}


def profile(
    model: nn.Module,
    inventory: Inventory,
    methods: Mapping[str, Sequence[Method]],
    *,
    constraints: RankConstraints = FEWER_PARAMS,
    inputs: Any = None,
    cache: Path | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Profile:
    """Decompose each layer by each of its methods, on the CPU, or read the results from `cache`.

    Args:
        model: the dense model.
        inventory: its layers.
        methods: by layer name, the methods to prepare.
        constraints: the ranks to prepare them for.
        inputs: a batch of the training split. With them, each decomposition minimises the error of its layer's outputs on
            these inputs; without, the error of its weights.
        cache: a folder for one file per layer. A damaged file, or one with other contents, is replaced.
        seed: of CP's random starts.
        on_layer: called with each layer's name when the layer is done.

    Raises:
        ModelError: the inputs of a layer hold NaN or infinity.
    """
    # A whitening is identified by a hash of its inputs: its own last bits change with the number of threads.
    about = "" if inputs is None else source(model, inputs)
    layers = [Work.of(model, layer, methods.get(layer.name, ()), constraints, about, seed, cache) for layer in inventory.layers]
    missing = {work.layer: work.holds for work in layers if work.known is None and work.methods}
    measured = whitenings(model, missing, inputs) if inputs is not None and missing else {}
    for work in layers:
        work.begin(measured.get(work.layer.name, (Whitening(),) * work.layer.groups))
    found = {}
    for work in done_at_once(layers):
        work.finish()
        groups = tuple(
            GroupProfile(kernel, work.prepared(group), work.whitenings[group], work.whitened(group), seed)
            for group, kernel in enumerate(work.kernels)
        )
        found[work.layer.name] = LayerProfile(work.layer, groups, work.vbmf, constraints)
        on_layer(work.layer.name)
    return Profile({layer.name: found[layer.name] for layer in inventory.layers})
