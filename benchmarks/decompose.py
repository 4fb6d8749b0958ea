"""Compare the decompositions with tensorly's, in one run on the same weights.

    python benchmarks/decompose.py --write         # about half an hour on two cores; makes the tables of docs/benchmarks.md
    python benchmarks/decompose.py --nets LeNet    # minutes; prints them only

Weights are untrained, but get a decaying spectrum, so that low ranks approximate them. Both sides run in float32 with the
same number of threads, on the same rank grid (ten levels a mode), to the same stopping tolerance. Where tensorly would take
hours for the grid, evenly spaced ranks of it are timed and the total is extrapolated; the table says how many.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

# As the command line does: a waiting thread gives up its core, so that other processes slow it down less.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import tensorly as tl
import torch
import torchvision
from pages import machine, row, said, table, write_section
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.preparing import kernel
from ranksearch.compress.profile import profile
from ranksearch.compress.whitening import Whitening, inputs_wanted, whitenings
from ranksearch.methods import METHODS
from ranksearch.models import lenet
from ranksearch.plan import CP, Tucker2
from ranksearch.spec import Space
from ranksearch.strategy.space import applies, space_of
from ranksearch.tensors.cp import cp_path, reconstruct
from ranksearch.tensors.tucker import hooi, hosvd
from ranksearch.tensors.vbmf import vbmf

T = TypeVar("T")
SPECTRUM_EXPONENT = 0.7
"""The k-th singular value of every unfolding is about k^-0.7, as in trained networks."""
TOLERANCE, MAX_SWEEPS = 1e-4, 60
"""Of both tensorly decompositions. Ours stop at the same tolerance, or after the number of sweeps in a profile."""
TIMED_RANK_PAIRS = {"LeNet": 100, "NIN": 20, "ResNet-18": 8, "ResNet-50": 8}
"""Rank pairs of each layer at which `partial_tucker` is timed, out of a hundred."""

NIN = ((192, 3, 5), (160, 192, 1), (96, 160, 1), (192, 96, 5), (192, 192, 1), (192, 192, 1), (192, 192, 3), (192, 192, 1),
       (192, 192, 1), (10, 192, 1))  # fmt: skip
"""Network-in-Network's convolutions: out, in, size."""


