"""Decomposes single layers, several parts in parallel, or reads their factors from the cache."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranksearch.compress.axes import as_maps
from ranksearch.compress.plain import plain_of
from ranksearch.compress.whitening import Modes, Whitening
from ranksearch.errors import PlanError
from ranksearch.methods import Method, Prepared, RankConstraints
from ranksearch.methods.groups import split
from ranksearch.methods.layer import Layer, as_kernel
from ranksearch.support.files import write_whole, writing
from ranksearch.support.once import once
from ranksearch.tensors.matrix import Rows, norm_of, unfold
from ranksearch.tensors.vbmf import vbmf

MAX_ERROR_OFF = 0.01
"""How far a relative error that a user's method gives may be off."""
_LEAST = 4
"""The fewest rows of an unfolding for which VBMF estimates the rank."""

Grid: TypeAlias = Sequence[tuple[int, ...]]

DIGEST = "ranksearch-profile"
"""The key in a cached file's header that holds the digest of its inputs."""

ROOT, MEAN, VARIANCE, VBMF = "input root", "input mean", "input variance", "VBMF ranks"
"""Names in a cached file: a layer's whitening (three), the VBMF ranks. All other
tensors are stored under the names of methods, which contain no spaces. Tensors of groups are stacked along a first axis."""


def kernel(model: nn.Module, layer: Layer) -> Tensor:
    """The kernel (out, in, *kernel) of a layer to decompose, stacked over its groups, on the CPU, in float32 or float64."""
    plain = plain_of(model.get_submodule(layer.name), layer.padding)
    assert plain is not None  # the inventory skips other layers
    weight = as_kernel(plain.layer, plain.layer.weight.detach().cpu())
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return as_maps(weight, layer.weight[1:], layer.order).contiguous()


def vbmf_ranks(kernel: Tensor) -> tuple[int | None, int | None]:
    """VBMF ranks of the unfoldings of a kernel (out, in, *kernel) by input and by output channels; None means no estimate.

    An unfolding of fewer than `_LEAST` rows gets none, since an estimate of its noise would be meaningless.
    """
    if kernel.dim() == 2 and min(kernel.shape) >= _LEAST:
        # The unfoldings are a matrix and its transpose, which have the same rank.
        return (rank := _estimate(kernel, 0)), rank
    return _estimate(kernel, 1), _estimate(kernel, 0)


def _estimate(kernel: Tensor, mode: int) -> int | None:
    return (vbmf(unfold(kernel, mode)).rank or None) if kernel.shape[mode] >= _LEAST else None


def joint_vbmf_ranks(kernels: Sequence[Tensor]) -> tuple[int | None, int | None]:
    """One estimate for all groups of a layer: their median, where a group without an estimate counts as 0; None if that is 0.

    The largest of many estimates would grow with the number of groups by chance alone.
    """
    estimates = zip(*map(vbmf_ranks, kernels), strict=True)
    into, out = (statistics.median_high(rank or 0 for rank in ranks) or None for ranks in estimates)
    return into, out


