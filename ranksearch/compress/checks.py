"""Checks of a model before it is run to find its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ranksearch.errors import ModelError, first_line
from ranksearch.support.batch import batch_shapes
from ranksearch.support.nesting import tensors_in


def not_accepted(model: nn.Module, example: Any, error: Exception) -> ModelError:
    """The error for a model whose forward raised `error` on an example."""
    kinds = {tensor.dtype for tensor in tensors_in(example) if tensor.is_floating_point()}
    odd = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype not in kinds), None)
    fix = "check the model's arguments against the data"
    if kinds and odd is not None:
        inputs = ", ".join(sorted(name_of(kind) for kind in kinds))
        fix = f"its weights are {name_of(odd)} and the input is {inputs}: call .float() on the model, or convert the data"
    elif isinstance(example, tuple):
        fix = "a tuple holds the arguments of a forward that takes as many, and else is its only argument; wrap the model"
    return ModelError(
        f"The model must accept one input of shape {batch_shapes(example)}, but its forward raised "
        f"{type(error).__name__}: {first_line(error)}; {fix}."
    )


def name_of(dtype: torch.dtype) -> str:
    """A dtype as people write it: `float32`."""
    return str(dtype).removeprefix("torch.")


def check_weights(model: nn.Module) -> None:
    """Check that all weights are initialised, trainable and finite.

    Raises:
        ModelError: a weight has no shape yet, is on the meta device, was made in inference mode, or holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"Weights must be initialised, but {name!r} has no shape yet; run the model once on its data first."
            )
        if parameter.is_meta:
            raise ModelError(f"Weights must be loaded, but {name!r} is on the meta device; load the model's weights first.")
        if parameter.is_inference():
            raise ModelError(
                f"Weights must be trainable, but {name!r} was created in inference mode; create the model outside it."
            )
        if not torch.isfinite(parameter).all():
            raise ModelError(f"Weights must be finite, but {name!r} holds NaN or infinity; load or train the model again.")


def check_uncompiled(model: nn.Module) -> None:
    """Raise `ModelError` for a compiled model: each copy with other layers would be compiled anew, which takes minutes."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model must be a Python module, but is TorchScript, whose layers cannot be replaced.")
    for name, module in model.named_modules():
        wrapped, inside = "_orig_mod" in module._modules, hasattr(module.forward, "_torchdynamo_orig_callable")
        if wrapped or inside or module._compiled_call_impl is not None:
            which = repr(name) if name else "it"
            raise ModelError(
                f"The model must not be compiled, but {which} went through torch.compile; pass the original model, and compile "
                "the exported one."
            )
