"""The decompositions of single layers: made in parts, side by side, or read from a file of the cache."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranksearch.compress.axes import as_maps
from ranksearch.compress.whitening import Modes, Whitening
from ranksearch.methods import Method, Prepared, RankConstraints
from ranksearch.methods.layer import Layer
from ranksearch.support.files import write_whole, writing
from ranksearch.tensors.matrix import Principal, norm_of, principal, unfold
from ranksearch.tensors.vbmf import vbmf

T = TypeVar("T")

_LEAST = 4
"""Rows that an unfolding needs for an estimate of its rank."""

Grid: TypeAlias = Sequence[tuple[int, ...]]

DIGEST = "ranksearch-profile"
"""Where a cached file's header holds the digest of what it was made from."""

ROOT, MEAN, ERRORS, VBMF = "input root", "input mean", "weight errors", "VBMF ranks"
"""What a cached file calls the parts of a layer's whitening, the weight errors at the prepared ranks, and the VBMF ranks. The
rest stands under the names of the methods, which hold no spaces."""


def kernel(model: nn.Module, layer: Layer) -> Tensor:
    """The layer's weight as the kernel (out, in, *kernel) that is decomposed, on the CPU, in float32 or better."""
    weight = model.get_parameter(f"{layer.name}.weight").detach().cpu()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return as_maps(weight, layer.weight[1:], layer.order).contiguous()


def vbmf_ranks(kernel: Tensor) -> tuple[int | None, int | None]:
    """VBMF ranks of the unfoldings of a kernel (out, in, *kernel) by input and by output channels; None: no estimate.

    An unfolding of fewer than `_LEAST` rows is left out: the estimate of its noise means nothing.
    """
    if kernel.dim() == 2 and min(kernel.shape) >= _LEAST:
        # Of a matrix and its transpose.
        return (rank := _estimate(kernel, 0)), rank
    return _estimate(kernel, 1), _estimate(kernel, 0)


def _estimate(kernel: Tensor, mode: int) -> int | None:
    return (vbmf(unfold(kernel, mode)).rank or None) if kernel.shape[mode] >= _LEAST else None


