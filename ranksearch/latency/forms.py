"""Times each factorized layer of a model in both forms, as its factors and as one dense layer, where the model will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ranksearch.compress.inventory import Inventory
from ranksearch.compress.merging import can_merge, merge_, merged
from ranksearch.compress.surgery import copied
from ranksearch.latency.runtimes import Runtime
from ranksearch.latency.table import time_calls
from ranksearch.latency.timing import in_turn
from ranksearch.methods.layer import Layer
from ranksearch.plan import Factorization, Plan
from ranksearch.support.batch import batch_size

MIN_GAIN = 0.05
"""Times of one layer that differ by a smaller share count as equal. The factors, which are fewer numbers, are then kept."""


@dataclass(frozen=True)
class Forms:
    """The times of a model's factorized layers in both forms, in milliseconds."""

    layers: Mapping[str, tuple[float, float]]
    """By layer: as its factors, and as one dense layer."""
    whole: tuple[float, float] | None
    """Of the whole model: as it is, and with the layers merged that are faster dense; None if there are none."""

    @property
    def faster_dense(self) -> tuple[str, ...]:
        """The layers that are faster dense."""
        return tuple(name for name, (factors, dense) in self.layers.items() if dense < (1 - MIN_GAIN) * factors)

    @property
    def to_merge(self) -> tuple[str, ...]:
        """The layers to merge: those that are faster dense, if the whole model is then no slower."""
        return self.faster_dense if self.whole and self.whole[1] <= self.whole[0] else ()

    def words(self, where: str) -> str:
        """What is merged and why, in one line."""
        if self.whole is None:
            return f"no layer merged: none is faster dense in {where}"
        layers = ", ".join(f"{name} ({_change(self.layers[name])})" for name in self.faster_dense)
        whole = f"the whole model {_change(self.whole)}, in {where}"
        return f"merged {layers}; {whole}" if self.to_merge else f"no layer merged: {layers} alone, but {whole}"


def time_forms(model: nn.Module, plan: Plan, inventory: Inventory, runtime: Runtime, example: Any) -> Forms:
    """Time the factorized layers of `model` in both forms, and the whole model with the faster ones.

    Args:
        model: the factorized model, on the CPU; not changed.
        plan: its plan.
        inventory: the layers of the dense model.
        runtime: where to time.
        example: a batch of inputs, of the size to time, on the CPU.

    Raises:
        ModelError, StudyError: the runtime does not take the model, or gives no time.
    """
    whole, batch = runtime.prepare(model, example), batch_size(example)  # First the whole, which a runtime may refuse.
    modules = {name: model.get_submodule(name) for name, _ in plan}
    layers = {
        name: _both(modules[name], value, inventory[name], runtime, batch) for name, value in plan if can_merge(modules[name])
    }
    faster = Forms(layers, None).faster_dense
    if not faster:
        return Forms(layers, None)
    twin = copied(model)
    merge_(twin, plan, faster)
    before, after = in_turn([whole, runtime.prepare(twin, example)]).ms
    return Forms(layers, (before, after))


def _change(times: tuple[float, float]) -> str:
    before, after = times
    return f"{before:.3g} -> {after:.3g} ms"


def _both(module: nn.Module, value: Factorization, layer: Layer, runtime: Runtime, batch: int) -> tuple[float, float]:
    factors, dense = time_calls(layer, [module, merged(layer.name, module, value)], runtime, batch)
    return factors, dense
