"""Measures how much each direction of a layer's inputs matters. The layer's factors are fitted to that whitening."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ranksearch.compress.axes import as_maps
from ranksearch.compress.patches import patches
from ranksearch.compress.plain import Plain, plain_of
from ranksearch.compress.stand_ins import evaluating
from ranksearch.compress.watch import subject
from ranksearch.errors import ModelError
from ranksearch.methods.layer import CONVOLUTIONS, Layer
from ranksearch.methods.parts import zeros_around
from ranksearch.support.batch import batch_to, run_model, split_batch
from ranksearch.support.nesting import named_tensors

Modes: TypeAlias = tuple[int, ...]
"""A run of modes of a kernel (out, in, *kernel): (1,) its input channels, (2, 3) the positions of a 2-D kernel."""

SHRINKAGE = 0.01
"""Share of the identity mixed into every moment matrix. It bounds the condition number, also with dead or duplicate channels.
On the digits LeNet, values from 0.001 to 0.1 and the rule of OAS (Chen et al. 2010) change the output error on held-out inputs
by a few per cent, also with 128 inputs for 2,304 features; 0.1 only makes the predicted error less accurate."""
MAX_MOMENT_ROWS = 4096
"""The most rows of a moment matrix: a Cholesky factor of this size takes a second or two, and 128 MiB."""
MAX_INPUTS, MIN_INPUTS = 512, 128
"""How many inputs the moments are taken of. With 128 the output error on held-out digits is a tenth higher than with 512."""
MAX_MACS = 2 * 10**12
"""Between the two, as many inputs as need no more multiply-accumulates: about 40 seconds on two cores."""
POSITIONS_PER_INPUT = 64
"""How many positions are drawn from each input of a convolution, to save time: neighbouring patches are much the same."""
ROWS = 16384
"""How many rows of a factor are folded at once."""
BATCH = 32
"""Inputs per forward pass. The patches of one such batch are in memory at a time."""
MAX_PATCH_VALUES = 2**23
"""How many values these patches may hold, 64 MiB, before fewer positions are drawn. Large depthwise kernels reach it."""
MIN_RELATIVE_VARIANCE = 1e-9
"""If the variance of a layer's inputs is less than this part of their mean square, they are constant up to rounding."""


@dataclass(frozen=True)
class Whitening:
    """The moments of one layer's inputs, as roots: ||(W' - W) L||, with L L^T the moments, is the expected output error.

    `roots` holds a lower triangular L (d, d) for each run of kernel modes of joint size d. A missing run is split into its
    first mode and the rest; a missing single mode weights all directions alike. So `Whitening()` is the plain norm of the
    weights. `mean` (in, *kernel) is the mean input patch, if the moments are taken around it and the layer has a bias: the
    bias correction then removes the error of the mean. A root has no scale: `variance` is that of the inputs, by which the
    errors of a layer's groups are weighted.
    """

    roots: Mapping[Modes, Tensor] = field(default_factory=dict)
    mean: Tensor | None = None
    variance: float = 1.0

    def to(self, dtype: torch.dtype) -> Whitening:
        """The same whitening in another dtype."""
        roots = {run: root.to(dtype) for run, root in self.roots.items()}
        return replace(self, roots=roots, mean=None if self.mean is None else self.mean.to(dtype))

    def runs(self, holds: Sequence[Modes]) -> tuple[Modes, ...]:
        """The runs whose roots `whiten` multiplies by. Methods with equal runs get equal whitened kernels."""
        return tuple(run for modes in holds for run, _ in self._roots(modes))

    def whiten(self, kernel: Tensor, holds: Sequence[Modes]) -> Tensor:
        """The kernel (out, in, *kernel) times the roots of the runs that the factors hold; the shape stays the same."""
        for modes in holds:
            for run, root in self._roots(modes):
                shape = kernel.shape
                runs = kernel.reshape(math.prod(shape[: run[0]]), len(root), -1)
                kernel = torch.einsum("pdr,de->per", runs, root.to(kernel.dtype)).reshape(shape)
        return kernel

    def fold(self, factors: Sequence[Tensor], holds: Sequence[Modes], weight: Sequence[int]) -> tuple[Tensor, ...]:
        """Convert factors of the whitened kernel, of shape `weight`, to factors of the kernel itself, of the same shapes."""
        return tuple(self._unwhiten(factor, modes, weight) for factor, modes in zip(factors, holds, strict=True))

    def _unwhiten(self, factor: Tensor, modes: Modes, weight: Sequence[int]) -> Tensor:
        shape, sizes = factor.shape, [weight[mode] for mode in modes]
        for run, root in self._roots(modes):
            start = run[0] - modes[0] if modes else 0
            lead = math.prod(shape) // math.prod(sizes) * math.prod(sizes[:start])
            runs = factor.reshape(lead, len(root), -1).movedim(1, -1)
            # In float64, since float32 would lose half the digits in directions of small moments. In blocks, which fit into
            # the processor's cache.
            identity = torch.eye(len(root), dtype=torch.float64, device=root.device)
            inverse = torch.linalg.solve_triangular(root.double(), identity, upper=False)
            blocks = runs.flatten(0, 1).split(ROWS)
            solved = torch.cat([(block.double() @ inverse).to(factor.dtype) for block in blocks])
            factor = solved.reshape(runs.shape).movedim(-1, 1).reshape(shape)
        return factor

    def _roots(self, modes: Modes) -> list[tuple[Modes, Tensor]]:
        if modes in self.roots:
            return [(modes, self.roots[modes])]
        return [*self._roots(modes[:1]), *self._roots(modes[1:])] if len(modes) > 1 else []


