"""Models with inputs and outputs of any nesting, as exporters need them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.support.batch import run_model
from ranksearch.support.nesting import as_plain, map_tensors, tensors_in


class Flat(nn.Module):
    """Takes the tensors of the model's inputs in a row, and gives those of its outputs.

    Args:
        model: the model.
        inputs: a batch of inputs, for the nesting.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.places = [map_tensors(lambda tensor: torch.empty(0), inputs)]  # in a list, so that no tensor is an attribute

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        left = iter(tensors)
        return tuple(tensors_in(run_model(self.model, map_tensors(lambda place: next(left), self.places[0]))))


class Plain(nn.Module):
    """Called as the model, and gives the same outputs, but as plain dicts where they are subclasses of dict or dataclasses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Any, **kwargs: Any) -> Any:
            return as_plain(self.model(*args, **kwargs))

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.forward = forward
