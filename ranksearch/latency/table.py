"""The time of any plan, predicted from a few measurements of each layer.

Each layer is timed by itself, dense and at some ranks of each method. Between those ranks its time is read from a model that is
linear in its work: the parts that are built, multiply-accumulates, values passed between parts, with coefficients that are not
negative (Idelbayev and Carreira-Perpinan 2021, "Beyond FLOPs in low-rank compression of neural networks"). Then a
few whole plans are timed: they tell what the times of layers add up to. What lies between the layers adds a constant, and
weights are read from memory, since those of all layers together do not stay in the cache as those of one do.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from ranksearch.compress.inventory import Inventory
from ranksearch.compress.plain import plain_of
from ranksearch.compress.surgery import copied, factorize_
from ranksearch.latency.runtimes import Runtime
from ranksearch.latency.timing import in_turn
from ranksearch.methods import FEWER_PARAMS, METHODS, Method, RankConstraints
from ranksearch.methods.layer import Call, Layer, LayerLatency
from ranksearch.plan import Factorization, Plan
from ranksearch.support.batch import batch_size

POINTS = 6
"""Ranks at which a layer is timed for a method, times the number of the method's ranks."""
PLANS = 16
"""Whole plans that are timed."""
DENSE_SHARE, JITTER = 0.15, 0.25
"""The share of their layers that stay dense, and how far the others lie from the size of the plan, as a share of the grid."""
LAYER_ROUNDS, MAX_LAYER_SECONDS = 8, 10.0
DENSE_WEIGHT = 3.0
"""The dense model counts as so many plans in the fit: all others are set against it."""


