"""Per layer, what every candidate costs and how far it is from the dense weights; kept on disk by weight hash."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranksearch.factorization import FEWER_PARAMS, METHODS, Method, Offer, Prepared, nearest_rank
from ranksearch.files import write_whole
from ranksearch.layers import Inventory, Layer
from ranksearch.plan import KINDS, Factorization, Plan
from ranksearch.tensors.matrix import unfold
from ranksearch.tensors.vbmf import vbmf

LEVELS = 10
"""Ranks a mode that a profile looks at, evenly spaced on a log scale."""

Grid: TypeAlias = Sequence[tuple[int, ...]]

DIGEST = "ranksearch-profile"
"""Where a cached file's header holds the digest of what it was made from."""


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer: relative weight error, parameters and MACs."""

    value: Factorization
    error: float
    params: int
    macs: int


@dataclass(frozen=True)
class LayerProfile:
    """The decompositions of one layer: its kernel (out, in, *kernel), what each method prepared, the VBMF ranks."""

    layer: Layer
    kernel: Tensor
    prepared: Mapping[str, Prepared]
    vbmf: tuple[int | None, int | None]
    seed: int
    offer: Offer = FEWER_PARAMS

    def factors(self, value: Factorization) -> tuple[Tensor, ...]:
        """The factors of `value`; a pure function of the kernel, the value and the profile's seed."""
        method = METHODS[type(value)]
        return method.factors(self.kernel, self.prepared[value.method], value.ranks, self.seed)

    def error(self, value: Factorization) -> float:
        """The relative error (Frobenius) of the kernel that the factors of `value` stand for."""
        rebuilt = METHODS[type(value)].reconstruct(self.factors(value), tuple(self.kernel.shape))
        norm = torch.linalg.vector_norm(self.kernel)
        # A kernel of zeros is exact at every rank.
        return float(torch.linalg.vector_norm(rebuilt - self.kernel) / norm) if norm else 0.0

    def candidates(self) -> Iterator[Candidate]:
        """Every prepared method at every level of rank that is smaller than the dense layer."""
        for name, prepared in self.prepared.items():
            method = METHODS[KINDS[name]]
            grid = rank_grid(method, self.layer, self.offer)
            for ranks, error in zip(grid, method.errors(prepared, grid), strict=True):
                params, macs = method.params(self.layer, ranks), method.macs(self.layer, ranks)
                yield Candidate(method.value(self.layer, ranks), error, params, macs)


@dataclass(frozen=True)
class Profile:
    """The profiles of the layers of one model, in call order."""

    layers: Mapping[str, LayerProfile]

    def factors(self, plan: Plan) -> dict[str, tuple[Tensor, ...]]:
        """The factors of every layer that the plan names."""
        return {name: self.layers[name].factors(value) for name, value in plan}


def rank_grid(method: Method, layer: Layer, offer: Offer = FEWER_PARAMS) -> list[tuple[int, ...]]:
    """The levels of rank of one method that pay: log-spaced from its least to its largest, every pair for two ranks."""
    axes = [_log_spaced(ranks) for ranks in method.offered(layer, offer)]
    return [ranks for ranks in itertools.product(*axes) if method.pays(layer, ranks, offer)]


def profile(
    model: nn.Module,
    inventory: Inventory,
    methods: Mapping[str, Sequence[Method]],
    *,
    offer: Offer = FEWER_PARAMS,
    cache: Path | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Profile:
    """Decompose each layer by each of its methods, or read that from `cache`.

    Args:
        model: the dense model.
        inventory: its layers.
        methods: by layer name, the decompositions to prepare.
        offer: the ranks to prepare them for.
        cache: a folder for one file a layer; a torn or foreign file is made again, not trusted.
        seed: of the random starts that CP uses.
        on_layer: called with each layer's name when it is done.
    """
    found = {}
    for layer in inventory.layers:
        weight = kernel(model, layer)
        wanted = {method.kind.method: method for method in methods.get(layer.name, ())}
        grids = {name: rank_grid(method, layer, offer) for name, method in wanted.items()}
        digest = _digest(weight, grids, seed)
        path = cache / f"{_as_file_name(layer.name)}-{digest}.safetensors" if cache else None
        tensors = _read(path, digest) if path else None
        if tensors is None:
            tensors = _prepare(weight, wanted, grids, seed)
            if path:
                write_whole(path, safetensors.torch.save(tensors, {DIGEST: digest}))
        prepared = {
            name: {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            for name in wanted
        }
        found[layer.name] = LayerProfile(layer, weight, prepared, _ranks(tensors["vbmf"]), seed, offer)
        on_layer(layer.name)
    return Profile(found)


def vbmf_ranks(kernel: Tensor) -> tuple[int | None, int | None]:
    """VBMF ranks of the unfoldings of a kernel (out, in, *kernel) by input and by output channels; None: no estimate.

    An unfolding of fewer than four rows is left out: the estimate of its noise means nothing.
    """
    return _estimate(kernel, 1), _estimate(kernel, 0)


def _estimate(kernel: Tensor, mode: int) -> int | None:
    return (vbmf(unfold(kernel, mode)).rank or None) if kernel.shape[mode] >= 4 else None


def _prepare(kernel: Tensor, methods: Mapping[str, Method], grids: Mapping[str, Grid], seed: int) -> dict[str, Tensor]:
    tensors = {"vbmf": torch.tensor([rank or 0 for rank in vbmf_ranks(kernel)])}
    for name, method in methods.items():
        for key, value in method.prepare(kernel, grids[name], seed).items():
            tensors[f"{name}/{key}"] = value.contiguous().clone()
    return tensors


def kernel(model: nn.Module, layer: Layer) -> Tensor:
    """The layer's weight as the kernel (out, in, *kernel) that is decomposed, on the CPU, in float32 or better."""
    weight = model.get_parameter(f"{layer.name}.weight").detach().cpu()
    return (weight if weight.dtype == torch.float64 else weight.float()).reshape(layer.weight)


def _digest(kernel: Tensor, grids: Mapping[str, Grid], seed: int) -> str:
    # The algorithms' own version stands in the hash, so that a cache of an older release is not read.
    about = f"4|{sorted(grids.items())}|{seed}|{tuple(kernel.shape)}|{kernel.dtype}"
    return hashlib.sha256(about.encode() + kernel.contiguous().numpy().tobytes()).hexdigest()[:16]


def _as_file_name(layer: str) -> str:
    # Only for the reader of the folder; the digest tells layers apart. A file's name may not be much longer.
    return re.sub(r"[^\w.-]", "_", layer)[-100:]


def _read(path: Path, digest: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(DIGEST) == digest:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass
    return None


def _ranks(stored: Tensor) -> tuple[int | None, int | None]:
    into, out = stored.tolist()
    return into or None, out or None


def _log_spaced(ranks: range) -> list[int]:
    counts = [math.exp(math.log(len(ranks)) * step / (LEVELS - 1)) for step in range(LEVELS)] if ranks else []
    return sorted({nearest_rank(ranks, ranks.step * count) for count in counts})
