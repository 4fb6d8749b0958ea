"""The decomposition core against tensorly, side by side in one run on the same weights.

    python benchmarks/decompose.py            # about half an hour on two cores; prints the tables of docs/benchmarks.md
    python benchmarks/decompose.py --quick    # LeNet and ResNet-18 with fewer of tensorly's ranks

Weights are untrained, given a decaying spectrum so that ranks mean something. Both sides run in float32 with the same
number of threads, on the same rank grid (ten levels a mode), to the same stopping tolerance. Where tensorly's whole grid
would take hours, evenly spaced ranks of it are timed and the whole is extrapolated; the table says how many.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import tensorly as tl
import torch
import torchvision
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

from ranksearch.factorization import METHODS
from ranksearch.layers import Layer, inventory
from ranksearch.models import lenet
from ranksearch.plan import CP, Tucker2
from ranksearch.profile import kernel, profile, rank_grid
from ranksearch.strategy.space import applies
from ranksearch.tensors.cp import cp_als, reconstruct
from ranksearch.tensors.tucker import HOSVD, hosvd
from ranksearch.tensors.vbmf import vbmf

T = TypeVar("T")
DECAY = 0.7
"""Singular values of every unfolding fall about as k^-0.7, as those of trained networks do."""
TOLERANCE, SWEEPS = 1e-4, 60

NIN = ((192, 3, 5), (160, 192, 1), (96, 160, 1), (192, 96, 5), (192, 192, 1), (192, 192, 1), (192, 192, 3), (192, 192, 1),
       (192, 192, 1), (10, 192, 1))  # fmt: skip
"""Network-in-Network's convolutions: out, in, size."""


