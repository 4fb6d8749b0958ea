"""How much each direction of a layer's inputs counts, measured on data: what its factors are fitted for."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ranksearch.compress.axes import as_maps
from ranksearch.compress.stand_ins import evaluating
from ranksearch.compress.watch import subject
from ranksearch.errors import ModelError
from ranksearch.methods.layer import CONVOLUTIONS, Conv, Layer

Modes: TypeAlias = tuple[int, ...]
"""A run of modes of a kernel (out, in, *kernel): (1,) its input channels, (2, 3) the positions of a 2-D kernel."""

SHRINKAGE = 0.01
"""Share of the identity in every matrix of moments. It bounds the condition number, for dead and for copied channels too.
Measured on the digits LeNet, from 0.001 to 0.1 and by the rule of OAS (Chen et al. 2010), the output error on held-out
inputs differs by some per cent, with 128 inputs for 2,304 features too; only the error so predicted suffers from 0.1."""
MAX_MOMENT_ROWS = 4096
"""The largest matrix of moments, in rows: its Cholesky factor takes a second or two, and 128 MiB while it is made."""
MAX_INPUTS, MIN_INPUTS = 512, 128
"""How many inputs the moments are taken of. With 128 the output error on held-out digits is a tenth higher than with 512."""
MAX_MACS = 2 * 10**12
"""Between the two, as many inputs as need no more multiply-accumulates: about 40 seconds on two cores."""
POSITIONS_PER_INPUT = 64
"""Positions drawn from each input of a convolution, whose neighbours see much the same; it bounds the time."""
ROWS = 16384
"""Rows of a factor that are folded at once."""
BATCH = 32
"""Inputs a pass: what a convolution sees is held for so many at once."""
MIN_RELATIVE_VARIANCE = 1e-9
"""A layer's inputs that vary by less than this part of their energy are constant up to rounding."""


@dataclass(frozen=True)
class Whitening:
    """The inputs of one layer: ||(W' - W) L||, with L L^T their moments, is the expected error of its outputs.

    `roots` holds a lower triangular L (d, d) for each run of kernel modes of joint size d; a run that is not there is
    the product of its first mode and the rest, and a mode that is not there counts alike in all directions. So
    `Whitening()` is the plain norm of the weights. `mean` (in, *kernel) is the mean patch of inputs where the moments are
    taken around it: the error of the mean is then the bias's to correct.
    """

    roots: Mapping[Modes, Tensor] = field(default_factory=dict)
    mean: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Whitening:
        """The same in another type."""
        roots = {run: root.to(dtype) for run, root in self.roots.items()}
        return Whitening(roots, None if self.mean is None else self.mean.to(dtype))

    def runs(self, holds: Sequence[Modes]) -> tuple[Modes, ...]:
        """The runs whose roots `whiten` multiplies by: equal ones give equal kernels."""
        return tuple(run for modes in holds for run, _ in self._roots(modes))

    def whiten(self, kernel: Tensor, holds: Sequence[Modes]) -> Tensor:
        """The kernel (out, in, *kernel) times the roots of the runs that the factors hold; of the same shape."""
        for modes in holds:
            for run, root in self._roots(modes):
                shape = kernel.shape
                runs = kernel.reshape(math.prod(shape[: run[0]]), len(root), -1)
                kernel = torch.einsum("pdr,de->per", runs, root.to(kernel.dtype)).reshape(shape)
        return kernel

    def fold(self, factors: Sequence[Tensor], holds: Sequence[Modes], weight: Sequence[int]) -> tuple[Tensor, ...]:
        """Factors of the whitened kernel of shape `weight` as factors of the kernel itself, shape by shape the same."""
        return tuple(self._unwhiten(factor, modes, weight) for factor, modes in zip(factors, holds, strict=True))

    def _unwhiten(self, factor: Tensor, modes: Modes, weight: Sequence[int]) -> Tensor:
        shape, sizes = factor.shape, [weight[mode] for mode in modes]
        for run, root in self._roots(modes):
            start = run[0] - modes[0] if modes else 0
            lead = math.prod(shape) // math.prod(sizes) * math.prod(sizes[:start])
            runs = factor.reshape(lead, len(root), -1).movedim(1, -1)
            # In float64: half the digits of a direction that hardly counts are gone otherwise. In blocks, which stay in a
            # processor's cache.
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


def source(model: nn.Module, inputs: Tensor) -> str:
    """The digest of all that a metric follows from: every weight and buffer of the model, and the inputs."""
    digest = hashlib.sha256(f"3|{SHRINKAGE}|{MAX_MOMENT_ROWS}|{POSITIONS_PER_INPUT}|{BATCH}".encode())
    kept = model.state_dict()
    # What a model does not keep, such as the mean of its inputs, it computes with all the same.
    others = [(name, value) for name, value in model.named_buffers() if name not in kept]
    for name, value in [*kept.items(), *others, ("", inputs)]:
        if isinstance(value, Tensor):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whitenings(model: nn.Module, holds: Mapping[Layer, Iterable[Modes]], inputs: Tensor) -> dict[str, Whitening]:
    """The metric of each of these layers, by name; a pure function of the model and the inputs.

    The factors of a layer are fitted in the metric of its inputs, so that they keep what its outputs are made of
    (ASVD, Yuan et al. 2023; SVD-LLM, Wang et al. 2024; for Tucker-2 and CP: Kalle et al. 2025, arXiv 2511.04494). Each
    factor holds some of the kernel's input modes, and what stands in one factor is whitened as a whole: all of a matrix
    for SVD, channels and then positions for Tucker-2 and CP. For these the moments of a patch are taken as the Kronecker
    product of the two, which leaves plain factors of the same shapes and needs no solver of its own. Measured on held-out
    digits, the LeNet's output errors are what SVD predicts but for 7 %, and what Tucker-2 and CP predict but for a half.

    Moments are taken around the mean where the mean's error can be corrected: in the layer's bias, or by the batch
    normalisation that alone it feeds, whose statistics are measured again. Uncentred, the mean takes every factor's first rank.

    Args:
        model: the dense model; it runs in eval mode, without gradients, and is left as it was.
        holds: by layer, the runs of kernel modes to measure. A run of more than `MAX_MOMENT_ROWS` rows is parted into its first
            mode and the rest, as the one row of features behind a 512 x 7 x 7 map into channels and positions; a single mode
            of more counts alike.
        inputs: (count, ...) of the training split, on any device.

    Raises:
        ModelError: a layer's inputs hold NaN or infinity.
    """
    found = {layer.name: _Moments(layer, runs) for layer, runs in holds.items()}
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
            for batch in inputs.split(BATCH):
                model(batch.to(device))
                followed.outputs.clear()
    return {name: moments.whitening(normalised=name in followed.names) for name, moments in found.items()}


