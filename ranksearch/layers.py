"""What can be decomposed in a model, and why not the rest: one forward pass tells."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ranksearch.errors import ModelError, first_line

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
UNCALLED = "the forward does not call it by its name, but keeps it elsewhere too, as in a list"
"""Why a layer is skipped that a forward finds elsewhere than under its name."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _recurrence(inputs: Tensor, of_inputs: Tensor, of_state: Tensor, *args: Any, **kwargs: Any) -> int:
    steps, batch = inputs.shape[:2]
    return 2 * steps * batch * (of_inputs.numel() + of_state.numel())


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrence,
}
"""Operations on a CPU that torch's own table leaves out."""


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


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of `model` for the batch `example`, counted by torch while it runs (in eval mode)."""
    # Watched like an inventory: attention then does without its fused form for inference, whose work is not counted.
    return _Watch(model).run(example)


def inventory(model: nn.Module, example: Tensor) -> Inventory:
    """The decomposable layers of `model`, found by running it on `example`, a batch of one input.

    It runs as it is, and with each of those layers behind a stand-in that has no more than its replacement will; in training
    mode too, where it can on a batch of two, as a copy.

    Raises:
        ModelError: the model does not accept the example, holds NaN or infinite weights, or has no decomposable layer.
    """
    check_weights(model)
    watch = _Watch(model)
    try:
        macs = watch.run(example)
    except Exception as error:
        raise ModelError(
            f"The model must accept one input of shape {tuple(example.shape)}, but its forward raised "
            f"{type(error).__name__}: {first_line(error)}; check the model's arguments against the data."
        ) from error
    layers, skipped = [], {}
    for name, module in watch.candidates.items():
        reason = _why_not(name, module, watch)
        if reason:
            skipped[name] = reason
    skipped |= _why_not_replaced(model, [name for name in watch.order if name not in skipped], _evaluated(model, example))
    if twin := _trained(model, example):
        found = _why_not_replaced(twin[0], [name for name in watch.order if name not in skipped], twin[1])
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
        if not torch.isfinite(parameter).all():
            raise ModelError(f"Weights must be finite, but {name!r} holds NaN or infinity; load or train the model again.")


def _why_not(name: str, module: nn.Module, watch: _Watch) -> str | None:
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return f"{type(module).__name__} is not supported"
    if not name:
        return "it is the model itself; put it into an nn.Sequential"
    if not runs_as_torch(module):
        return f"{type(module).__name__} has a forward of its own"
    if is_parametrised(module):
        return "its weight is parametrised; remove the parametrisation first"
    if is_hooked(module):
        return "it has forward hooks, which its replacement would not have; remove them first"
    if module.weight.is_complex():
        return "its weight is complex"
    if len(watch.owners[id(module.weight)]) > 1:
        return f"its weight is shared by {', '.join(sorted(watch.owners[id(module.weight)]))}"
    calls = watch.order.count(name)
    if calls != 1:
        return "it is never called by the forward pass" if calls == 0 else f"it is called {calls} times in one pass"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return "it is depthwise" if module.groups == module.in_channels else f"it has {module.groups} groups"
    dims = len(watch.shapes[name][0])
    if dims != module.weight.dim() if isinstance(module, CONVOLUTIONS) else dims < 2:
        return "it is called without a batch dimension"
    return None


@dataclass(frozen=True)
class _Pass:
    """A pass of a model that can be made again, and the outputs that it gave; none where they are another each time."""

    run: Callable[[], Any]
    outputs: list[Tensor] | None

    @classmethod
    def of(cls, run: Callable[[], Any]) -> _Pass:
        first, second = _tensors(run()), _tensors(run())
        return cls(run, first if _alike(first, second) else None)


def _evaluated(model: nn.Module, example: Tensor) -> _Pass:
    def run() -> Any:
        # Not watched: fused forms, such as attention's, ask for the weights only where no hook is there.
        with evaluating(model), torch.no_grad():
            return model(example)

    return _Pass.of(run)


def _trained(model: nn.Module, example: Tensor) -> tuple[nn.Module, _Pass] | None:
    """A copy of the model in training mode, and its pass; None where it has none on two inputs that are alike."""

    def run() -> Any:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return twin(torch.cat([example, example]))

    try:
        twin = copy.deepcopy(model).train()
        return twin, _Pass.of(run)
    except Exception:
        # What stands in the way of training is told where it is trained.
        return None


def _why_not_replaced(model: nn.Module, names: Sequence[str], whole: _Pass) -> dict[str, str]:
    """Why the forward needs some of these layers as they are, found by running it with a stand-in for each."""
    if not names:
        return {}
    failed = ""
    with _standing_in(model, names) as stand_ins:
        try:
            outputs = _tensors(whole.run())
        except Exception as error:
            failed = f"the forward fails when it is replaced ({type(error).__name__}: {first_line(error)})"
    reasons = {}
    for name, stand_in in stand_ins.items():
        if stand_in.asked:
            reasons[name] = f"its {stand_in.asked[0]} is also used outside the layer"
        elif not failed and not stand_in.called:
            reasons[name] = UNCALLED
    if not failed and not reasons and whole.outputs is not None and not _alike(whole.outputs, outputs):
        # Such as where it asks for a layer's type.
        failed = "the forward gives another result when it is replaced"
    if failed and len(names) == 1:
        return {names[0]: failed}
    if failed:
        half = len(names) // 2
        return _why_not_replaced(model, names[:half], whole) | _why_not_replaced(model, names[half:], whole)
    rest = [name for name in names if name not in reasons]
    return reasons | (_why_not_replaced(model, rest, whole) if reasons else {})


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors of what a forward gives, copied: a module may write over them in the next pass."""
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two passes gave the same, but for rounding."""
    return len(first) == len(second) and all(
        one.shape == two.shape and torch.allclose(one.double(), two.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for one, two in zip(first, second, strict=True)
    )


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
        self.owners: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owners.setdefault(id(parameter), set()).add(name)
        self.order: list[str] = []
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.maps: dict[str, tuple[int, ...]] = {}

    def run(self, example: Tensor) -> int:
        """One pass in eval mode; returns the multiply-accumulates counted in it."""
        flattened = _Flattened()
        handles = []
        for name, module in self.candidates.items():
            handles.append(module.register_forward_hook(self._hook(name, flattened), with_kwargs=True))
        counter = _Multiplications()
        try:
            with evaluating(self.model), torch.no_grad(), counter, flattened:
                self.model(example)
        finally:
            for handle in handles:
                handle.remove()
        return counter.flops // 2

    def _hook(self, name: str, flattened: _Flattened) -> Callable[[nn.Module, tuple[Any, ...], Any, Any], None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            self.order.append(name)
            given = _subject(args, kwargs)
            if isinstance(given, Tensor) and isinstance(output, Tensor):
                self.shapes[name] = (tuple(given.shape), tuple(output.shape))
                if (source := flattened.source(given)) is not None:
                    self.maps[name] = source

        return note


class _Multiplications(TorchDispatchMode):
    """Counts operations by torch's own formulas, two for a multiply-accumulate, as its FlopCounterMode does.

    That one imports torch's compiler first, which takes a second of every start. The branches of a `torch.cond` count nothing.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # What keeps the compiler away from a mode is the import. A torch that no longer asks only takes the second again.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        formula = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                result = func.decompose(*args, **given)
            if result is not NotImplemented:
                return result
        result = func(*args, **given)
        if formula is not None:
            self.flops += int(formula(*args, **given, out_val=result))
        return result