def inputs_wanted(macs: int) -> int:
    """How many inputs to take the moments of, for a model of `macs` multiply-accumulates an input."""
    return max(MIN_INPUTS, min(MAX_INPUTS, MAX_MACS // max(1, macs)))


def source(model: nn.Module, inputs: Any) -> str:
    """The digest of everything that a whitening depends on: all weights and buffers of the model, and the inputs."""
    digest = hashlib.sha256(f"4|{SHRINKAGE}|{MAX_MOMENT_ROWS}|{POSITIONS_PER_INPUT}|{BATCH}|{MAX_PATCH_VALUES}".encode())
    kept = model.state_dict()
    # Non-persistent buffers, such as the mean of the inputs, are not in the state dict but change the result, too.
    others = [(name, value) for name, value in model.named_buffers() if name not in kept]
    for name, value in [*kept.items(), *others, *named_tensors(inputs).items()]:
        if isinstance(value, Tensor):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whitenings(model: nn.Module, holds: Mapping[Layer, Iterable[Modes]], inputs: Any) -> dict[str, tuple[Whitening, ...]]:
    """Measure the whitening of each group of each of these layers, by the layer's name.

    It is a pure function of the model and the inputs.

    With it, each decomposition minimises the error of a layer's outputs, not that of its weights (ASVD, Yuan et al. 2023;
    SVD-LLM, Wang et al. 2024; for Tucker-2 and CP: Kalle et al. 2025, arXiv 2511.04494). Each factor holds some of the kernel's
    input modes, and the modes in one factor are whitened together: all of them for SVD, channels and positions separately for
    Tucker-2 and CP. This takes the moments of a patch for the Kronecker product of the two, so that the factors keep their
    shapes and need no special solver. On held-out digits, the LeNet's output errors agree with those that SVD predicts
    within 7 %, and with those that Tucker-2 and CP predict within 50 %.

    Moments are taken around the mean if the mean's error can be corrected: by the layer's bias, or by a batch normalisation
    that is the only reader of the layer's output and whose statistics are measured again. Uncentred, the mean would take the
    first rank of every factor.

    Args:
        model: the dense model; it runs in eval mode, without gradients, and is not changed.
        holds: by layer, the runs of kernel modes to measure. A run of more than `MAX_MOMENT_ROWS` rows is split into its first
            mode and the rest: the features of a flattened 512 x 7 x 7 map into channels and positions. A single mode of more
            rows is not whitened.
        inputs: a batch of the training split, nested in any way, on any device.

    Raises:
        ModelError: a layer's inputs hold NaN or infinity.
    """
    found = {layer.name: _Moments(layer, runs, _plain(model, layer)) for layer, runs in holds.items()}
    followed = _Followed()
    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for name, moments in found.items():
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(moments.add, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(partial(followed.output, name)))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                hooks.enter_context(module.register_forward_pre_hook(followed.normalisation))
        with evaluating(model), torch.no_grad(), followed:
            for batch in split_batch(inputs, BATCH):
                run_model(model, batch_to(batch, device))
                followed.outputs.clear()
    return {name: moments.whitenings(normalised=name in followed.names) for name, moments in found.items()}


def _plain(model: nn.Module, layer: Layer) -> Plain:
    plain = plain_of(model.get_submodule(layer.name), layer.padding)
    assert plain is not None  # the inventory skips other layers
    return plain


class _Followed(TorchFunctionMode):
    """Finds the layers whose outputs only batch normalisations read, and nothing else, such as a shortcut connection."""

    def __init__(self) -> None:
        super().__init__()
        self._reads, self._normalised = Counter[str](), Counter[str]()
        # By id. The tensors are kept alive for the pass, since an id is only unique while its tensor lives.
        self.outputs: dict[int, tuple[str, Tensor]] = {}

    @property
    def names(self) -> set[str]:
        return {name for name, count in self._normalised.items() if count == self._reads[name]}

    def output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.outputs[id(output)] = (name, output)

    def normalisation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and (known := self.outputs.get(id(args[0]))):
            self._normalised[known[0]] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # A function that returns no tensor, such as .dim(), reads no values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._reads.update(self.outputs[id(leaf)][0] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.outputs)
        return result


class _Moments:
    """Sums over the input patches of each group, and over their products for each run of modes, in float64."""

    def __init__(self, layer: Layer, runs: Iterable[Modes], plain: Plain) -> None:
        self.layer, self.plain, self.count = layer, plain, 0
        self._generator = torch.Generator().manual_seed(0)
        self._sum = torch.zeros(layer.groups, *layer.weight[1:], dtype=torch.float64)
        self._products: dict[Modes, Tensor] = {}
        for run in dict.fromkeys(part for whole in runs if whole for part in self._parts(whole)):
            self._products[run] = torch.zeros(layer.groups, *(self._size(run),) * 2, dtype=torch.float64)

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook that adds the patches of a batch of the layer's inputs."""
        patches = self._patches(subject(args, kwargs).detach())
        # Apple's GPUs have no float64, so move to the CPU there. On CUDA the products are computed on the GPU.
        patches = patches.cpu() if patches.device.type == "mps" else patches
        if not bool(torch.isfinite(patches).all()):
            raise ModelError(
                f"The inputs of every layer must be finite on the training data, but those of {self.layer.name!r} hold NaN "
                "or infinity; mend the model, or set space.data_aware = false."
            )
        self.count += len(patches)
        grouped = patches.double().unflatten(1, (self.layer.groups, -1)).transpose(0, 1)
        self._sum += grouped.sum(1).cpu()
        for run, product in self._products.items():
            rows = self._rows(grouped, run)
            product += torch.bmm(rows.mT, rows).cpu()

    def whitenings(self, *, normalised: bool) -> tuple[Whitening, ...]:
        means, centred = self._sum / max(1, self.count), self.layer.bias or normalised
        roots: list[dict[Modes, Tensor]] = [{} for _ in means]
        variances = [1.0] * len(means)
        for run, product in self._products.items():
            moments, rows = product / max(1, self.count), self._rows(means[:, None], run)
            around = moments - torch.bmm(rows.mT, rows) if centred else moments
            for group in range(len(means)):
                roots[group][run] = _root(around[group], energy=float(moments[group].diagonal().mean()))
                # The same for every run, since all of them hold the squares of the whole patch.
                variances[group] = max(0.0, float(around[group].trace()))
        kept = means if centred and self.layer.bias else [None] * len(means)
        return tuple(Whitening(*parts) for parts in zip(roots, kept, variances, strict=True))

    def _parts(self, run: Modes) -> list[Modes]:
        if self._size(run) <= MAX_MOMENT_ROWS:
            return [run]
        return [*self._parts(run[:1]), *self._parts(run[1:])] if len(run) > 1 else []

    def _size(self, run: Modes) -> int:
        return math.prod(self.layer.weight[mode] for mode in run)

    def _rows(self, patches: Tensor, run: Modes) -> Tensor:
        """Reshape patches (groups, count, in, *kernel) to rows (groups, ..., the run's joint size)."""
        dims = [1 + mode for mode in run]
        return patches.movedim(dims, tuple(range(-len(run), 0))).reshape(len(patches), -1, self._size(run))

    def _patches(self, inputs: Tensor) -> Tensor:
        module = self.plain.layer
        if not isinstance(module, CONVOLUTIONS):
            rows = inputs.reshape(len(inputs), -1, math.prod(self.layer.weight[1:]))
            rows = rows[:, self._drawn(rows.shape[1])].flatten(0, 1)
            return as_maps(rows, self.layer.weight[1:], self.layer.order)
        return patches(module, zeros_around(self.plain.padding)(inputs) if self.plain.padding else inputs, self._drawn)

    def _drawn(self, positions: int) -> Tensor:
        values = BATCH * self.layer.groups * math.prod(self.layer.weight[1:])
        most = max(1, min(POSITIONS_PER_INPUT, MAX_PATCH_VALUES // values))
        return torch.randperm(positions, generator=self._generator)[:most]


def _root(around: Tensor, *, energy: float) -> Tensor:
    """The Cholesky factor of the shrunk moments (d, d), scaled to a mean diagonal of one; the identity if nothing varies.

    `energy` is the mean diagonal of the moments around zero.
    """
    identity = torch.eye(len(around), dtype=torch.float64)
    scale = float(around.diagonal().mean())
    if scale <= MIN_RELATIVE_VARIANCE * energy:
        return identity
    return torch.linalg.cholesky((1 - SHRINKAGE) / scale * around + SHRINKAGE * identity).contiguous()