@dataclass
class Work:
    """One layer to decompose, in independent parts that any thread can do. `known` holds its tensors if they are cached."""

    layer: Layer
    kernels: tuple[Tensor, ...]
    """The kernel (out, in, *kernel) of each group."""
    methods: Mapping[str, Method]
    grids: Mapping[str, Grid]
    seed: int
    digest: str
    path: Path | None
    known: dict[str, Tensor] | None
    whitenings: tuple[Whitening, ...] = field(init=False)
    _made: dict[str, Tensor] = field(default_factory=dict)
    _whitened: dict[str, list[Callable[[], Tensor]]] = field(default_factory=dict)
    """By method, each group's whitened kernel. Methods with equal whitening runs share it and its principal vectors."""
    _rows: dict[str, list[Rows]] = field(default_factory=dict)

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
        """`about` is the digest of what the layer's whitening depends on; empty without whitening."""
        weight, wanted = kernel(model, layer), {method.kind.method: method for method in methods}
        grids = {name: method.rank_grid(layer, constraints) for name, method in wanted.items()}
        # With whitening the digest includes the layer's name: layers of equal weights may have different inputs.
        digest = _digest(weight, grids, about and f"{about}|{layer.name}", seed, layer.groups)
        path = cache / f"{_as_file_name(layer.name)}-{digest}.safetensors" if cache else None
        kernels = tuple(one for (one,) in split([weight], layer.groups))
        return cls(layer, kernels, wanted, grids, seed, digest, path, _read(path, digest) if path else None)

    @property
    def holds(self) -> list[Modes]:
        """The runs of kernel modes held by the factors of all methods."""
        return [modes for method in self.methods.values() for modes in method.holds(self.layer.weight)]

    @property
    def vbmf(self) -> tuple[int | None, int | None]:
        """The VBMF ranks. Only available once that part is done."""
        into, out = (self.known or self._made)[VBMF].tolist()
        return into or None, out or None

    def whitened(self, group: int) -> dict[str, Tensor]:
        """By method, the whitened kernel of a group."""
        return {name: whitened[group]() for name, whitened in self._whitened.items()}

    def prepared(self, group: int) -> dict[str, Prepared]:
        """By method, what it prepared for a group. Only available once all parts are done."""
        tensors = self.known or self._made
        return {name: {key: stack[group] for key, stack in under(tensors, name).items()} for name in self.methods}

    def begin(self, measured: Sequence[Whitening]) -> None:
        """Set the whitening of each group: those in the cache, otherwise `measured`."""
        if self.known is None:
            self._made |= _stacked([each.to(self.kernels[0].dtype) for each in measured])
        # Unstacked in both cases, since the last bits of a product depend on where in memory a tensor begins.
        self.whitenings = _unstacked(self.known or self._made)
        shared: dict[tuple[Modes, ...], tuple[list[Callable[[], Tensor]], list[Rows]]] = {}
        for name, method in self.methods.items():
            holds = method.holds(self.layer.weight)
            runs = self.whitenings[0].runs(holds)
            if runs not in shared:
                pairs = zip(self.kernels, self.whitenings, strict=True)
                whitened = [once(partial(whitening.whiten, kernel, holds)) for kernel, whitening in pairs]
                shared[runs] = whitened, [_rows_of(each) for each in whitened]
            self._whitened[name], self._rows[name] = shared[runs]

    def do(self, part: str) -> None:
        """Do one of the `parts`."""
        if part != VBMF:
            for whitened in self._whitened[part]:
                whitened()
        if self.known is None:
            self._made |= self._vbmf() if part == VBMF else self._decomposed(part)

    def finish(self) -> None:
        """Write all tensors to the cache. Only call this once all parts are done."""
        self._rows.clear()
        if self.known is None and self.path:
            with writing(f"The layer's factors {self.path}"):
                write_whole(self.path, safetensors.torch.save(self._made, {DIGEST: self.digest}))

    def _vbmf(self) -> dict[str, Tensor]:
        return {VBMF: torch.tensor([rank or 0 for rank in joint_vbmf_ranks(self.kernels)])}

    def _decomposed(self, name: str) -> dict[str, Tensor]:
        method, grid = self.methods[name], self.grids[name]
        pairs = zip(self._whitened[name], self._rows[name], strict=True)
        prepared = [method.prepare(whitened(), grid, self.seed, rows) for whitened, rows in pairs]
        if grid and method.is_foreign:
            check_error(method, self._whitened[name][0](), prepared[0], grid[0], self.seed)
        return {f"{name}/{key}": torch.stack([each[key] for each in prepared]) for key in prepared[0]}