class _StandIn(nn.Sequential):
    """A layer as its replacement will be: called like it, with nothing else of it. Notes what else it is asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.called = False
        self.add_module("0", layer)

    def forward(self, input: Tensor) -> Any:
        self.called = True
        return self[0](input)

    def __getattr__(self, name: str) -> Any:
        # Python comes here for the layer itself, and for what an nn.Sequential does not have.
        layer = self.__dict__.get("_modules", {}).get("0")
        if layer is None or name == "0":
            return super().__getattr__(name)
        found = getattr(layer, name)
        self.asked.append(name)
        return found


@contextmanager
def _standing_in(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _StandIn]]:
    layers = {name: model.get_submodule(name) for name in names}
    stand_ins = {name: _StandIn(layer) for name, layer in layers.items()}
    try:
        for name, stand_in in stand_ins.items():
            replace_(model, name, stand_in)
        yield stand_ins
    finally:
        for name, layer in layers.items():
            replace_(model, name, layer)


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module of that name stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_parametrised(module: nn.Module) -> bool:
    """Whether a Conv or Linear computes its weight from others, as weight or spectral normalisation and pruning do."""
    # Not by looking at the weight first: to compute it can change what it is computed from.
    return parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter)


def is_hooked(module: nn.Module) -> bool:
    """Whether a Conv or Linear has hooks of its own, which see or change what goes in or out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def runs_as_torch(module: nn.Module) -> bool:
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


def _subject(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
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
            before = _subject(args, kwargs)
            if before.dim() > 2 and result.dim() == 2 and result.shape[0] == before.shape[0]:
                self._sources[id(result)] = (result, tuple(before.shape[1:]))
        elif func in self.ELEMENTWISE and (known := self._sources.get(id(_subject(args, kwargs)))):
            self._sources[id(result)] = (result, known[1])
        return result


class evaluating:
    """Eval mode for a while; each module gets its own mode back, since a model may hold frozen parts."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = {module: module.training for module in model.modules()}
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *exc: object) -> None:
        for module, training in self._modes.items():
            module.training = training
