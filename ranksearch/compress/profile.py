"""Per layer, what every candidate costs and how far it is from the dense layer; kept on disk by the hash of its sources."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranksearch.compress.axes import as_maps
from ranksearch.compress.inventory import Inventory
from ranksearch.compress.whitening import Modes, Whitening, source, whitenings
from ranksearch.methods import FEWER_PARAMS, METHODS, Method, Prepared, RankConstraints
from ranksearch.methods.layer import Layer
from ranksearch.plan import KINDS, Factorization, Plan
from ranksearch.results.costs import Counts
from ranksearch.support.files import write_whole, writing
from ranksearch.tensors.matrix import unfold
from ranksearch.tensors.vbmf import vbmf

Grid: TypeAlias = Sequence[tuple[int, ...]]

DIGEST = "ranksearch-profile"
"""Where a cached file's header holds the digest of what it was made from."""

ROOT, MEAN, ERRORS = "input root", "input mean", "weight errors"
"""What a cached file calls the parts of a layer's whitening, and the weight errors at the prepared ranks. The rest stands under
the names of the methods, which hold no spaces."""


@dataclass(frozen=True)
class Candidate(Counts):
    """One way to store one layer: its relative weight error, and its costs by name.

    `data_error` is the relative error in the metric of the layer's inputs that the method fits, an estimate of that of
    its outputs; None without data.
    """

    value: Factorization
    error: float
    costs: Mapping[str, float] = field(hash=False)
    data_error: float | None = None


@dataclass(frozen=True)
class LayerProfile:
    """The decompositions of one layer: its kernel (out, in, *kernel), what each method prepared, the VBMF ranks.

    Each method decomposes its own `whitened` kernel, times the metric's roots, and its factors are folded back; without
    data that is the kernel itself.
    """

    layer: Layer
    kernel: Tensor
    prepared: Mapping[str, Prepared]
    vbmf: tuple[int | None, int | None]
    seed: int
    whitening: Whitening
    whitened: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    """By method, the relative weight errors of its `rank_grid`, in that order."""
    constraints: RankConstraints = FEWER_PARAMS

    def factors(self, value: Factorization, *, sweeps: int = 0) -> tuple[Tensor, ...]:
        """The factors of `value`, refined by `sweeps`; a pure function of these, the kernel, the metric and the seed."""
        method, name, weight = METHODS[type(value)], value.method, tuple(self.kernel.shape)
        found = method.factors(self.whitened[name], self.prepared[name], value.ranks, self.seed, sweeps)
        if not self.whitening.roots:
            return found
        return method.balanced(self.whitening.fold(found, method.holds(weight), weight), weight)

    def of(self, kernel: Tensor, value: Factorization) -> LayerProfile:
        """The same layer with another kernel (out, in, *kernel), as after some training, prepared for `value` alone; its
        metric stays that of the inputs that the layer had."""
        method, name = METHODS[type(value)], value.method
        whitened = self.whitening.whiten(kernel, method.holds(tuple(kernel.shape)))
        prepared = {name: method.prepare(whitened, [value.ranks], self.seed)}
        return replace(self, kernel=kernel, prepared=prepared, whitened={name: whitened}, errors={})

    def error(self, value: Factorization) -> float:
        """The relative error (Frobenius) of the kernel that the factors of `value` stand for."""
        norm = torch.linalg.vector_norm(self.kernel)
        # A kernel of zeros is exact at every rank.
        return float(torch.linalg.vector_norm(self._difference(value, self.factors(value))) / norm) if norm else 0.0

    def bias_correction(self, value: Factorization, factors: Sequence[Tensor]) -> Tensor | None:
        """What to add to the layer's bias (out,) with the factors of `value`, so that the mean of its inputs gives what it
        gave before; None: nothing."""
        if self.whitening.mean is None:
            return None
        return -self._difference(value, factors).flatten(1) @ self.whitening.mean.flatten()

    def candidates(self) -> Iterator[Candidate]:
        """Every prepared method at every level of rank that is smaller than the dense layer."""
        for name, prepared in self.prepared.items():
            method = METHODS[KINDS[name]]
            grid = method.rank_grid(self.layer, self.constraints)
            fitted = method.errors(prepared, grid) if self.whitening.roots else [None] * len(grid)
            for ranks, error, data_error in zip(grid, self.errors[name].tolist(), fitted, strict=True):
                yield Candidate(method.value(self.layer, ranks), error, method.costs(self.layer, ranks), data_error)

    def _difference(self, value: Factorization, factors: Sequence[Tensor]) -> Tensor:
        return METHODS[type(value)].reconstruct(factors, tuple(self.kernel.shape)) - self.kernel


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
        """What to add to the biases of the layers that the plan names with its factors, where there is something to add."""
        found = {name: self.layers[name].bias_correction(value, factors[name]) for name, value in plan}
        return {name: bias_correction for name, bias_correction in found.items() if bias_correction is not None}


