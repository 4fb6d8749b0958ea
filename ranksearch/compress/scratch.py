"""A factorized net from scratch: its structure is the plan's, and no weight of it is one of the dense net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ranksearch.compress.inventory import is_parametrised
from ranksearch.compress.surgery import skeleton_
from ranksearch.errors import ModelError
from ranksearch.methods.layer import CONVOLUTIONS
from ranksearch.plan import Plan

M = TypeVar("M", bound=nn.Module)


def scratch_(model: M, plan: Plan, *, seed: int) -> M:
    """Factorize `model` in place as `plan` says, and draw every weight anew: of the factors as `initialise_` does, of all
    other modules as their `reset_parameters` does. Buffers that belong to it, such as running statistics, start anew too.

    Raises:
        ModelError: a module holds parameters that it cannot draw anew, or that are frozen.
        PlanError: as `factorize_` does.
    """
    check_scratch(model)
    # The caller's random numbers are its own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Before layers are replaced: a block may reset the layers in it by itself.
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and (_holds_parameters(module) or _holds_buffers(module)):
                reset()
        skeleton_(model, plan)
        for name, _ in plan:
            initialise_([part for part in model.get_submodule(name).children() if _holds_parameters(part)])
    return model


def initialise_(parts: Sequence[nn.Module], *, last: str = "relu") -> None:
    """Weights of linear layers in a row that keep the variance of what they are given, biases 0 (He et al. 2015).

    torch's own would leave a third of the variance a layer, and so next to nothing of a net of several such rows. The
    last layer's weights make up for the nonlinearity `last` behind it.
    """
    for part in parts:
        assert isinstance(part.weight, Tensor)
        nn.init.kaiming_normal_(part.weight, nonlinearity=last if part is parts[-1] else "linear")  # type: ignore[arg-type]
        if isinstance(part.bias, Tensor):
            nn.init.zeros_(part.bias)


def check_scratch(model: nn.Module) -> None:
    """Refuse a model that cannot be drawn anew; raises `ModelError` as `scratch_` does."""
    frozen = next((name for name, parameter in model.named_parameters() if not parameter.requires_grad), None)
    if frozen:
        raise ModelError(
            f"A net can start from scratch if all its weights are trained, but {frozen!r} is frozen; call requires_grad_(), or "
            "use space.start = 'decomposed'."
        )
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and is_parametrised(module):
            raise ModelError(
                f"A net can start from scratch if its layers hold their weights as they are, but {name!r} computes its own "
                "from others; remove its normalisation or pruning, or use space.start = 'decomposed'."
            )
        if _holds_parameters(module) and not callable(getattr(module, "reset_parameters", None)):
            raise ModelError(
                f"A net can start from scratch if each module that holds parameters has reset_parameters(), but "
                f"{name or 'the model'!r}, a {type(module).__name__}, has not; give it one, or use space.start = "
                "'decomposed'."
            )


def _holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _holds_buffers(module: nn.Module) -> bool:
    return any(True for _ in module.buffers(recurse=False))
