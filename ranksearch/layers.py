"""What can be decomposed in a model, and why not the rest: one forward pass tells."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ranksearch.errors import ModelError, first_line
from ranksearch.macs import Multiplications
from ranksearch.stand_ins import UNCALLED, evaluated, evaluating, trained, why_not_replaced

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """One decomposable module of the dense model at the study's input size.

    `weight` is the kernel's shape (out, in, *kernel); (out, in) for a fully connected layer. `in_size` and `out_size`
    are the spatial sizes before and after, () for a fully connected layer, `calls` how often it is applied to one
    input: to each position, or to each part of an input whose parts the model folds into the batch. A fully connected
    layer behind a flatten has `flattened` set: its weight is seen as a kernel that covers the whole map, as the thesis
    does, and its sizes are those of that convolution.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    bias: bool
    in_size: tuple[int, ...] = ()
    out_size: tuple[int, ...] = ()
    calls: int = 1
    flattened: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size; () for a fully connected layer."""
        return self.weight[2:]

    @property
    def params(self) -> int:
        """Parameters of the dense layer, weight and bias."""
        return math.prod(self.weight) + (self.weight[0] if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one input."""
        return math.prod(self.weight) * math.prod(self.out_size) * self.calls


@dataclass(frozen=True)
class Inventory:
    """The layers in call order, what was skipped and why, and the size of the whole model.

    `params` counts weights, biases and normalisation affine of the whole model, no buffers, shared ones once; `macs` is
    for one input.
    """

    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]
    params: int
    macs: int

    def __getitem__(self, name: str) -> Layer:
        return {layer.name: layer for layer in self.layers}[name]


def count_params(model: nn.Module) -> int:
    """Parameters of a model: weights, biases and normalisation affine; shared ones once, buffers not."""
    return sum(parameter.numel() for parameter in model.parameters())


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each parameter all the names that it has in a model, several where it is shared."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of `model` for the batch `example`, counted by torch while it runs (in eval mode)."""
    # Watched like an inventory: attention then does without its fused form for inference, whose work is not counted.
    return _Watch(model).run(example)


def inventory(model: nn.Module, example: Tensor) -> Inventory:
    """The decomposable layers of `model`, found by running it on `example`, a batch of one input.

    It runs as it is, and with each of those layers behind a stand-in that has no more than its replacement will; in training
    mode too, where it can on a batch of two, as a copy.

    Raises:
        ModelError: the model does not accept the example, holds NaN or infinite weights, is compiled, or has no decomposable
            layer.
    """
    check_weights(model)
    _check_uncompiled(model)
    watch = _Watch(model)
    try:
        macs = watch.run(example)
    except Exception as error:
        raise ModelError(
            f"The model must accept one input of shape {tuple(example.shape)}, but its forward raised "
            f"{type(error).__name__}: {first_line(error)}; check the model's arguments against the data."
        ) from error
    _check_copies(model, watch.order, example)
    layers, skipped = [], {}
    for name, module in watch.candidates.items():
        reason = _why_not(name, module, watch)
        if reason:
            skipped[name] = reason
    skipped |= why_not_replaced(model, [name for name in watch.order if name not in skipped], evaluated(model, example))
    if twin := trained(model, example):
        found = why_not_replaced(twin[0], [name for name in watch.order if name not in skipped], twin[1])
        # A layer that training leaves out is replaced all the same.
        skipped |= {name: f"{reason}, in training" for name, reason in found.items() if reason != UNCALLED}
    for name in watch.order:
        if name not in skipped:
            layers.append(_describe(name, watch.candidates[name], *watch.shapes[name], watch.maps.get(name), len(example)))
    if not layers:
        reasons = (f"{name or type(model).__name__}: {reason}" for name, reason in skipped.items())
        why = "; ".join(reasons) or "it holds no Conv or Linear module"
        raise ModelError(f"The model must have a decomposable layer, but has none ({why}).")
    return Inventory(tuple(layers), skipped, count_params(model), macs // len(example))


def check_weights(model: nn.Module) -> None:
    """That all weights are there, and finite.

    Raises:
        ModelError: one is not.
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(f"Weights must be there, but {name!r} has no shape yet; run the model once on its data first.")
        if parameter.is_meta:
            raise ModelError(f"Weights must be there, but {name!r} is on the meta device; load the model's weights first.")
        if parameter.is_inference():
            raise ModelError(
                f"Weights must be ones to train, but {name!r} was made in inference mode; make the model outside it."
            )
        if not torch.isfinite(parameter).all():
            raise ModelError(f"Weights must be finite, but {name!r} holds NaN or infinity; load or train the model again.")


def _check_uncompiled(model: nn.Module) -> None:
    """Compiled code is of a model as it was: each copy with other layers would be compiled anew, for minutes."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model must be one in Python, but is TorchScript, whose layers cannot be replaced.")
    for name, module in model.named_modules():
        wrapped, inside = "_orig_mod" in module._modules, hasattr(module.forward, "_torchdynamo_orig_callable")
        if wrapped or inside or module._compiled_call_impl is not None:
            which = repr(name) if name else "it"
            raise ModelError(
                f"The model must come uncompiled, but {which} went through torch.compile; give the model as it was before, and "
                "compile the one that you take home."
            )


