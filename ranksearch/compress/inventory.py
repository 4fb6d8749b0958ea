"""Finds the layers of a model that can be decomposed, and says why the others cannot, by running the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ranksearch.compress.account import account_of
from ranksearch.compress.checks import check_uncompiled, check_weights, name_of, not_accepted
from ranksearch.compress.plain import (
    FORWARDS,
    Plain,
    holds_other_hooks,
    is_computed,
    is_parametrised,
    padding_at,
    plain_of,
    weights_behind,
)
from ranksearch.compress.stand_ins import UNCALLED, Pass, evaluating, tensors_of, why_not_replaced
from ranksearch.compress.torch_calls import base_of
from ranksearch.compress.watch import Watch
from ranksearch.errors import ModelError
from ranksearch.methods.layer import (
    CONVOLUTIONS,
    MAX_DIMS,
    MIN_DEPTHWISE,
    TRANSPOSED,
    Call,
    Layer,
    Padding,
    groups_of,
    is_small_depthwise,
    kernel_shape,
)
from ranksearch.results.account import Entry
from ranksearch.support.batch import batch_shapes, batch_size, concatenate, run_model
from ranksearch.support.copies import deep_copy
from ranksearch.support.seeds import seeded


@dataclass(frozen=True)
class Inventory:
    """The decomposable layers in call order, the reasons why others were skipped, and the size of the whole model.

    `params` counts all parameters of the model (no buffers, shared ones once); `macs` is for one input. Once layers were
    timed, `rest_ms` is the time of everything else, in milliseconds. `permanent` says, by layer, what its factorization keeps
    that the layer itself computes in each pass; how it computes its weight is not in `macs`. `account` says where all
    parameters and multiply-accumulates are; they add up to `params` and `macs`.
    """

    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]
    params: int
    macs: int
    rest_ms: float | None = None
    permanent: Mapping[str, str] = field(default_factory=dict)
    account: tuple[Entry, ...] = ()

    @property
    def costs(self) -> dict[str, float]:
        """Every cost of the whole model by its name."""
        costs: dict[str, float] = {"params": self.params, "macs": self.macs}
        if self.rest_ms is not None:
            costs["latency"] = self.rest_ms + sum(layer.latency.dense for layer in self.layers if layer.latency)
        return costs

    def __getitem__(self, name: str) -> Layer:
        return {layer.name: layer for layer in self.layers}[name]


def count_params(model: nn.Module) -> int:
    """The number of parameters of a model: weights, biases and normalisation affine; shared ones once, no buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of `model` for the batch `example`, counted by torch during one pass in eval mode."""
    # With `Watch`, whose hooks keep attention from using its fused inference kernel, which is not counted.
    return Watch(model).run(example)


def inventory(model: nn.Module, example: Any) -> Inventory:
    """The decomposable layers of `model`, found by running it on `example`, a batch of one input.

    The model runs once as it is. Then a copy runs, in eval mode and, if it can on a batch of two, in training mode, with a
    stand-in for each layer that offers only what the layer's replacement will offer.

    Args:
        model: the dense model, on the device of the example; not changed.
        example: what its forward takes: a tensor (batch, ...), or tensors nested in any way, as `arguments_of` says.

    Raises:
        ModelError: the model does not accept the example, holds NaN or infinite weights, is compiled, or has no decomposable
            layer; or the example's tensors differ in batch size.
    """
    check_weights(model)
    check_uncompiled(model)
    batch, watch = _batch_size(example), Watch(model)
    try:
        watch.run(example)
    except Exception as error:
        raise not_accepted(model, example, error) from error
    # Once for each layer, since one that computes its weight runs a dozen times for it.
    plains = {name: plain_or_why(module) for name, module in watch.candidates.items()}
    skipped = {name: reason for name, plain in plains.items() if (reason := _why_skipped(name, plain, watch))}
    reasons, used = _run_copy(model, [name for name in watch.order if name not in skipped], watch, example)
    skipped |= reasons
    plain_layers = {name: plain for name, plain in plains.items() if not isinstance(plain, str)}
    layers = [_describe(name, plain_layers[name], watch, batch) for name in watch.order if name not in skipped]
    if not layers:
        told = (f"{name or type(model).__name__}: {reason}" for name, reason in skipped.items())
        why = "; ".join(told) or "it holds no Conv or Linear module"
        raise ModelError(f"The model must have a decomposable layer, but has none ({why}).")
    account = account_of(watch, layers, skipped, used, batch)
    macs = sum(entry.macs for entry in account)
    kept = {layer.name: _permanent(watch.candidates[layer.name], plain_layers[layer.name], layer) for layer in layers}
    permanent = {name: words for name, words in kept.items() if words}
    return Inventory(tuple(layers), skipped, count_params(model), macs, permanent=permanent, account=account)


def _batch_size(example: Any) -> int:
    try:
        return batch_size(example)
    except ValueError:
        raise ModelError(
            "An example must be a batch of inputs, whose tensors all have the same first size, but has "
            f"{batch_shapes(example)}."
        ) from None


def _run_copy(model: nn.Module, names: Sequence[str], watch: Watch, example: Any) -> tuple[dict[str, str], set[str]]:
    """Run a copy of the model in eval and in training mode.

    Returns:
        Why some of these layers cannot be replaced, and the names of the parameters that a pass in any mode uses.

    Raises:
        ModelError: the copy does not run its own layers.
    """
    try:
        twin = deep_copy(model)
    except Exception:
        twin = None  # `copied` reports this error to the user
    # This pass has no hooks: fused kernels, such as attention's, read the weights only in modules without hooks.
    in_eval = Pass(partial(_evaluated, model if twin is None else twin, example), watch.outputs)
    reasons = why_not_replaced(model if twin is None else twin, names, in_eval)
    if twin is None:
        return reasons, watch.used
    in_training, watched = _training_pass(twin, example)
    if in_training is None or not set(watch.order) <= set(watched.order):
        _check_copy(twin, watch.order, example)
    if in_training is not None:
        in_training_reasons = why_not_replaced(twin, [name for name in names if name not in reasons], in_training)
        # A layer that is only called in eval mode can be replaced.
        reasons |= {name: f"{reason}, in training" for name, reason in in_training_reasons.items() if reason != UNCALLED}
    return reasons, watch.used | watched.used


def _evaluated(model: nn.Module, example: Any) -> Any:
    with evaluating(model), torch.no_grad():
        return run_model(model, example)


def _training_pass(twin: nn.Module, example: Any) -> tuple[Pass | None, Watch]:
    """A pass of `twin` in training mode on the example taken twice, None if the pass fails; and what was noted in it."""
    twice = concatenate([example, example])

    def run() -> Any:
        with seeded(0), torch.no_grad():
            return run_model(twin, twice)

    twin.train()
    watch = Watch(twin)
    try:
        with watch.noting(), watch.axes:
            outputs = tensors_of(run())
    except Exception:
        return None, watch  # `check_outputs` reports this error to the user
    return Pass(run, outputs), watch


def _check_copy(twin: nn.Module, called: Sequence[str], example: Any) -> None:
    """Raise `ModelError` if a copy does not call its own layers.

    Every trial factorizes a copy. If its forward is bound to the original model, the trial would run the dense layers.
    """
    watch = Watch(twin)
    watch.run(example)
    lost = [name for name in called if name not in watch.order]
    if lost:
        raise ModelError(
            f"A copy of the model must run its own layers, but a copy never calls {lost[0]!r}: the forward reaches it through "
            "a lambda or another function that holds the model; make that a method."
        )


def _why_skipped(name: str, plain: Plain | str, watch: Watch) -> str | None:
    if isinstance(plain, str):
        return plain
    module = watch.candidates[name]
    if not name:
        return "it is the model itself; put it into an nn.Sequential"
    weights = [id(weight) for weight in weights_behind(module)]
    if names := next((watch.names[weight] for weight in weights if len(watch.names[weight]) > 1), []):
        return f"its weight is shared by {', '.join(sorted(names))}"
    if name not in watch.order:
        if watch.axes.used.intersection(weights):
            return "the forward uses its weight without calling it, as torch.nn.functional.linear and attention do"
        return "it is never called by the forward pass"
    if name in watch.sized:
        return "the forward passes it an output_size, which its replacement does not take"
    inputs = [shape for shape, _ in watch.shapes[name]]
    if not all(_has_batch(module, shape) for shape in inputs):
        return "it is called without a batch dimension"
    if plain.around is not None:
        paddings = {padding_at(module, shape) for shape in inputs}
        if None in paddings or not (plain.varies or paddings == {plain.around}):
            return _computes_more(module)
        if len(paddings) > 1:
            return "it pads its inputs by their size, which differs from call to call"
    return None


def _has_batch(module: nn.Module, shape: Sequence[int]) -> bool:
    return len(shape) == 2 + len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else len(shape) >= 2


def plain_or_why(module: nn.Module, padding: Padding | None = None) -> Plain | str:
    """The plain layer that a module amounts to, as `plain_of` gives it; or why it cannot be factorized, whatever its model."""
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return f"{_class_name(module)} is not supported"
    if any(name in vars(module) for name in FORWARDS):
        return "its forward was replaced by another function"
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        return "its weight has no shape yet; run the model once on its data first"
    # Hooks may change or record the layer's inputs and outputs.
    if holds_other_hooks(module):
        return "it has forward hooks, which its replacement would not have; remove them first"
    if (plain := plain_of(module, padding)) is None:
        return _computes_more(module)
    layer = plain.layer
    if not layer.weight.is_floating_point():
        return f"its weight is {name_of(layer.weight.dtype)}, which is not real"
    if is_small_depthwise(layer):
        return f"it is depthwise, without a 2-D kernel of at least {MIN_DEPTHWISE} x {MIN_DEPTHWISE}"
    return plain


def _computes_more(module: nn.Module) -> str:
    """Why a module that computes what it hands to torch cannot be factorized."""
    if is_parametrised(module):
        return "its weight is parametrised or pruned; make that permanent first, by remove_parametrizations or prune.remove"
    return f"{_class_name(module)} has a forward of its own"


def _permanent(module: nn.Module, plain: Plain, layer: Layer) -> str:
    """What the factorization of a layer keeps that the layer computes in each pass; empty for a plain layer."""
    computed = is_parametrised(module) or not torch.equal(plain.layer.weight, module.weight)  # type: ignore[arg-type]
    kept = ["the weight computed in each pass"] if computed else []
    return " and ".join(kept + ([f"the padding of inputs of this size, {layer.padding}"] if layer.padding else []))


def _describe(name: str, plain: Plain, watch: Watch, batch: int) -> Layer:
    module, shapes, maps = watch.candidates[name], watch.shapes[name], set(watch.maps[name])
    flat = next(iter(maps)) if len(maps) == 1 else None
    kind = base_of(module).__name__
    about = Layer(
        name, kind, kernel_shape(plain.layer), plain.layer.bias is not None,
        padding=padding_at(module, shapes[0][0]) if plain.varies else None,
        held=sum(parameter.numel() for parameter in module.parameters()) if is_computed(module) else None,
        groups=groups_of(plain.layer), transposed=isinstance(plain.layer, TRANSPOSED),
    )  # fmt: skip
    if isinstance(module, CONVOLUTIONS):
        return replace(about, calls=tuple(Call(into[2:], out[2:], out[0] // batch) for into, out in shapes))
    # torch has no convolution over more than three dimensions, so a map of more dimensions stays a row of features.
    if flat and math.prod(flat.size[1:]) > 1 and len(flat.size) - 1 <= MAX_DIMS:
        size = flat.size[1:]
        order = None if flat.order == tuple(range(len(flat.size))) else flat.order
        calls = tuple(Call(size, (1,) * len(size), out[0] // batch) for _, out in shapes)
        return replace(about, weight=(about.weight[0], *flat.size), calls=calls, flattened=True, order=order)
    return replace(about, calls=tuple(Call(times=math.prod(out[:-1]) // batch) for _, out in shapes))


def _class_name(module: nn.Module) -> str:
    """The name of a module's class, with its package if torch.nn has another class of that name."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" if getattr(nn, kind.__name__, kind) is not kind else kind.__name__
