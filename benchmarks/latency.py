"""Predicted latencies against measured ones, and plans chosen for the latency against plans chosen for other costs.

    python benchmarks/latency.py --write             # a quarter of an hour on two cores; makes the tables of docs/benchmarks.md
    python benchmarks/latency.py --nets LeNet        # a minute; prints the tables only

One thread; all models of a row are timed in turn, each at the least of its rounds. Weights are untrained, with a decaying
spectrum, since times do not depend on them. A study measures the table of latencies that the predictions come from.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchvision
from decompose import decay_
from pages import machine, row, said, table, write_section
from scipy.stats import spearmanr
from torch import nn

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.surgery import copied, factorize_
from ranksearch.latency.runtimes import OnnxRuntime, Runtime, Torch
from ranksearch.latency.table import latency_table, random_factors
from ranksearch.latency.timing import in_turn
from ranksearch.methods import FEWER_PARAMS, Method, RankConstraints
from ranksearch.models import lenet, nin, vgg16
from ranksearch.plan import Plan
from ranksearch.spec import TIMED_RANK_MULTIPLE, Space
from ranksearch.strategy.predicted_front import Choice, predicted_front
from ranksearch.strategy.space import make_space, size_of
from ranksearch.support.batch import repeat_batch

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (lenet, (1, 3, 32, 32)),
    "NIN": (nin, (1, 3, 32, 32)),
    "VGG-16, CIFAR": (vgg16, (1, 3, 32, 32)),
    "ResNet-18, 160 px": (torchvision.models.resnet18, (1, 3, 160, 160)),
}
BATCHES = 1, 32
RANDOM_PLANS = 20
SPEED_UP = 2.5
"""The plan that is chosen for the latency is the first that is predicted so many times faster than dense."""
CONSTRAINTS = RankConstraints(multiple=TIMED_RANK_MULTIPLE)


@dataclass(frozen=True)
class Net:
    """A net with its layers and the methods for each."""

    name: str
    model: nn.Module
    example: Any
    layers: Inventory
    methods: Mapping[str, Sequence[Method]]

    def random(self, plan: Plan) -> nn.Module:
        """The model of that plan with random factors."""
        factors = {name: random_factors(self.layers[name], value) for name, value in plan}
        return factorize_(copied(self.model), plan, factors=factors).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), help="only these")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    nets = [built(name) for name in options.nets]
    lines = [machine("torch", "onnxruntime"), said(f"One thread; ranks are multiples of {TIMED_RANK_MULTIPLE}.\n")]
    lines += [*prediction_table(nets), "", *choice_table(nets)]
    if options.write:
        write_section("latency", "python benchmarks/latency.py --write", "\n".join(lines))


def built(name: str) -> Net:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    decay_(model)
    example = torch.randn(shape)
    layers = inventory(model, example)
    axes = make_space(layers, Space().methods, constraints=CONSTRAINTS).axes
    return Net(name, model, example, layers, {axis.layer.name: axis.methods for axis in axes})


def runtimes() -> Iterator[Runtime]:
    yield OnnxRuntime()
    yield Torch(torch.device("cpu"))


def prediction_table(nets: Sequence[Net]) -> list[str]:
    """Twenty random plans of each net: how far predictions lie from measurements."""
    said("Predicted against measured latencies of 20 random plans:\n")
    lines = table(["net", "runtime", "batch", "dense", "fastest plan", "table took", "median error", "largest", "Spearman"])
    for net in nets:
        for runtime in runtimes():
            for batch in BATCHES:
                lines.append(prediction_row(net, runtime, batch))
    return lines


def prediction_row(net: Net, runtime: Runtime, batch: int) -> str:
    inputs, start = repeat_batch(net.example, batch), time.monotonic()
    timed = latency_table(net.model, net.layers, net.methods, runtime, inputs, constraints=CONSTRAINTS).applied(net.layers)
    seconds = time.monotonic() - start
    plans = [Plan(), *random_plans(net)]
    predicted = [size_of(plan, timed).costs["latency"] for plan in plans]
    measured = in_turn([runtime.prepare(net.random(plan), inputs) for plan in plans]).ms
    errors = [abs(guess / ms - 1) for guess, ms in zip(predicted[1:], measured[1:], strict=True)]
    return row(
        net.name, runtime.name, batch, f"{measured[0]:.3g} ms", f"{min(measured):.3g} ms", f"{seconds:.0f} s",
        f"{statistics.median(errors):.1%}", f"{max(errors):.0%}", f"{spearmanr(predicted[1:], measured[1:])[0]:.3f}",
    )  # fmt: skip


def random_plans(net: Net) -> Iterator[Plan]:
    """Plans of all sizes; another draw than that of the plans in the table of latencies."""
    draw = random.Random(17)
    for _ in range(RANDOM_PLANS):
        size, values = draw.random(), {}
        for name, methods in net.methods.items():
            layer, method = net.layers[name], draw.choice(list(methods))
            grid = sorted(method.rank_grid(layer, CONSTRAINTS), key=lambda ranks: method.macs(layer, ranks))
            place = min(1.0, max(0.0, size + draw.uniform(-0.3, 0.3)))
            if draw.random() > 0.1:
                values[name] = method.value(layer, grid[round(place * (len(grid) - 1))])
        yield Plan.of(values)


def choice_table(nets: Sequence[Net]) -> list[str]:
    """Plans of equal predicted loss, chosen for the latency, the multiply-accumulates or the parameters."""
    said(
        f"\nPlans of one sum of squared relative errors, that of the plan predicted {SPEED_UP:g} times faster than dense; "
        "chosen for each cost. Studies that minimise multiply-accumulates or parameters have ranks of any size; the last two "
        "columns compare with plans of the ranks that the latency study has:\n"
    )
    others = "macs", "params"
    lines = table([
        "net", "runtime", "batch", "dense", "chosen for latency", *(f"chosen for {cost}" for cost in others),
        *(f"gain over {cost}" for cost in others), *(f"{cost}, same ranks" for cost in others),
    ])  # fmt: skip
    gains = []
    for net in nets:
        same = profile(net.model, net.layers, net.methods, constraints=CONSTRAINTS).layers
        free = profile(net.model, net.layers, net.methods, constraints=FEWER_PARAMS).layers
        for runtime in runtimes():
            for batch in BATCHES:
                inputs = repeat_batch(net.example, batch)
                timed = latency_table(net.model, net.layers, net.methods, runtime, inputs, constraints=CONSTRAINTS)
                fastest, *plans = equal_plans(timed.applied(net.layers), same, free, others)
                calls = [runtime.prepare(net.random(plan), inputs) for plan in (Plan(), fastest, *plans)]
                dense, *ms = in_turn(calls).ms
                gain = [each / ms[0] for each in ms[1:]]
                gains.append(gain)
                cells = [f"{each:.3g} ms ({dense / each:.1f}x)" for each in ms[:3]]
                lines.append(row(net.name, runtime.name, batch, f"{dense:.3g} ms", *cells, *(f"{each:.2f}x" for each in gain)))
    medians = [f"{statistics.median(gain):.2f}x" for gain in zip(*gains, strict=True)]
    lines.append(row("median", *[""] * 6, *medians))
    return lines


def equal_plans(timed: Inventory, same: Mapping[str, Any], free: Mapping[str, Any], others: Sequence[str]) -> list[Plan]:
    """The plan that is chosen for the latency, and for each other cost the cheapest plans of no larger error: of ranks of any
    size, then of the same ranks as the first."""
    fastest = front(timed, same, "latency")
    dense = timed.costs["latency"]
    first = next((c for c in fastest if dense / (dense - c.saved) >= SPEED_UP), fastest[-1])
    fronts = [front(timed, layers, cost) for layers in (free, same) for cost in others]
    return [first.plan, *([c for c in corners if c.loss_increase <= first.loss_increase][-1].plan for corners in fronts)]


def front(timed: Inventory, layers: Mapping[str, Any], cost: str) -> list[Any]:
    choices = {
        name: [
            Choice(candidate.value, cost_of(timed, name, candidate.value, cost), candidate.error**2)
            for candidate in layer.candidates()
        ]
        for name, layer in layers.items()
    }
    return predicted_front({layer.name: layer.costs[cost] for layer in timed.layers}, choices)


def cost_of(timed: Inventory, name: str, value: Any, cost: str) -> float:
    plan = Plan.of({name: value})
    return size_of(plan, timed).costs[cost] - timed.costs[cost] + timed[name].costs[cost]


if __name__ == "__main__":
    main()