def _check_copies(model: nn.Module, called: Sequence[str], example: Tensor) -> None:
    """Every trial changes a copy of the model, which a forward that is bound to the model itself would pass by."""
    try:
        twin = _Watch(copy.deepcopy(model))
    except Exception:
        return  # That it has to be one to copy is told elsewhere.
    twin.run(example)
    lost = [name for name in called if name not in twin.order]
    if lost:
        raise ModelError(
            f"A copy of the model must run its own layers, but a copy never calls {lost[0]!r}: the forward reaches it through "
            "a lambda or another function that holds the model; make that a method."
        )


def _why_not(name: str, module: nn.Module, watch: _Watch) -> str | None:
    if reason := why_not_factorized(module):
        return reason
    if not name:
        return "it is the model itself; put it into an nn.Sequential"
    if len(names := watch.names[id(module.weight)]) > 1:
        return f"its weight is shared by {', '.join(sorted(names))}"
    calls = watch.order.count(name)
    if calls != 1:
        return "it is never called by the forward pass" if calls == 0 else f"it is called {calls} times in one pass"
    dims = len(watch.shapes[name][0])
    if dims != module.weight.dim() if isinstance(module, CONVOLUTIONS) else dims < 2:
        return "it is called without a batch dimension"
    return None


def why_not_factorized(module: nn.Module) -> str | None:
    """Why a module can have no factorization, whatever model it is in; None where it can."""
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return f"{type(module).__name__} is not supported"
    if not _runs_as_torch(module):
        return f"{type(module).__name__} has a forward of its own"
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        return "its weight has no shape yet; run the model once on its data first"
    if is_parametrised(module):
        return "its weight is parametrised or pruned; make that permanent first, by remove_parametrizations or prune.remove"
    # Hooks see or change what goes in or out.
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which its replacement would not have; remove them first"
    if not module.weight.is_floating_point():
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, which is not real"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return "it is depthwise" if module.groups == module.in_channels else f"it has {module.groups} groups"
    return None