def nin() -> nn.Module:
    """Network-in-Network's convolutions in a row; pooling and activations make no difference here."""
    return nn.Sequential(*(nn.Conv2d(into, out, size, padding=size // 2) for out, into, size in NIN))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (lenet, (1, 3, 32, 32)),
    "NIN": (nin, (1, 3, 32, 32)),
    "ResNet-18": (torchvision.models.resnet18, (1, 3, 224, 224)),
    "ResNet-50": (torchvision.models.resnet50, (1, 3, 224, 224)),
}


@dataclass(frozen=True)
class Timed:
    """Seconds on each side, the worst ratio of errors (ours / tensorly's), and how much of tensorly's grid was timed."""

    ours: float
    theirs: float
    worst: float
    sampled: int
    whole: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two nets, fewer of tensorly's ranks")
    parser.add_argument("--nets", nargs="+", choices=NETS, help="only these")
    options = parser.parse_args()
    tl.set_backend("pytorch")
    warnings.filterwarnings("ignore")
    names = options.nets or (["LeNet", "ResNet-18"] if options.quick else list(NETS))
    versions = f"torch {torch.__version__}, tensorly {version('tensorly')}, Python {platform.python_version()}"
    print(f"{versions}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n")
    vbmf_table()
    for name in names:
        make, shape = NETS[name]
        torch.manual_seed(0)
        model = make().eval()
        decay_(model)
        found = inventory(model, torch.zeros(shape))
        print(f"\n### {name}: {found.params:,} parameters, {len(found.layers)} layers\n", flush=True)
        tucker_table(model, found.layers, samples=3 if options.quick else 6)
        cp_table(model, found.layers)
        profile_line(model, found)


def decay_(model: nn.Module) -> None:
    """Give every kernel a decaying spectrum along its channel modes, and a little noise."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                for mode in (0, 1):
                    size = weight.shape[mode]
                    basis = torch.linalg.qr(torch.randn(size, size))[0]
                    scale = torch.arange(1, size + 1).float().pow(-DECAY)
                    weight.copy_(torch.tensordot(basis * scale, weight, dims=([1], [mode])).movedim(0, mode))
                weight.div_(weight.std()).mul_(0.05).add_(torch.randn_like(weight), alpha=1e-3)


def vbmf_table() -> None:
    matrix = torch.randn(512, 20) @ torch.randn(20, 4608) + torch.randn(512, 4608)
    seconds, found = timed(lambda: vbmf(matrix))
    print(f"VBMF of a 512x4608 unfolding with 20 planted ranks: rank {found.rank}, {seconds:.2f} s")


def tucker_table(model: nn.Module, layers: Sequence[Layer], *, samples: int) -> None:
    """One HOSVD a layer serves every pair of ranks; tensorly's HOOI runs once a pair."""
    method, rows = METHODS[Tucker2], []
    for layer in layers:
        if applies(method, layer):
            tensor = kernel(model, layer).flatten(2)
            grid = [ranks for ranks in rank_grid(method, layer) if min(ranks) > 1] or rank_grid(method, layer)
            ours, errors = timed(lambda t=tensor: all_errors(hosvd(t)))
            chosen = [grid[i] for i in np.unique(np.linspace(0, len(grid) - 1, samples).round().astype(int))]
            theirs, found = timed(lambda t=tensor, c=chosen: [hooi_error(t, ranks) for ranks in c])
            worst = max(float(errors[i - 1, o - 1]) / e for (i, o), e in zip(chosen, found, strict=True) if e > 1e-4)
            rows.append(Timed(ours, theirs * len(grid) / len(chosen), worst, len(chosen), len(grid)))
    total = summed(rows)
    print(
        f"Tucker-2, {len(rows)} layers, {total.whole} rank pairs: ours {total.ours:.2f} s; partial_tucker "
        f"{total.theirs:.0f} s (extrapolated from {total.sampled} pairs): {total.theirs / total.ours:.0f}x; largest ratio of "
        f"errors {total.worst:.4f}",
        flush=True,
    )


def all_errors(found: HOSVD) -> Tensor:
    return found.errors()


def hooi_error(tensor: Tensor, ranks: tuple[int, int]) -> float:
    rank_in, rank_out = ranks
    (core, factors), _ = partial_tucker(
        tensor, rank=[rank_out, rank_in], modes=[0, 1], init="svd", tol=TOLERANCE, n_iter_max=SWEEPS
    )
    rebuilt = torch.einsum("abk,oa,ib->oik", core, factors[0], factors[1])
    return float((rebuilt - tensor).norm() / tensor.norm())


def cp_table(model: nn.Module, layers: Sequence[Layer]) -> None:
    """The distinct large kernels, each at one rank, both sides from scratch to the same tolerance."""
    seen = set()
    for layer in layers:
        if applies(METHODS[CP], layer) and min(layer.weight[:2]) >= 64 and layer.weight not in seen:
            seen.add(layer.weight)
            tensor, rank = kernel(model, layer).flatten(2), min(64, min(layer.weight[:2]) // 2)
            ours, fit = timed(lambda t=tensor, r=rank: cp_als(t, r, tolerance=TOLERANCE, sweeps=SWEEPS))
            theirs, error = timed(lambda t=tensor, r=rank: parafac_error(t, r))
            print(
                f"CP rank {rank} of {'x'.join(map(str, tensor.shape))}: ours {ours:.2f} s, error {fit.error:.4f}, degeneracy "
                f"{fit.degeneracy:.1f}; parafac {theirs:.2f} s, error {error:.4f}: {theirs / ours:.1f}x",
                flush=True,
            )


def parafac_error(tensor: Tensor, rank: int) -> float:
    found = parafac(tensor, rank, init="svd", tol=TOLERANCE, n_iter_max=SWEEPS, random_state=0)
    scaled = [found.factors[0] * found.weights, *found.factors[1:]]
    return float((reconstruct(scaled) - tensor).norm() / tensor.norm())


def profile_line(model: nn.Module, found) -> None:  # type: ignore[no-untyped-def]
    """Everything that a study asks of the core before its first trial: all methods, all layers, all errors."""
    methods = {layer.name: [m for m in METHODS.values() if applies(m, layer)] for layer in found.layers}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, count = timed(lambda: sum(1 for p in profile(model, found, methods).layers.values() for _ in p.candidates()))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"Whole profile, all methods: {count} candidates in {seconds:.1f} s; peak memory grew by {grown:.2f} GiB", flush=True)


def summed(rows: Sequence[Timed]) -> Timed:
    return Timed(
        sum(r.ours for r in rows), sum(r.theirs for r in rows), max(r.worst for r in rows), sum(r.sampled for r in rows),
        sum(r.whole for r in rows),
    )  # fmt: skip


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
