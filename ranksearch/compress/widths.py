"""Makes a narrower net of the same architecture: every layer with the same share of its channels, and no trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ranksearch.compress.scratch import check_scratch, initialise_, scratch_
from ranksearch.compress.watch import names_of_parameters, subject
from ranksearch.errors import ModelError, first_line
from ranksearch.plan import Plan
from ranksearch.support.batch import repeat_batch, run_model
from ranksearch.support.nesting import tensors_in
from ranksearch.support.seeds import seeded

M = TypeVar("M", bound=nn.Module)

LAYERS = (_ConvNd, nn.Linear)
MODES = (False, True)
"""Eval and training mode, in which a model may call other layers."""
REMEDY = "set controls = 0"
ADAPTED = (*LAYERS, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)


def scale_width_(model: M, example: Any, share: float) -> M:
    """Give every layer of `model`, in place, this share of its channels. The last layers keep their outputs.

    The model runs in eval and in training mode, and each module adapts to the channels of its first input. So layers that had
    the same number of channels still fit together. Modules that change have new random weights; `redraw_` draws all anew.

    Args:
        model: the dense net, on the device of the example.
        example: a batch of one input.
        share: the share of the channels, above 0 and at most 1.

    Raises:
        ModelError: the weights cannot be drawn anew, layers share weights, or the forward itself fixes a number of channels.
            The model is then changed in part.
    """
    check_scratch(model, otherwise=REMEDY)
    shared = next((names for names in names_of_parameters(model).values() if len(names) > 1), None)
    if shared:
        raise ModelError(
            f"A net can only be made narrower if no weights are shared, but {shared[0]!r} is also {shared[1]!r}; {REMEDY}."
        )
    modes = {module: module.training for module in model.modules()}
    last, before = _last_layers(model, example)
    done = set[nn.Module]()

    def adapt(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if module not in done:
            done.add(module)
            _adapt(module, tuple(subject(args, kwargs).shape), 1.0 if module in last else share)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, ADAPTED):
                hooks.enter_context(module.register_forward_pre_hook(adapt, with_kwargs=True))
        try:
            after = [tuple(tensor.shape) for mode in MODES for tensor in _run(model.train(mode), example)]
        except Exception as error:  # a model's forward may raise anything
            raise _unsuitable(f"the forward raised {type(error).__name__}: {first_line(error)}") from error
    if after != before:
        raise _unsuitable(f"the outputs changed their shapes from {before} to {after}")
    for module, training in modes.items():
        module.training = training
    return model


def redraw_(model: M, *, seed: int) -> M:
    """Draw all weights anew, those of layers so that they keep the variance of their inputs.

    With torch's default of a third of that variance, nets of a few channels often learn nothing. Of three seeds of the digits
    LeNet with 7 % of its channels, two learned nothing with the default, and none with this.
    """
    scratch_(model, Plan(), seed=seed)
    with seeded(seed):
        for module in model.modules():
            if isinstance(module, LAYERS):
                initialise_([module])
    return model


def _unsuitable(reason: str) -> ModelError:
    return ModelError(
        f"A net can only be made narrower if its layers alone fix the numbers of channels, but with fewer channels {reason}; "
        f"read the numbers from the tensors, or {REMEDY}."
    )


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs for two inputs, since normalisation needs more than one in training mode."""
    with seeded(0), torch.no_grad():
        return tensors_in(run_model(model, repeat_batch(example, 2)))


def _last_layers(model: nn.Module, example: Any) -> tuple[set[nn.Module], list[tuple[int, ...]]]:
    """The layers that give an output of the model or are called last, in eval or training mode, and the outputs' shapes."""
    last, shapes = set[nn.Module](), []
    for mode in MODES:
        called: list[tuple[nn.Module, Any]] = []
        with ExitStack() as hooks:
            for module in model.modules():
                if isinstance(module, LAYERS):
                    hooks.enter_context(module.register_forward_hook(partial(_note, called)))
            outputs = _run(model.train(mode), example)
        last |= {layer for layer, output in called if any(output is each for each in outputs)}
        last |= {layer for layer, _ in called[-1:]}
        shapes += [tuple(tensor.shape) for tensor in outputs]
    return last, shapes


def _note(called: list[tuple[nn.Module, Any]], layer: nn.Module, inputs: Any, output: Any) -> None:
    called.append((layer, output))


def _adapt(module: nn.Module, shape: tuple[int, ...], share: float) -> None:
    """Fit a module to inputs of this shape, (batch, channels, ...), and give a layer this share of its output channels."""
    if isinstance(module, _ConvNd):
        into, out, groups = _convolution(module, shape[1], share)
        module.in_channels, module.out_channels, module.groups = into, out, groups
        first, second = (into, out) if module.transposed else (out, into)
        _resize(module, weight=(first, second // groups, *module.kernel_size), bias=(out,))
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = shape[-1], _scaled(module.out_features, share)
        _resize(module, weight=(module.out_features, module.in_features), bias=(module.out_features,))
    elif isinstance(module, _NormBase):
        module.num_features = shape[1]
        _resize(module, **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (shape[1],)))
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = _groups(module.num_groups, shape[1]), shape[1]
        _resize(module, weight=(shape[1],), bias=(shape[1],))
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape[-len(module.normalized_shape) :]
        _resize(module, weight=module.normalized_shape, bias=module.normalized_shape)
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        module.num_parameters = shape[1]
        _resize(module, weight=(shape[1],))


def _convolution(module: _ConvNd, into: int, share: float) -> tuple[int, int, int]:
    """Channels into and out of a convolution, and its groups: depthwise stays depthwise."""
    if module.groups == module.in_channels > 1:
        return into, into * (module.out_channels // module.in_channels), into
    out = _scaled(module.out_channels, share)
    return into, out, _groups(module.groups, into, out)


def _scaled(channels: int, share: float) -> int:
    return max(1, round(channels * share))


def _groups(most: int, *channels: int) -> int:
    """The largest number of groups, at most `most`, that divides these numbers of channels."""
    return next(groups for groups in range(most, 0, -1) if not any(number % groups for number in channels))


def _resize(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Replace parameters and buffers that have another shape, and draw new weights if there are any."""
    changed = False
    for name, shape in shapes.items():
        tensor = getattr(module, name)
        if tensor is not None and tensor.shape != shape:
            empty = tensor.new_empty(shape)
            setattr(module, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
            changed = True
    if changed:
        module.reset_parameters()  # type: ignore[operator]
