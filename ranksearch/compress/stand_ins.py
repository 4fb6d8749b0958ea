"""Whether a forward takes a layer's replacement: it is run with stand-ins that have no more than replacements will."""

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
from ranksearch.support.batch import tensors_in

UNCALLED = "the forward does not call it by its name, but keeps it elsewhere too, as in a list"
"""Why a layer is skipped that a forward finds elsewhere than under its name."""


@dataclass(frozen=True)
class Pass:
    """A pass of a model that can be made again, and the outputs that one such pass gave."""

    run: Callable[[], Any]
    outputs: list[Tensor]

    def gave(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the pass gives these outputs, or others each time, so that nothing can be told."""
        return _alike(self.outputs, outputs) or self._repeated is None or _alike(self._repeated, outputs)

    @cached_property
    def _repeated(self) -> list[Tensor] | None:
        """What the pass gives when it is made again; None where it gives something else each time.

        It may differ from `outputs`: a model that is watched does without its fused forms.
        """
        first, second = tensors_of(self.run()), tensors_of(self.run())
        return first if _alike(first, second) else None


def why_not_replaced(model: nn.Module, names: Sequence[str], whole: Pass) -> dict[str, str]:
    """Why the forward needs some of these layers as they are, found by running it with a stand-in for each."""
    if not names:
        return {}
    failed = ""
    with _standing_in(model, names) as stand_ins:
        try:
            outputs = tensors_of(whole.run())
        except Exception as error:
            failed = f"the forward fails when it is replaced ({type(error).__name__}: {first_line(error)})"
    reasons = {}
    for name, stand_in in stand_ins.items():
        if stand_in.asked:
            reasons[name] = f"its {stand_in.asked[0]} is also used outside the layer"
        elif not failed and not stand_in.called:
            reasons[name] = UNCALLED
    if not failed and not reasons and not whole.gave(outputs):
        # Such as where it asks for a layer's type.
        failed = "the forward gives another result when it is replaced"
    if failed and len(names) == 1:
        return {names[0]: failed}
    if failed:
        half = len(names) // 2
        return why_not_replaced(model, names[:half], whole) | why_not_replaced(model, names[half:], whole)
    rest = [name for name in names if name not in reasons]
    return reasons | (why_not_replaced(model, rest, whole) if reasons else {})


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of what a forward gives, copied: a module may write over them in the next pass."""
    return [tensor.clone() for tensor in tensors_in(outputs)]


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two passes gave the same, but for rounding."""
    return len(first) == len(second) and all(
        one.shape == two.shape and torch.allclose(one.double(), two.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for one, two in zip(first, second, strict=True)
    )


def attributes_of(layer: nn.Module) -> dict[str, Any]:
    """The public attributes of a layer that hold no tensor, module or function, such as `kernel_size` and `in_features`.

    A forward may read them, so the layer's replacement has them too.
    """
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_") and name != "training" and not tree_any(_is_tied, value)
    }


def _is_tied(value: object) -> bool:
    return isinstance(value, Tensor | nn.Module) or callable(value)


class _StandIn(nn.Sequential):
    """A layer as its replacement will be: called like it, with its attributes that hold no tensor. Notes what else it is
    asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.called = False
        vars(self).update(attributes_of(layer))
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module gets its own mode back, since a model may hold frozen parts."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