def nin() -> nn.Module:
    """Network-in-Network's convolutions in a row, without pooling and activations, which do not matter here."""
    return nn.Sequential(*(nn.Conv2d(into, out, size, padding=size // 2) for out, into, size in NIN))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (lenet, (1, 3, 32, 32)),
    "NIN": (nin, (1, 3, 32, 32)),
    "ResNet-18": (torchvision.models.resnet18, (1, 3, 224, 224)),
    "ResNet-50": (torchvision.models.resnet50, (1, 3, 224, 224)),
}


LARGE = {"AlexNet": torchvision.models.alexnet, "VGG-16": torchvision.models.vgg16}
"""Nets with large fully connected layers, at 224 pixels, with torchvision's initial weights: making a decaying spectrum would
take longer than their profiles."""


@dataclass(frozen=True)
class Row:
    """One net or kernel: seconds on each side, extrapolated from `sampled` of `whole` fits, and the error ratios ours /
    tensorly's of the sampled fits."""

    ours: float
    theirs: float
    ratios: tuple[float, ...]
    sampled: int
    whole: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=[*NETS, *LARGE], help="only these")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    tl.set_backend("pytorch")
    warnings.filterwarnings("ignore")
    nets = [name for name in NETS if not options.nets or name in options.nets]
    large = [name for name in LARGE if not options.nets or name in options.nets]
    parts = [machine("torch", "tensorly"), vbmf_line()]
    for make, names in ((profile_table, nets), (study_table, large), (tucker_table, nets), (cp_table, nets)):
        parts += ["", *make(names)] if names else []
    if options.write:
        write_section("decompose", "python benchmarks/decompose.py --write", "\n".join(parts))


def built(name: str) -> tuple[nn.Module, Inventory]:
    """The net, its weights with a decaying spectrum, and its inventory."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    decay_(model)
    return model, inventory(model, torch.zeros(shape))


def decay_(model: nn.Module) -> None:
    """Give every kernel a decaying spectrum along its channel modes, plus a little noise, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                for mode in (0, 1):
                    size = weight.shape[mode]
                    basis = torch.linalg.qr(torch.randn(size, size))[0]
                    scale = torch.arange(1, size + 1).float().pow(-SPECTRUM_EXPONENT)
                    weight.copy_(torch.tensordot(basis * scale, weight, dims=([1], [mode])).movedim(0, mode))
                weight.div_(weight.std()).mul_(0.05).add_(torch.randn_like(weight), alpha=1e-3)


def vbmf_line() -> str:
    matrix = torch.randn(512, 20) @ torch.randn(20, 4608) + torch.randn(512, 4608)
    seconds, found = timed(lambda: vbmf(matrix))
    return said(f"VBMF of a 512x4608 unfolding with 20 planted ranks: rank {found.rank}, {seconds:.2f} s.")


def profile_table(nets: Sequence[str]) -> list[str]:
    """A profile by all methods, fitted to the weights. Each net runs in its own process, for its peak memory."""
    lines = table(["whole profile", "layers", "candidates", "seconds", "memory above the model"])
    for name in nets:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            layers, count, seconds, grown = pool.submit(profile_seconds, name).result()
        lines.append(row(name, layers, count, f"{seconds:.1f}", f"{grown:.2f} GiB"))
    return lines


def profile_seconds(name: str) -> tuple[int, int, float, float]:
    model, found = built(name)
    methods = {layer.name: [m for m in METHODS.values() if applies(m, layer)] for layer in found.layers}
    before = peak_gib()
    seconds, count = timed(lambda: sum(1 for p in profile(model, found, methods).layers.values() for _ in p.candidates()))
    return len(found.layers), count, seconds, peak_gib() - before


def study_table(nets: Sequence[str]) -> list[str]:
    """The profile of a study with the default settings: three methods, fitted for as many random pictures as a study takes."""
    head = ["a study's profile", "layers", "candidates", "moments of pictures", "decompositions", "memory above the model"]
    lines = table(head)
    for name in nets:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            layers, count, pictures, moments, whole, grown = pool.submit(study_seconds, name).result()
        rest = tuple(both - part for both, part in zip(whole, moments, strict=True))
        cells = [f"{wall:.0f} s ({cpu:.0f} s of CPU)" for wall, cpu in (moments, rest)]
        cells[0] = f"{pictures}: {cells[0]}"
        lines.append(row(name, layers, count, *cells, f"{grown:.1f} GiB"))
    return lines


def study_seconds(name: str) -> tuple[int, int, int, tuple[float, ...], tuple[float, ...], float]:
    """Layers, candidates, pictures, (wall, CPU) seconds until the moments are measured, (wall, CPU) seconds in all, GiB."""
    torch.manual_seed(0)
    model, spec = LARGE[name](weights=None).eval(), Space()
    found = inventory(model, torch.randn(1, 3, 224, 224))
    inputs = torch.randn(inputs_wanted(found.macs), 3, 224, 224)
    methods = {axis.layer.name: axis.methods for axis in space_of(spec, found).axes}
    before, begun, marks = peak_gib(), clocks(), []

    def measured(*given: Any) -> dict[str, tuple[Whitening, ...]]:
        result = whitenings(*given)
        marks.append(clocks())
        return result

    with TemporaryDirectory() as cache, patch("ranksearch.compress.profile.whitenings", measured):
        layers = profile(model, found, methods, inputs=inputs, cache=Path(cache)).layers.values()
    parts = [tuple(now - then for now, then in zip(mark, begun, strict=True)) for mark in (*marks, clocks())]
    count = sum(len(list(p.candidates())) for p in layers)
    return len(found.layers), count, len(inputs), parts[0], parts[1], peak_gib() - before


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds. CPU seconds are more reliable on a busy machine."""
    return time.perf_counter(), time.process_time()


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tucker_table(nets: Sequence[str]) -> list[str]:
    """Our HOSVD runs once for each layer and serves all pairs of ranks. Tensorly's HOOI and our refinement run per pair."""
    method = METHODS[Tucker2]
    head = ["Tucker-2", "pairs (timed)", "`partial_tucker`", "one HOSVD a layer", "faster", "mean error", "largest",
            "within 1 %", "and a HOOI sweep a pair", "faster", "mean error", "largest", "within 1 %"]  # fmt: skip
    lines = table(head)
    for name in nets:
        model, found = built(name)
        once, refined = [], []
        for layer in found.layers:
            if not applies(method, layer):
                continue
            tensor, grid = kernel(model, layer).flatten(2), method.rank_grid(layer)
            chosen = [grid[i] for i in np.unique(np.linspace(0, len(grid) - 1, TIMED_RANK_PAIRS[name]).round().astype(int))]
            times = len(grid) / len(chosen)
            seconds, fit = timed(partial(hosvd, tensor))
            more, errors = timed(fit.errors)
            sweep, ours = timed(partial(each, partial(hooi, tensor, fit, sweeps=1), chosen))
            theirs, their_factors = timed(partial(each, partial(tensorly_hooi, tensor), chosen))
            swept = [tucker_error(tensor, *parts) for parts in ours]
            peers = [tucker_error(tensor, *parts) for parts in their_factors]
            ratios = [float(errors[i - 1, o - 1]) / e for (i, o), e in zip(chosen, peers, strict=True) if e > 1e-3]
            better = [mine / e for mine, e in zip(swept, peers, strict=True) if e > 1e-3]
            once.append(Row(seconds + more, theirs * times, tuple(ratios), len(chosen), len(grid)))
            refined.append(Row(seconds + sweep * times, theirs * times, tuple(better), len(chosen), len(grid)))
        plain, best = summed(once), summed(refined)
        cells = [name, f"{plain.whole} ({plain.sampled})", f"{plain.theirs:.0f} s"]
        lines.append(row(*cells, *compared(plain), *compared(best)))
    return lines


def compared(rows: Row) -> list[str]:
    ratios = np.array(rows.ratios)
    within = f"{100 * (ratios < 1.01).mean():.0f} %"
    return [f"{rows.ours:.1f} s", f"{rows.theirs / rows.ours:.0f}x", f"{ratios.mean():.4f}", f"{ratios.max():.4f}", within]


def tensorly_hooi(tensor: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    (core, (u_out, u_in)), _ = partial_tucker(
        tensor, rank=[rank_out, rank_in], modes=[0, 1], init="svd", tol=TOLERANCE, n_iter_max=MAX_SWEEPS
    )
    return core, u_out, u_in


def tucker_error(tensor: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor) -> float:
    return float((torch.einsum("abk,oa,ib->oik", core, u_out, u_in) - tensor).norm() / tensor.norm())


def cp_table(nets: Sequence[str]) -> list[str]:
    """Each distinct kernel of all nets at its ten ranks, both sides with the same tolerance."""
    method = METHODS[CP]
    head = [
        "CP of",
        "ranks",
        "`parafac`",
        "ours",
        "faster",
        "mean error",
        "largest error",
        "largest degeneracy: theirs",
        "ours",
    ]
    lines, seen = table(head), set()
    for name in nets:
        model, found = built(name)
        for layer in found.layers:
            if not applies(method, layer) or min(layer.weight[:2]) < 32 or layer.weight in seen:
                continue
            seen.add(layer.weight)
            tensor, ranks = kernel(model, layer).flatten(2), [rank for (rank,) in method.rank_grid(layer)]
            ours, fits = timed(partial(cp_path, tensor, ranks))
            theirs, peers = timed(partial(each, partial(parafac_fit, tensor), [(rank,) for rank in ranks]))
            ratios = [fits[rank].error / error for rank, (error, _) in zip(ranks, peers, strict=True)]
            worst = max(degeneracy for _, degeneracy in peers), max(fit.degeneracy for fit in fits.values())
            lines.append(
                row(
                    "x".join(map(str, tensor.shape)), f"{ranks[0]}..{ranks[-1]}", f"{theirs:.1f} s", f"{ours:.1f} s",
                    f"{theirs / ours:.1f}x", f"{np.mean(ratios):.4f}", f"{max(ratios):.4f}", f"{worst[0]:.0f}",
                    f"{worst[1]:.0f}",
                )
            )  # fmt: skip
    return lines


def parafac_fit(tensor: Tensor, rank: int) -> tuple[float, float]:
    """Relative error and degeneracy: sum of the squared norms of the terms / squared norm of the tensor."""
    found = parafac(tensor, rank, init="svd", tol=TOLERANCE, n_iter_max=MAX_SWEEPS, random_state=0)
    scaled = [found.factors[0] * found.weights, *found.factors[1:]]
    terms = torch.stack([factor.norm(dim=0) for factor in scaled]).prod(0)
    return float((reconstruct(scaled) - tensor).norm() / tensor.norm()), float((terms.norm() / tensor.norm()).square())


def summed(rows: Sequence[Row]) -> Row:
    ratios = tuple(ratio for r in rows for ratio in r.ratios)
    return Row(
        sum(r.ours for r in rows), sum(r.theirs for r in rows), ratios, sum(r.sampled for r in rows),
        sum(r.whole for r in rows),
    )  # fmt: skip


def each(call: Callable[..., T], arguments: Sequence[Sequence[int]]) -> list[T]:
    return [call(*given) for given in arguments]


def timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