class _Followed(TorchFunctionMode):
    """Which layers' outputs are read by batch normalisations and by nothing else, as a shortcut past them would be."""

    def __init__(self) -> None:
        super().__init__()
        self._reads, self._normalised = Counter[str](), Counter[str]()
        # By id, and kept alive for the pass: an id is only unique while its tensor lives.
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
        # What gives no tensor, such as .dim(), reads no values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._reads.update(self.outputs[id(leaf)][0] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.outputs)
        return result


class _Moments:
    """Sums of the patches that a layer sees, and of their products by run of modes, all in float64."""

    def __init__(self, layer: Layer, runs: Iterable[Modes]) -> None:
        self.layer, self.count = layer, 0
        self._generator = torch.Generator().manual_seed(0)
        self._sum = torch.zeros(layer.weight[1:], dtype=torch.float64)
        self._products: dict[Modes, Tensor] = {}
        for run in dict.fromkeys(part for whole in runs if whole for part in self._parts(whole)):
            self._products[run] = torch.zeros((self._size(run),) * 2, dtype=torch.float64)

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the patches (count, in, *kernel) of a batch of the layer's inputs: what a hook in front of the layer is given."""
        patches = self._patches(module, subject(args, kwargs).detach())
        # Apple's GPUs have no float64; on CUDA the products are taken there.
        patches = (patches.cpu() if patches.device.type == "mps" else patches).double()
        if not bool(torch.isfinite(patches).all()):
            raise ModelError(
                f"The inputs of every layer must be finite on the training data, but those of {self.layer.name!r} hold NaN "
                "or infinity; mend the model, or set space.data_aware = false."
            )
        self.count += len(patches)
        self._sum += patches.sum(0).cpu()
        for run, product in self._products.items():
            rows = self._rows(patches, run)
            product += (rows.T @ rows).cpu()

    def whitening(self, *, normalised: bool) -> Whitening:
        mean = self._sum / max(1, self.count)
        centred = self.layer.bias or normalised
        roots = {}
        for run, product in self._products.items():
            rows = self._rows(mean[None], run)
            roots[run] = _root(product / max(1, self.count), rows.T @ rows if centred else None)
        return Whitening(roots, mean if centred and self.layer.bias else None)

    def _parts(self, run: Modes) -> list[Modes]:
        if self._size(run) <= MAX_MOMENT_ROWS:
            return [run]
        return [*self._parts(run[:1]), *self._parts(run[1:])] if len(run) > 1 else []

    def _size(self, run: Modes) -> int:
        return math.prod(self.layer.weight[mode] for mode in run)

    def _rows(self, patches: Tensor, run: Modes) -> Tensor:
        """(count, in, *kernel) as rows of the run's joint size."""
        return patches.movedim(run, tuple(range(-len(run), 0))).reshape(-1, self._size(run))

    def _patches(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if not isinstance(module, CONVOLUTIONS):
            rows = inputs.reshape(len(inputs), -1, math.prod(self.layer.weight[1:]))
            rows = rows[:, self._drawn(rows.shape[1])].flatten(0, 1)
            return as_maps(rows, self.layer.weight[1:], self.layer.order)
        views = _padded(module, inputs)
        for axis, (size, step, apart) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
            views = views.unfold(2 + axis, apart * (size - 1) + 1, step)[..., ::apart]
        dims = len(module.kernel_size)
        sizes = views.shape[2 : 2 + dims]
        places: list[Any] = list(torch.unravel_index(self._drawn(math.prod(sizes)), sizes))
        return views[:, :, *places].transpose(1, 2).flatten(0, 1)

    def _drawn(self, positions: int) -> Tensor:
        return torch.randperm(positions, generator=self._generator)[:POSITIONS_PER_INPUT]


def _padded(module: Conv, inputs: Tensor) -> Tensor:
    """What the convolution slides over."""
    amounts: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        around = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if isinstance(module.padding, str):
            amounts += [around // 2, around - around // 2] if module.padding == "same" else [0, 0]
        else:
            amounts += [module.padding[axis]] * 2
    return F.pad(inputs, amounts, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def _root(moments: Tensor, of_mean: Tensor | None) -> Tensor:
    """The Cholesky factor of shrunk moments (d, d) of mean diagonal one; of the identity where nothing varies."""
    identity = torch.eye(len(moments), dtype=torch.float64)
    energy = float(moments.diagonal().mean())
    around = moments if of_mean is None else moments - of_mean
    scale = float(around.diagonal().mean())
    if scale <= MIN_RELATIVE_VARIANCE * energy:
        return identity
    return torch.linalg.cholesky((1 - SHRINKAGE) / scale * around + SHRINKAGE * identity).contiguous()
