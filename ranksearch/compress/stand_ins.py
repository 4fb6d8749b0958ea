"""Tests whether a model works with replaced layers, by running it with stand-ins that offer only what replacements will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any

from ranksearch.errors import first_line
from ranksearch.support.nesting import tensors_in

UNCALLED = "the forward does not call it by its name, but through another reference, such as a list"
"""The reason for skipping a layer that the forward calls, but not through the module's name."""


@dataclass(frozen=True)
class Pass:
    """A repeatable forward pass of a model, and the outputs of one such pass."""

    run: Callable[[], Any]
    outputs: list[Tensor]

    def matches(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the pass gives these outputs. Also True if its outputs differ each time and so cannot be compared."""
        return _alike(self.outputs, outputs) or self._repeated is None or _alike(self._repeated, outputs)

    @cached_property
    def _repeated(self) -> list[Tensor] | None:
        """The outputs of a repeated pass; None if they differ each time.

        They may differ from `outputs`, which may come from a watched pass: hooks keep a model from using its fused kernels.
        """
        first, second = tensors_of(self.run()), tensors_of(self.run())
        return first if _alike(first, second) else None


def why_not_replaced(model: nn.Module, names: Sequence[str], reference: Pass) -> dict[str, str]:
    """Why some of these layers cannot be replaced, found by running the model with a stand-in for each.

    If the run fails, or gives another result, without a reason for one layer, each half of the layers is tried alone.
    """
    if not names:
        return {}
    reasons, failure = _run_with_stand_ins(model, names, reference)
    if failure and len(names) == 1:
        return {names[0]: failure}
    if failure:
        half = len(names) // 2
        return why_not_replaced(model, names[:half], reference) | why_not_replaced(model, names[half:], reference)
    rest = [name for name in names if name not in reasons]
    return reasons | (why_not_replaced(model, rest, reference) if reasons else {})


def _run_with_stand_ins(model: nn.Module, names: Sequence[str], reference: Pass) -> tuple[dict[str, str], str]:
    """Run the model with stand-ins for these layers.

    Returns:
        By layer, the reason why it cannot be replaced; and why not all of them can be, or "".
    """
    with _standing_in(model, names) as stand_ins:
        try:
            outputs = tensors_of(reference.run())
        except Exception as error:
            return {}, f"the forward fails when it is replaced ({type(error).__name__}: {first_line(error)})"
    reasons = {name: reason for name, stand_in in stand_ins.items() if (reason := _why_not_replaced(stand_in))}
    # Outputs may differ because the forward checks a layer's type, for example.
    differs = not reasons and not reference.matches(outputs)
    return reasons, "the forward gives another result when it is replaced" if differs else ""


def _why_not_replaced(stand_in: _StandIn) -> str:
    """Why a layer cannot be replaced, after a run of the model with its stand-in; empty if it can be."""
    if stand_in.attributes_read:
        return f"its {stand_in.attributes_read[0]} is also used outside the layer"
    return "" if stand_in.called else UNCALLED


def tensors_of(outputs: Any) -> list[Tensor]:
    """Copies of the tensors in a forward's outputs: the next pass may overwrite the originals."""
    return [tensor.clone() for tensor in tensors_in(outputs)]


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two passes gave the same outputs up to rounding."""
    return len(first) == len(second) and all(
        one.shape == two.shape and torch.allclose(one.double(), two.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for one, two in zip(first, second, strict=True)
    )


def attributes_of(layer: nn.Module) -> dict[str, Any]:
    """The public attributes of a layer that contain no tensor, module or function, such as `kernel_size` and `in_features`.

    A forward may read them, so the layer's replacement gets them too.
    """
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_") and name != "training" and not tree_any(_holds_tensor_or_code, value)
    }


def _holds_tensor_or_code(value: object) -> bool:
    return isinstance(value, Tensor | nn.Module) or callable(value)


class _StandIn(nn.Sequential):
    """Wraps a layer and offers only what its replacement will: a call, and `attributes_of` the layer.

    `attributes_read` lists the other attributes that were read, `called` says whether the layer was called.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attributes_read: list[str] = []
        self.called = False
        vars(self).update(attributes_of(layer))
        self.add_module("0", layer)

    def forward(self, input: Tensor) -> Any:
        self.called = True
        return self[0](input)

    def __getattr__(self, name: str) -> Any:
        # Called for the wrapped layer itself ("0"), and for attributes that an nn.Sequential does not have.
        layer = self.__dict__.get("_modules", {}).get("0")
        if layer is None or name == "0":
            return super().__getattr__(name)
        value = getattr(layer, name)
        self.attributes_read.append(name)
        return value


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
    """Replace the submodule of that name by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore each module's own mode on exit, since some parts may be frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