def _describe(
    name: str,
    module: nn.Module,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    flat: tuple[int, ...] | None,
    batch: int,
) -> Layer:
    assert isinstance(module, (*CONVOLUTIONS, nn.Linear))
    kind, bias, weight = type(module).__name__, module.bias is not None, tuple(module.weight.shape)
    if isinstance(module, CONVOLUTIONS):
        return Layer(name, kind, weight, bias, inputs[2:], outputs[2:], calls=outputs[0] // batch)
    # torch has no convolution over more than three dimensions, so a larger map stays a row of features.
    if flat and math.prod(flat[1:]) > 1 and len(flat) - 1 <= len(CONVOLUTIONS):
        whole = (1,) * len(flat[1:])
        return Layer(name, kind, (weight[0], *flat), bias, flat[1:], whole, calls=outputs[0] // batch, flattened=True)
    return Layer(name, kind, weight, bias, calls=math.prod(outputs[:-1]) // batch)


class _Watch:
    """Runs a model once and notes which candidate was called, in which order, with which shapes, behind which flatten."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.candidates = {name: module for name, module in model.named_modules() if _is_candidate(module)}
        self.names = names_of_parameters(model)
        self.order: list[str] = []
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.maps: dict[str, tuple[int, ...]] = {}

    def run(self, example: Tensor) -> int:
        """One pass in eval mode; returns the multiply-accumulates counted in it."""
        flattened = _Flattened()
        counter = Multiplications()
        with ExitStack() as hooks:
            for name, module in self.candidates.items():
                hooks.enter_context(module.register_forward_hook(partial(self._note, name, flattened), with_kwargs=True))
            with evaluating(self.model), torch.no_grad(), counter, flattened:
                self.model(example)
        return counter.flops // 2

    def _note(
        self, name: str, flattened: _Flattened, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        self.order.append(name)
        given = subject(args, kwargs)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            self.shapes[name] = (tuple(given.shape), tuple(output.shape))
            if (source := flattened.source(given)) is not None:
                self.maps[name] = source


def is_parametrised(module: nn.Module) -> bool:
    """Whether a Conv or Linear computes its weight from others, as weight or spectral normalisation and pruning do."""
    # Not by looking at the weight first: to compute it can change what it is computed from.
    return parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter)


def _runs_as_torch(module: nn.Module) -> bool:
    """Whether a Conv or Linear computes what torch's own does; a subclass may standardise its weights, or pad by itself."""
    base = next(kind for kind in (*CONVOLUTIONS, nn.Linear) if isinstance(module, kind))
    own = "forward", "_conv_forward"
    return all(getattr(type(module), n, None) is getattr(base, n, None) and n not in vars(module) for n in own)


def _is_candidate(module: nn.Module) -> bool:
    # A class name is how quantised and lazily or transposed convolutions are told from what never had a kernel. Quantised
    # ones keep their weights in a child.
    name, inner = type(module).__name__, {type(child).__name__ for child in module.children()}
    named = ("Conv" in name or "Linear" in name) and "PackedParams" not in name
    return isinstance(module, (*CONVOLUTIONS, nn.Linear)) or (named and all("PackedParams" in child for child in inner))


def subject(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """The tensor that a function or module is about: its first argument, which torch calls `input`."""
    return args[0] if args else (kwargs or {}).get("input")


class _Flattened(TorchFunctionMode):
    """Follows (batch, channels, *size) -> (batch, features) through flatten, view or reshape, and what acts elementwise."""

    FLATTEN = frozenset({torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape})
    ELEMENTWISE = frozenset(
        {
            F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardtanh, F.hardswish, F.mish,
            torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.dropout, F.alpha_dropout, F.batch_norm,
            Tensor.contiguous, Tensor.clone,
        }
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        # Kept alive for the pass: an id is only unique while its tensor lives.
        self._sources: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def source(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The (channels, *size) that `tensor` was flattened from, if it was."""
        known = self._sources.get(id(tensor))
        return known[1] if known else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.FLATTEN:
            before = subject(args, kwargs)
            if before.dim() > 2 and result.dim() == 2 and result.shape[0] == before.shape[0]:
                self._sources[id(result)] = (result, tuple(before.shape[1:]))
        elif func in self.ELEMENTWISE and (known := self._sources.get(id(subject(args, kwargs)))):
            self._sources[id(result)] = (result, known[1])
        return result