@dataclass(frozen=True)
class Table:
    """The measured times of one model's layers, in one runtime."""

    layers: Mapping[str, LayerLatency]
    rest_ms: float
    """What lies between the layers."""
    median_error: float
    """Of the times that are predicted for the plans that were timed whole, relative."""

    def applied(self, inventory: Inventory) -> Inventory:
        """The inventory with the latencies of its layers, so that every plan has one."""
        layers = tuple(replace(layer, latency=self.layers.get(layer.name)) for layer in inventory.layers)
        return replace(inventory, layers=layers, rest_ms=self.rest_ms)

    def to_json(self) -> str:
        """The table as JSON."""
        layers = {
            name: {"dense": layer.dense, "methods": {method: list(model) for method, model in layer.methods.items()}}
            for name, layer in self.layers.items()
        }
        return json.dumps({"layers": layers, "rest_ms": self.rest_ms, "median_error": self.median_error}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The inverse of `to_json`."""
        data = json.loads(text)
        layers = {
            name: LayerLatency(entry["dense"], {method: tuple(model) for method, model in entry["methods"].items()})
            for name, entry in data["layers"].items()
        }
        return cls(layers, data["rest_ms"], data["median_error"])


def latency_table(
    model: nn.Module,
    inventory: Inventory,
    methods: Mapping[str, Sequence[Method]],
    runtime: Runtime,
    example: Any,
    *,
    constraints: RankConstraints = FEWER_PARAMS,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Table:
    """Time the layers of `model`, and a few plans, where `runtime` runs them.

    Args:
        model: the dense model, on the CPU; its weights do not matter.
        inventory: its layers.
        methods: by layer name, the decompositions to time. A layer without any is timed dense.
        runtime: where.
        example: a batch of inputs, of the size that is timed, on the CPU.
        constraints: the ranks to choose from.
        on_layer: called with each layer's name when it is timed.

    Raises:
        ModelError, StudyError: the runtime does not take the model, or gives no time.
    """
    # First the whole, which a runtime may refuse.
    dense = runtime.prepare(model, example)
    single: dict[str, LayerLatency] = {}
    for layer in inventory.layers:
        single[layer.name] = _layer(model, layer, methods.get(layer.name, ()), runtime, constraints, batch_size(example))
        on_layer(layer.name)
    plans = [Plan(), *_plans(inventory.layers, methods, constraints)]
    rows = np.array([_sums(plan, inventory.layers, single) for plan in plans])
    calls = [dense, *(runtime.prepare(_random(model, plan, inventory), example) for plan in plans[1:])]
    measured = np.array(in_turn(calls).ms)
    weights = np.array([DENSE_WEIGHT, *[1.0] * (len(plans) - 1)])
    (rest, scale, per_param), _ = nnls(rows * (weights / measured)[:, None], weights)
    errors = np.abs(rows @ (rest, scale, per_param) - measured) / measured
    layers = {layer.name: _scaled(single[layer.name], layer, scale, per_param) for layer in inventory.layers}
    return Table(layers, float(rest), float(np.median(errors)))


def _layer(
    model: nn.Module, layer: Layer, methods: Sequence[Method], runtime: Runtime, constraints: RankConstraints, batch: int
) -> LayerLatency:
    """The layer by itself."""
    dense = model.get_submodule(layer.name)
    plain = plain_of(dense, layer.padding)
    assert plain is not None  # the inventory skips other layers
    timed = [(method, ranks) for method in methods for ranks in _ranks(method, layer, constraints)]
    modules = [dense]
    for method, ranks in timed:
        factors = random_factors(layer, method.value(layer, ranks))
        modules.append(method.build(plain.layer, layer.weight, ranks, factors, plain.padding))
    whole, *times = time_calls(layer, modules, runtime, batch)
    found = {}
    for method in methods:
        points = [(method.work(layer, ranks), ms) for (which, ranks), ms in zip(timed, times, strict=True) if which is method]
        found[method.kind.method] = _model(points)
    return LayerLatency(whole, found)


def _model(points: Sequence[tuple[Sequence[float], float]]) -> tuple[float, ...]:
    """The coefficients of least relative error, none of them negative. That of the parameters is 0: a layer by itself finds its
    weights in the cache."""
    work = np.array([work for work, _ in points])
    ms = np.array([ms for _, ms in points])
    scale = np.maximum(work.max(0), 1e-30)
    coefficients, _ = nnls((work / scale / ms[:, None])[:, :-1], np.ones(len(ms)))
    return (*(coefficients / scale[:-1]).tolist(), 0.0)


def _scaled(latency: LayerLatency, layer: Layer, scale: float, per_param: float) -> LayerLatency:
    """The times of a layer within the net, from those of the layer by itself."""
    methods = {
        name: (*(float(scale * coefficient) for coefficient in model[:-1]), float(per_param))
        for name, model in latency.methods.items()
    }
    return LayerLatency(float(scale * latency.dense + per_param * layer.params), methods)


def _sums(plan: Plan, layers: Sequence[Layer], single: Mapping[str, LayerLatency]) -> tuple[float, float, float]:
    """1, and the sums over all layers of their times by themselves and of their parameters."""
    values, ms, params = dict(plan), 0.0, 0
    for layer in layers:
        latency, value = single[layer.name], values.get(layer.name)
        if value is None:
            ms, params = ms + latency.dense, params + layer.params
        else:
            method = METHODS[type(value)]
            ms += latency.ms(value.method, method.work(layer, value.ranks))
            params += method.params(layer, value.ranks)
    return 1.0, ms, float(params)


def _plans(layers: Sequence[Layer], methods: Mapping[str, Sequence[Method]], constraints: RankConstraints) -> list[Plan]:
    """Plans of all sizes, each of all methods."""
    draw, plans = random.Random(0), []
    grids = {
        (layer.name, method): sorted(method.rank_grid(layer, constraints), key=lambda ranks: method.macs(layer, ranks))
        for layer in layers
        for method in methods.get(layer.name, ())
    }
    for step in range(PLANS):
        values = {}
        for layer in (layer for layer in layers if methods.get(layer.name)):
            method = draw.choice(list(methods[layer.name]))
            grid, place = grids[layer.name, method], step / (PLANS - 1) + draw.uniform(-JITTER, JITTER)
            if draw.random() >= DENSE_SHARE or len(layers) == 1:
                values[layer.name] = method.value(layer, grid[round(min(1, max(0, place)) * (len(grid) - 1))])
        plans.append(Plan.of(values))
    return plans


def _ranks(method: Method, layer: Layer, constraints: RankConstraints) -> list[tuple[int, ...]]:
    """Ranks to time: all over the grid, and not along a line of it."""
    grid = method.rank_grid(layer, constraints)
    count = min(len(grid), POINTS * len(grid[0]))
    if len(grid[0]) == 1:
        return [grid[round(step * (len(grid) - 1) / max(1, count - 1))] for step in range(count)]
    ends = {grid[0], grid[-1]}
    return sorted(ends | set(random.Random(0).sample(grid, max(0, count - len(ends)))))


def time_calls(layer: Layer, modules: Sequence[nn.Module], runtime: Runtime, batch: int) -> list[float]:
    """Milliseconds of each of these forms of a layer, in turn, for all of its calls on a batch of the model's inputs.

    Calls of the same size are timed once.
    """
    counts = Counter(layer.calls)
    calls = [runtime.prepare(module, call_inputs(layer, call, batch)) for call in counts for module in modules]
    times = in_turn(calls, rounds=LAYER_ROUNDS, max_seconds=MAX_LAYER_SECONDS).ms
    rows = [times[start : start + len(modules)] for start in range(0, len(times), len(modules))]
    return [sum(count * ms for count, ms in zip(counts.values(), each, strict=True)) for each in zip(*rows, strict=True)]


def call_inputs(layer: Layer, call: Call, batch: int) -> Tensor:
    """Random inputs of the shape that the layer has in a call for a batch of the model's inputs."""
    if layer.flattened or len(layer.weight) == 2:
        shape: tuple[int, ...] = (math.prod(layer.weight[1:]),)
    else:
        shape = (layer.groups * layer.weight[1], *call.in_size)
    return torch.randn((batch * call.times, *shape), generator=torch.Generator().manual_seed(0))


def random_factors(layer: Layer, value: Factorization) -> tuple[Tensor, ...]:
    """Factors of a layer's factorization, drawn at random: times do not depend on their values."""
    draw, shapes = torch.Generator().manual_seed(0), METHODS[type(value)].factor_shapes(layer.weight, value.ranks, layer.groups)
    return tuple(torch.randn(shape, generator=draw) * 0.05 for shape in shapes)


def _random(model: nn.Module, plan: Plan, inventory: Inventory) -> nn.Module:
    """The model of that plan with random factors."""
    factors = {name: random_factors(inventory[name], value) for name, value in plan}
    return factorize_(copied(model), plan, factors=factors).eval()