@dataclass
class Work:
    """One layer to decompose: each method's part by itself, in any thread; `known` is what the cache holds of it."""

    layer: Layer
    kernel: Tensor
    methods: Mapping[str, Method]
    grids: Mapping[str, Grid]
    seed: int
    digest: str
    path: Path | None
    known: dict[str, Tensor] | None
    whitening: Whitening = field(init=False)
    _made: dict[str, Tensor] = field(default_factory=dict)
    _whitened: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """By method, the kernel that it decomposes; methods of equal runs share one, and its principal vectors."""
    _rows: dict[str, Callable[[], Principal]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layer: Layer,
        methods: Sequence[Method],
        constraints: RankConstraints,
        about: str,
        seed: int,
        cache: Path | None,
    ) -> Work:
        """`about` tells what the layer's metric follows from; empty if it has none."""
        weight, wanted = kernel(model, layer), {method.kind.method: method for method in methods}
        grids = {name: method.rank_grid(layer, constraints) for name, method in wanted.items()}
        # Layers of equal weights are one to a plain profile; their inputs may differ.
        digest = _digest(weight, grids, about and f"{about}|{layer.name}", seed)
        path = cache / f"{_as_file_name(layer.name)}-{digest}.safetensors" if cache else None
        return cls(layer, weight, wanted, grids, seed, digest, path, _read(path, digest) if path else None)

    @property
    def holds(self) -> list[Modes]:
        """The runs of kernel modes that some factor of some method holds."""
        return [modes for method in self.methods.values() for modes in method.holds(self.layer.weight)]

    @property
    def parts(self) -> list[str]:
        """What there is to do, the longest first: of a layer's methods CP takes longest, and stands last."""
        return [*reversed(list(self.methods)), VBMF]

    @property
    def vbmf(self) -> tuple[int | None, int | None]:
        """The VBMF ranks, once they are known."""
        into, out = (self.known or self._made)[VBMF].tolist()
        return into or None, out or None

    @property
    def whitened(self) -> dict[str, Tensor]:
        """By method, the kernel that it decomposes."""
        return {name: whitened() for name, whitened in self._whitened.items()}

    def begin(self, measured: Whitening) -> None:
        """Take the metric: `measured`, or the one in the cache."""
        self.whitening = measured.to(self.kernel.dtype) if self.known is None else _as_metric(self.known)
        shared: dict[tuple[Modes, ...], tuple[Callable[[], Tensor], Callable[[], Principal]]] = {}
        for name, method in self.methods.items():
            holds = method.holds(self.layer.weight)
            runs = self.whitening.runs(holds)
            if runs not in shared:
                whitened = _once(partial(self.whitening.whiten, self.kernel, holds))
                shared[runs] = whitened, _once(partial(_principal_rows, whitened))
            self._whitened[name], self._rows[name] = shared[runs]

    def do(self, part: str) -> None:
        """One of the `parts`."""
        if part != VBMF:
            self._whitened[part]()
        if self.known is None:
            self._made |= self._vbmf() if part == VBMF else self._decomposed(part)

    def finish(self) -> Mapping[str, Tensor]:
        """All tensors, which the cache keeps; once all parts are done."""
        self._rows.clear()
        if self.known is None:
            self._made |= {f"{ROOT}/{','.join(map(str, modes))}": root for modes, root in self.whitening.roots.items()}
            self._made |= {} if self.whitening.mean is None else {MEAN: self.whitening.mean}
            if self.path:
                with writing(f"The layer's factors {self.path}"):
                    write_whole(self.path, safetensors.torch.save(self._made, {DIGEST: self.digest}))
        return self.known or self._made

    def _vbmf(self) -> dict[str, Tensor]:
        return {VBMF: torch.tensor([rank or 0 for rank in vbmf_ranks(self.kernel)])}

    def _decomposed(self, name: str) -> dict[str, Tensor]:
        method, whitened = self.methods[name], self._whitened[name]()
        prepared = method.prepare(whitened, self.grids[name], self.seed, self._rows[name])
        tensors = {f"{name}/{key}": value.contiguous().clone() for key, value in prepared.items()}
        errors = self._weight_errors(name, prepared)
        return tensors | {f"{ERRORS}/{name}": torch.tensor(errors, dtype=torch.float64)}

    def _weight_errors(self, name: str, prepared: Prepared) -> list[float]:
        """The relative errors of the kernel itself at the prepared ranks."""
        method, grid, weight = self.methods[name], self.grids[name], self.layer.weight
        if not self.whitening.roots:
            return method.errors(prepared, grid)

        def factors_at(ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
            found = method.factors(self._whitened[name](), prepared, ranks, self.seed)
            return self.whitening.fold(found, method.holds(weight), weight)

        norm = norm_of(self.kernel)
        # A kernel of zeros is exact at every rank.
        return [lost / norm if norm else 0.0 for lost in method.distances(self.kernel, grid, factors_at)]


def done_at_once(layers: Sequence[Work]) -> Iterator[Work]:
    """The layers as they are done: as many parts at once as torch has threads, one thread each, the largest layer first.

    The many small products of one layer gain little from several threads: measured on two cores, a factor of 1.0 to 1.4
    against 1.7 for two layers at once. And one thread computes the same last bits whatever the number of cores.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        largest_first = sorted(layers, key=lambda work: -work.layer.params)
        parts = {pool.submit(work.do, part): work for work in largest_first for part in work.parts}
        left = {work.layer.name: len(work.parts) for work in layers}
        for done in as_completed(parts):
            done.result()
            work = parts[done]
            left[work.layer.name] -= 1
            if not left[work.layer.name]:
                yield work
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            # Partly global: a thread of the pool has set it for this one, too.
            torch.set_num_threads(threads)


def under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors called `name/...`, by the rest of their names."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _principal_rows(kernel: Callable[[], Tensor]) -> Principal:
    return principal(kernel().flatten(1))


def _once(compute: Callable[[], T]) -> Callable[[], T]:
    """Computes when it is first called, in whichever thread; others that call it then wait for the result."""
    lock, kept = threading.Lock(), list[T]()

    def call() -> T:
        with lock:
            if not kept:
                kept.append(compute())
            return kept[0]

    return call


def _as_metric(tensors: Mapping[str, Tensor]) -> Whitening:
    roots = {tuple(map(int, modes.split(","))): root for modes, root in under(tensors, ROOT).items()}
    return Whitening(roots, tensors.get(MEAN))


def _digest(kernel: Tensor, grids: Mapping[str, Grid], whitening: str, seed: int) -> str:
    # The algorithms' own version stands in the hash, so that a cache of an older release is not read.
    about = f"7|{sorted(grids.items())}|{whitening}|{seed}|{tuple(kernel.shape)}|{kernel.dtype}"
    return hashlib.sha256(about.encode() + kernel.contiguous().numpy().tobytes()).hexdigest()[:16]


def _as_file_name(layer: str) -> str:
    # Only for the reader of the folder; the digest tells layers apart. A file's name may not be much longer.
    return re.sub(r"[^\w.-]", "_", layer)[-100:]


def _read(path: Path, digest: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(DIGEST) == digest:
                # Cloned into memory of torch's own alignment, on which the last bits of a product depend.
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass
    return None
