"""Watches a forward pass: which layers are called, in which order, on which shapes, and the multiply-accumulates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress.axes import Axes, Flattened
from ranksearch.compress.macs import OperationCounter, OperationsByModule
from ranksearch.compress.stand_ins import evaluating, tensors_of
from ranksearch.methods.layer import CONVOLUTIONS, TRANSPOSED
from ranksearch.support.batch import run_model


class Watch:
    """Runs a model once and records the calls of its candidates: order, shapes, and the maps flattened before them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.candidates = {name: module for name, module in model.named_modules() if is_candidate(module)}
        self.names = names_of_parameters(model)
        self.axes = Axes()
        self.order: list[str] = []
        """The candidates in the order of their first calls."""
        # By name, one entry for each call.
        self.shapes = defaultdict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]](list)
        self.maps = defaultdict[str, list[Flattened | None]](list)
        self.sized: set[str] = set()
        """The transposed convolutions that are called with an output size."""
        self.outputs: list[Tensor] = []
        self._counter = OperationCounter()
        self.operations = OperationsByModule(self._counter)

    @property
    def used(self) -> set[str]:
        """The names of the parameters that were used, each under all of its names."""
        scripted = [module for module in self.model.modules() if isinstance(module, torch.jit.ScriptModule)]
        hidden = {id(parameter) for module in scripted for parameter in module.parameters()}  # torch does not say what it uses
        return {name for key in self.axes.used | hidden for name in self.names.get(key, ())}

    def run(self, example: Any) -> int:
        """Run one pass in eval mode; returns its multiply-accumulates."""
        by_module = self.operations.of(self.model)
        with self.noting(), by_module, evaluating(self.model), torch.no_grad(), self._counter, self.axes:
            self.outputs = tensors_of(run_model(self.model, example))
        return self._counter.flops // 2

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Record the calls of the candidates."""
        with ExitStack() as hooks:
            for name, module in self.candidates.items():
                hooks.enter_context(module.register_forward_hook(partial(self._note, name), with_kwargs=True))
            yield

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        if name not in self.order:
            self.order.append(name)
        if isinstance(module, TRANSPOSED) and len(args) + len(kwargs) > 1:
            self.sized.add(name)
        layer_input = subject(args, kwargs)
        if isinstance(layer_input, Tensor) and isinstance(output, Tensor):
            self.shapes[name].append((tuple(layer_input.shape), tuple(output.shape)))
            self.maps[name].append(self.axes.flattened_map(layer_input))


def is_candidate(module: nn.Module) -> bool:
    """Whether a module is a convolution or fully connected layer, or has such a name, so that the inventory explains it."""
    # The class name identifies quantised and lazy layers, which are reported as skipped. Quantised ones keep their weights in a
    # child.
    name, inner = type(module).__name__, {type(child).__name__ for child in module.children()}
    named = ("Conv" in name or "Linear" in name) and "PackedParams" not in name
    return isinstance(module, (*CONVOLUTIONS, nn.Linear)) or (named and all("PackedParams" in child for child in inner))


def subject(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """The first argument of a function or module, which torch calls `input`."""
    return args[0] if args else (kwargs or {}).get("input")


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each parameter, all its names in a model; a shared parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
