"""Builds a factorized net from scratch: with the plan's structure and new random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ranksearch.compress.plain import is_parametrised
from ranksearch.compress.surgery import skeleton_
from ranksearch.errors import ModelError
from ranksearch.methods.layer import CONVOLUTIONS, TRANSPOSED, as_kernel
from ranksearch.plan import Plan

M = TypeVar("M", bound=nn.Module)


def scratch_(model: M, plan: Plan, *, seed: int) -> M:
    """Factorize `model` in place as `plan` says, with new random weights.

    Factors are initialised by `initialise_`, all other modules by their `reset_parameters`, which also resets buffers such as
    running statistics.

    Raises:
        ModelError: a module has frozen parameters, or parameters but no `reset_parameters`, or computes its weight from others.
        PlanError: as `factorize_` does.
    """
    check_scratch(model)
    # Leaves the caller's random state unchanged.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Reset before layers are replaced: a block's own reset may access the layers in it.
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and (_holds_parameters(module) or _holds_buffers(module)):
                reset()
        skeleton_(model, plan)
        for name, _ in plan:
            initialise_([part for part in model.get_submodule(name).children() if _holds_parameters(part)])
    return model


def initialise_(parts: Sequence[nn.Module], *, last: str = "relu") -> None:
    """Initialise consecutive linear layers so that they keep the variance of their input; biases become 0 (He et al. 2015).

    torch's default keeps a third of the variance per layer, so the signal would vanish in a net of many factorized layers. The
    last layer's weights are scaled for the nonlinearity `last` that follows it.
    """
    for part in parts:
        assert isinstance(part.weight, Tensor)
        gain = nn.init.calculate_gain(last if part is parts[-1] else "linear")  # type: ignore[arg-type]
        nn.init.normal_(part.weight, std=gain / math.sqrt(_fan_in(part)))
        if isinstance(part.bias, Tensor):
            nn.init.zeros_(part.bias)


def _fan_in(part: nn.Module) -> float:
    """The number of inputs that an output of a layer sums up, the mean of them for a transposed convolution with a stride."""
    assert isinstance(part.weight, Tensor)
    inputs = as_kernel(part, part.weight)[0].numel()
    return inputs / math.prod(part.stride) if isinstance(part, TRANSPOSED) else inputs


def check_scratch(model: nn.Module, *, otherwise: str = "use space.start = 'decomposed'") -> None:
    """Raise `ModelError`, as `scratch_` does, for a model whose weights cannot be drawn anew. `otherwise` is a remedy."""
    frozen = next((name for name, parameter in model.named_parameters() if not parameter.requires_grad), None)
    if frozen:
        raise ModelError(
            f"A net can only start from scratch if all its weights are trainable, but {frozen!r} is frozen; call "
            f"requires_grad_(), or {otherwise}."
        )
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and is_parametrised(module):
            raise ModelError(
                f"A net can only start from scratch if its layers store their weights directly, but {name!r} computes its "
                f"weight from other tensors; remove its normalisation or pruning, or {otherwise}."
            )
        if _holds_parameters(module) and not callable(getattr(module, "reset_parameters", None)):
            raise ModelError(
                f"A net can only start from scratch if each module that holds parameters has reset_parameters(), but "
                f"{name or 'the model'!r}, a {type(module).__name__}, does not; add that method, or {otherwise}."
            )


def _holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _holds_buffers(module: nn.Module) -> bool:
    return any(True for _ in module.buffers(recurse=False))