def check_error(method: Method, kernel: Tensor, prepared: Prepared, ranks: tuple[int, ...], seed: int) -> None:
    """Raise `PlanError` if a method says another error at these ranks than its factors have: the error decides the search."""
    (said,) = method.errors(prepared, [ranks])
    factors = method.factors(kernel, prepared, ranks, seed)
    lost = norm_of(method.reconstruct(factors, tuple(kernel.shape)) - kernel)
    found = lost / (norm_of(kernel) or 1.0)
    if not abs(said - found) <= MAX_ERROR_OFF:
        raise PlanError(
            f"{type(method).__name__}.errors must give relative errors, norm(kernel - reconstruction) / norm(kernel), but at "
            f"the ranks {ranks} of a kernel of shape {tuple(kernel.shape)} it gives {said:.4g}, and its factors have "
            f"{found:.4g}."
        )


def done_at_once(layers: Sequence[Work]) -> Iterator[Work]:
    """Do all parts of all layers in parallel, and yield each layer when it is done.

    Each part runs in one thread, as many at once as torch has threads, those of the largest layer first. The small products of
    one layer gain little from several threads: on two cores a factor of 1.0 to 1.4, against 1.7 for two layers at once. And
    with one thread the last bits do not depend on the number of cores. The last of a layer's methods (the slowest, CP, if it is
    there) and VBMF come first. The others come at the end, since they need the principal vectors that CP computes for all.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        largest_first = sorted(layers, key=lambda work: -work.layer.params)
        at_first = [(work, part) for work in largest_first for part in (*list(work.methods)[-1:], VBMF)]
        later = [(work, part) for work in largest_first for part in list(work.methods)[:-1]]
        parts = {pool.submit(work.do, part): work for work, part in at_first + later}
        left = {work.layer.name: len(work.methods) + 1 for work in layers}
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
            # The setting is partly global: the pool's threads have changed it for this thread, too.
            torch.set_num_threads(threads)


def under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors called `name/...`, with that prefix removed from their names."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _rows_of(kernel: Callable[[], Tensor]) -> Rows:
    return Rows(lambda: kernel().flatten(1))


def _stacked(whitenings: Sequence[Whitening]) -> dict[str, Tensor]:
    """The whitenings of a layer's groups as tensors to store."""
    tensors = {VARIANCE: torch.tensor([each.variance for each in whitenings], dtype=torch.float64)}
    for modes in whitenings[0].roots:
        tensors[f"{ROOT}/{','.join(map(str, modes))}"] = torch.stack([each.roots[modes] for each in whitenings])
    means = [each.mean for each in whitenings if each.mean is not None]
    return tensors | ({MEAN: torch.stack(means)} if means else {})


def _unstacked(tensors: Mapping[str, Tensor]) -> tuple[Whitening, ...]:
    """The inverse of `_stacked`."""
    roots = {tuple(map(int, modes.split(","))): stack for modes, stack in under(tensors, ROOT).items()}
    means, variances = tensors.get(MEAN), tensors[VARIANCE].tolist()
    return tuple(
        Whitening({modes: stack[group] for modes, stack in roots.items()}, None if means is None else means[group], variance)
        for group, variance in enumerate(variances)
    )


def _digest(kernel: Tensor, grids: Mapping[str, Grid], whitening: str, seed: int, groups: int) -> str:
    # The hash includes a version of the algorithms (10), so that caches of older releases are not used.
    about = f"10|{sorted(grids.items())}|{whitening}|{seed}|{tuple(kernel.shape)}|{groups}|{kernel.dtype}"
    return hashlib.sha256(about.encode() + kernel.contiguous().numpy().tobytes()).hexdigest()[:16]


def _as_file_name(layer: str) -> str:
    # Only for people who look into the folder: the digest identifies the layer. File names have a length limit.
    return re.sub(r"[^\w.-]", "_", layer)[-100:]


def _read(path: Path, digest: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(DIGEST) == digest:
                # Cloned to get torch's own memory alignment, on which the last bits of a product depend.
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass
    return None