def profile(
    model: nn.Module,
    inventory: Inventory,
    methods: Mapping[str, Sequence[Method]],
    *,
    constraints: RankConstraints = FEWER_PARAMS,
    inputs: Tensor | None = None,
    cache: Path | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Profile:
    """Decompose each layer by each of its methods, on the CPU, or read that from `cache`.

    Args:
        model: the dense model.
        inventory: its layers.
        methods: by layer name, the decompositions to prepare.
        offer: the ranks to prepare them for.
        inputs: (count, ...) of the training split, to fit the factors in the metric of what each layer sees; without
            them every weight counts alike.
        cache: a folder for one file a layer; a torn or foreign file is made again, not trusted.
        seed: of the random starts that CP uses.
        on_layer: called with each layer's name when it is done.

    Raises:
        ModelError: the inputs of a layer hold NaN or infinity.
        StudyError: a file of the cache cannot be written.
    """
    # A metric is known by what it follows from: its own last bits change with the number of threads.
    about = "" if inputs is None else source(model, inputs)
    jobs = [_Job.of(model, layer, methods.get(layer.name, ()), constraints, about, seed, cache) for layer in inventory.layers]
    known = {job.layer.name: _read(job.path, job.digest) for job in jobs if job.path}
    missing = {job.layer: job.holds for job in jobs if known.get(job.layer.name) is None and job.methods}
    measured = whitenings(model, missing, inputs) if inputs is not None and missing else {}

    def layer_profile(job: _Job) -> LayerProfile:
        name, tensors = job.layer.name, known.get(job.layer.name)
        whitening = measured.get(name, Whitening()).to(job.kernel.dtype) if tensors is None else _as_metric(tensors)
        whitened = {kind: whitening.whiten(job.kernel, method.holds(job.layer.weight)) for kind, method in job.methods.items()}
        if tensors is None:
            tensors = _prepare(job, whitening, whitened, seed)
            tensors |= _weight_errors(_as_profile(job, tensors, whitening, whitened, seed, constraints), job)
            if job.path:
                with writing(f"The layer's factors {job.path}"):
                    write_whole(job.path, safetensors.torch.save(tensors, {DIGEST: job.digest}))
        return _as_profile(job, tensors, whitening, whitened, seed, constraints)

    found = {}
    for profiled in _at_once(layer_profile, jobs):
        found[profiled.layer.name] = profiled
        on_layer(profiled.layer.name)
    return Profile({job.layer.name: found[job.layer.name] for job in jobs})


def _at_once(run: Callable[[_Job], LayerProfile], jobs: Sequence[_Job]) -> Iterator[LayerProfile]:
    """The profiles as they are ready: as many layers at once as torch has threads, one thread each, the largest first.

    The many small products of one layer gain little from several threads: measured on two cores, a factor of 1.0 to 1.4
    against 1.7 for two layers at once. And one thread computes the same last bits whatever the number of cores.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        largest_first = sorted(jobs, key=lambda job: -job.layer.params)
        for done in as_completed([pool.submit(run, job) for job in largest_first]):
            yield done.result()
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            # Partly global: a thread of the pool has set it for this one, too.
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Job:
    """One layer to decompose, and the file of the cache that holds the outcome."""

    layer: Layer
    kernel: Tensor
    methods: Mapping[str, Method]
    grids: Mapping[str, Grid]
    digest: str
    path: Path | None

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
    ) -> _Job:
        weight, wanted = kernel(model, layer), {method.kind.method: method for method in methods}
        grids = {name: method.rank_grid(layer, constraints) for name, method in wanted.items()}
        # Layers of equal weights are one to a plain profile; their inputs may differ.
        digest = _digest(weight, grids, about and f"{about}|{layer.name}", seed)
        path = cache / f"{_as_file_name(layer.name)}-{digest}.safetensors" if cache else None
        return cls(layer, weight, wanted, grids, digest, path)

    @property
    def holds(self) -> list[Modes]:
        """The runs of kernel modes that some factor of some method holds."""
        return [modes for method in self.methods.values() for modes in method.holds(self.layer.weight)]


def vbmf_ranks(kernel: Tensor) -> tuple[int | None, int | None]:
    """VBMF ranks of the unfoldings of a kernel (out, in, *kernel) by input and by output channels; None: no estimate.

    An unfolding of fewer than four rows is left out: the estimate of its noise means nothing.
    """
    return _estimate(kernel, 1), _estimate(kernel, 0)


def _estimate(kernel: Tensor, mode: int) -> int | None:
    return (vbmf(unfold(kernel, mode)).rank or None) if kernel.shape[mode] >= 4 else None


def _prepare(job: _Job, whitening: Whitening, whitened: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    tensors = {"vbmf": torch.tensor([rank or 0 for rank in vbmf_ranks(job.kernel)])}
    tensors |= {f"{ROOT}/{','.join(map(str, modes))}": root for modes, root in whitening.roots.items()}
    tensors |= {} if whitening.mean is None else {MEAN: whitening.mean}
    for name, method in job.methods.items():
        for key, value in method.prepare(whitened[name], job.grids[name], seed).items():
            tensors[f"{name}/{key}"] = value.contiguous().clone()
    return tensors


def _weight_errors(layer: LayerProfile, job: _Job) -> dict[str, Tensor]:
    """Kept with the rest: where the factors are fitted in a metric, the weights' error asks for a reconstruction each."""
    errors = {}
    for name, method in job.methods.items():
        if layer.whitening.roots:
            found = [layer.error(method.value(job.layer, ranks)) for ranks in job.grids[name]]
        else:
            found = method.errors(layer.prepared[name], job.grids[name])
        errors[f"{ERRORS}/{name}"] = torch.tensor(found, dtype=torch.float64)
    return errors


def _as_profile(
    job: _Job,
    tensors: Mapping[str, Tensor],
    whitening: Whitening,
    whitened: Mapping[str, Tensor],
    seed: int,
    constraints: RankConstraints,
) -> LayerProfile:
    prepared = {kind: _under(tensors, kind) for kind in job.methods}
    errors = _under(tensors, ERRORS)
    return LayerProfile(
        job.layer, job.kernel, prepared, _ranks(tensors["vbmf"]), seed, whitening, whitened, errors, constraints
    )


def _as_metric(tensors: Mapping[str, Tensor]) -> Whitening:
    roots = {tuple(map(int, modes.split(","))): root for modes, root in _under(tensors, ROOT).items()}
    return Whitening(roots, tensors.get(MEAN))


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def kernel(model: nn.Module, layer: Layer) -> Tensor:
    """The layer's weight as the kernel (out, in, *kernel) that is decomposed, on the CPU, in float32 or better."""
    weight = model.get_parameter(f"{layer.name}.weight").detach().cpu()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return as_maps(weight, layer.weight[1:], layer.order).contiguous()


def _digest(kernel: Tensor, grids: Mapping[str, Grid], whitening: str, seed: int) -> str:
    # The algorithms' own version stands in the hash, so that a cache of an older release is not read.
    about = f"6|{sorted(grids.items())}|{whitening}|{seed}|{tuple(kernel.shape)}|{kernel.dtype}"
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


def _ranks(stored: Tensor) -> tuple[int | None, int | None]:
    into, out = stored.tolist()
    return into or None, out or None
