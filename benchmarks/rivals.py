"""The contenders of `peers.py`: each makes smaller models of one dense net, with as many epochs of training as the others.

A contender that prunes, or trains from scratch, trains each of its models for as long as one of ours: a narrower net and a
finalist together, and the dense net's epochs too if it starts from scratch. It makes as many models as fit into the epochs of a
whole study of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn

from ranksearch.compress.saved import load_model
from ranksearch.compress.surgery import copied
from ranksearch.compress.widths import redraw_, scale_width_
from ranksearch.data import batches, example
from ranksearch.spec import Recipe, StudySpec
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from ranksearch.support.batch import run_model
from ranksearch.support.seeds import seeded
from ranksearch.task import training
from ranksearch.task.task import Task

CPU = torch.device("cpu")
SMALLEST_SHARE = 0.05
"""The smallest share of its channels that a pruned net, or one from scratch, keeps."""
TAYLOR_BATCHES = 8
FULL_WIDTH = (1.0,)
FAST_WIDTHS = (1.0, 0.1, 0.03, 0.015, 0.007, 0.003)
"""For the latency: ranks hardly make a small net faster, so narrower nets make up the front."""


@dataclass(frozen=True)
class Arena:
    """A study and its dense net, trained and kept in the file `weights`: what all contenders start from."""

    spec: StudySpec
    task: Task
    weights: Path
    folder: Path
    workers: int

    @property
    def epochs(self) -> int:
        """Epochs of training in a whole study of ours, on top of the dense net's."""
        spec = self.spec
        narrow = (len(spec.space.widths) - 1) * spec.narrow.epochs
        return narrow + spec.search.trials * spec.finetune.epochs + spec.finalists.count * spec.finalists.epochs


@dataclass(frozen=True)
class Made:
    """A model that a contender made, with its scores."""

    label: str
    model: nn.Module
    validation: float
    test: float


Contender = Callable[[Arena], Iterator[Made]]


def ours(*costs: str, widths: Sequence[float] = ()) -> Contender:
    """A study of ours that minimises these costs, with other widths than those of the arena if any are given."""

    def run(arena: Arena) -> Iterator[Made]:
        dense = replace(arena.spec.dense, weights=str(arena.weights), epochs=0)
        spec = replace(arena.spec, controls=0, dense=dense, search=replace(arena.spec.search, minimize=costs))
        if widths:
            spec = replace(spec, space=replace(spec.space, widths=tuple(widths)))
        out = arena.folder / f"study-{'-'.join(costs)}{'-full-width' if widths == FULL_WIDTH else ''}"
        record = run_study(spec, out, Options(Local(workers=arena.workers)))
        for trial in record.trials:
            if trial.finalist is not None:
                model = load_model(arena.task.model, out / "models" / str(trial.number))
                final = trial.finalist
                yield Made(str(trial.plan), model, final.score_validation, final.score_test)

    return run


def pruned(*, round_to: int | None = None) -> Contender:
    """Torch-Pruning: every layer loses the same share of its channels, those of the least first-order importance."""

    def run(arena: Arena) -> Iterator[Made]:
        recipe = _longer(arena.spec.narrow, arena.spec.finalists.epochs)
        shapes = set[tuple[tuple[int, ...], ...]]()
        for share in _shares(math.ceil(arena.epochs / recipe.epochs)):
            model = _pruned(arena, share, round_to)
            shape = tuple(tuple(parameter.shape) for parameter in model.parameters())
            if shape not in shapes:  # rounding may give the same net again
                shapes.add(shape)
                yield _trained(arena, model, recipe, f"{share:.3f} of the channels")

    return run


def _pruned(arena: Arena, share: float, round_to: int | None) -> nn.Module:
    model, inputs = copied(arena.task.model), example(arena.task.data.train)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=tp.importance.GroupTaylorImportance(), pruning_ratio=1 - share, ignored_layers=[last],
        round_to=round_to,
    )  # fmt: skip
    model.eval().zero_grad()
    with seeded(arena.spec.seed):
        for _, (batch, targets) in zip(range(TAYLOR_BATCHES), batches(arena.task.data.train, 64), strict=False):
            arena.task.loss(run_model(model, batch), targets).backward()
    pruner.step()
    model.zero_grad()
    return model


def from_scratch(arena: Arena) -> Iterator[Made]:
    """Nets of the same architecture with fewer channels, from random weights."""
    spec = arena.spec
    recipe = _longer(spec.dense, spec.narrow.epochs + spec.finalists.epochs)
    # Half of these shares leave a number of channels that is a power of two, which runs fast.
    count = math.ceil(arena.epochs / recipe.epochs)
    for share in (2 ** (-step / 2) for step in range(1, count + 1)):
        model = scale_width_(copied(arena.task.model), example(arena.task.data.train), share)
        redraw_(model, seed=spec.seed)
        yield _trained(arena, model, recipe, f"{share:.3f} of the channels")


def _shares(count: int) -> Sequence[float]:
    """Shares of the channels, log-spaced, the largest first."""
    return [SMALLEST_SHARE ** (step / count) for step in range(1, count + 1)]


def _longer(recipe: Recipe, epochs: int) -> Recipe:
    return Recipe(recipe.epochs + epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay, recipe.precision)


def _trained(arena: Arena, model: nn.Module, recipe: Recipe, label: str) -> Made:
    task = arena.task
    model = training.place(model, CPU, channels_last=task.channels_last)
    for _ in training.fit(model, task, recipe, seed=arena.spec.seed, device=CPU):
        pass
    scores = [training.score(model, task, split, device=CPU) for split in (task.data.validation, task.data.test)]
    return Made(label, model.eval(), *scores)


CONTENDERS: dict[str, tuple[str, Contender]] = {
    "ours-size": ("**ours**, for parameters and MACs", ours("params", "macs")),
    "ours-latency": ("**ours**, for latency", ours("latency", widths=FAST_WIDTHS)),
    "full-size": ("ours, for parameters and MACs, without widths", ours("params", "macs", widths=FULL_WIDTH)),
    "full-latency": ("ours, for latency, without widths", ours("latency", widths=FULL_WIDTH)),
    "pruning": ("Torch-Pruning", pruned()),
    "pruning-8": ("Torch-Pruning, multiples of 8", pruned(round_to=8)),
    "scratch": ("narrow nets from scratch", from_scratch),
}
