"""Before anything is written: checks a study's spec, options, model and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.narrowing import check_width
from ranksearch.compress.saved import check_reloading
from ranksearch.compress.scratch import check_scratch
from ranksearch.compress.surgery import copied
from ranksearch.compress.weights import check_state, digest_of
from ranksearch.console import View
from ranksearch.data import batches, check_splits, example
from ranksearch.engines.shared_memory import check_portable
from ranksearch.errors import ModelError, SpecError, StudyError
from ranksearch.latency.table import Table
from ranksearch.plan import Plan
from ranksearch.results.scores import is_percent
from ranksearch.spec import StudySpec
from ranksearch.strategy.bases import Bases, check_limits
from ranksearch.strategy.space import SearchSpace, space_of
from ranksearch.study import folder
from ranksearch.study.dense import load_required_weights
from ranksearch.study.inputs import inputs_of
from ranksearch.study.options import Options
from ranksearch.study.probing import read_user_plans
from ranksearch.study.timing import time_layers
from ranksearch.support.batch import batch_shapes
from ranksearch.support.seeds import seeded
from ranksearch.task import training
from ranksearch.task.checks import check_arguments, check_float32, check_outputs
from ranksearch.task.distillation import is_against_dense
from ranksearch.task.showing import check_show
from ranksearch.task.task import Task, load_task


@dataclass(frozen=True)
class Checked:
    """A study whose spec, options, model and data fit together."""

    task: Task
    device: torch.device
    inventory: Inventory
    table: Table | None
    """The latencies of the layers, if latency is a cost of the study."""
    space: SearchSpace
    user_plans: Sequence[Plan]
    """The user's plans to try first."""
    inputs: Mapping[str, Any]
    """The fingerprint of data and weights."""
    model_given: bool
    """Whether the model was passed from Python."""


def check_inputs(spec: StudySpec, out: Path, options: Options, task: Task | None, first: Sequence[Plan], view: View) -> Checked:
    """Check a study before anything is written. The arguments are those of `run_study`, which says what is raised."""
    device = choose_device(options.engine.device)
    model_given, task = task is not None, task or load_task(spec)
    if not model_given:
        _check_dense_given(spec, task)
    check_splits(task.data)
    fresh = copied(task.model)
    check_arguments(task)
    layers = inventory(task.model, example(task.data.train))
    task = check_outputs(task, trains=any(part.epochs for part in (spec.dense, spec.finetune, spec.finalists)))
    check_show(task)
    if device.type == "mps":
        check_float32(task)
    check_state(task.model)
    task = replace(task, channels_last=training.takes_channels_last(task))
    layers, table = time_layers(spec, task, layers, device, out, view, fresh=options.fresh)
    space = space_of(spec.space, layers)
    _check_sizes(task, space)
    _check_widths(spec, task)
    if spec.space.widths == (1.0,):
        check_limits(spec.search.limits, Bases.of(space, layers))
    check_reloading(task.model, fresh, _smallest_layer(space), next(batches(task.data.train, 2))[0])
    user_plans = read_user_plans(spec.search.first, first, space, layers)
    if spec.space.start == "scratch":
        check_scratch(task.model)
    _check_min_score(spec, task)
    dense_saved = (out / folder.DENSE_FILE).exists() and not options.fresh
    inputs = inputs_of(task.data, _load_initial_weights(spec, task, view, dense_saved=dense_saved))
    if options.storage:
        folder.check_study(spec, options.storage, inputs, fresh=options.fresh, announce=view.note)
    if options.engine.workers != 0:
        check_portable(replace(task, show=None))
    return Checked(task, device, layers, table, space, user_plans, inputs, model_given)


def _check_widths(spec: StudySpec, task: Task) -> None:
    """Raise `SpecError` if the narrowest net would leave a layer without channels."""
    if spec.space.widths == (1.0,):
        return
    # A model that pruning cannot follow is searched at full width, as the study says when it makes the narrower nets.
    with suppress(ModelError):
        check_width(task.model, example(task.data.train), spec.space.widths[-1])


def _check_sizes(task: Task, space: SearchSpace) -> None:
    """Raise `ModelError` if a layer pads by the size of its input, and not all splits have inputs of one size."""
    name = next((axis.layer.name for axis in space.axes if axis.layer.padding), None)
    if name is None:
        return
    with seeded(0):  # reading an input may draw random numbers
        splits = {"train": task.data.train, "validation": task.data.validation, "test": task.data.test}
        shapes = {split: batch_shapes(example(data)) for split, data in splits.items()}
    odd = next((split for split, shape in shapes.items() if shape != shapes["train"]), None)
    if odd:
        raise ModelError(
            f"Inputs must have one size if a layer pads by it, as {name!r} does, but those of 'train' have the shape "
            f"{shapes['train']} and those of {odd!r} {shapes[odd]}; give them one size, or leave the layer out by space.skip."
        )


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` means CUDA if there is a GPU, otherwise the CPU.

    Raises:
        StudyError: torch finds no such device.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
    if name not in there and not (name == "cuda" and cuda):
        raise StudyError(f"--device must be one that torch finds on this machine ({', '.join(there)}), but got {name}.")
    return torch.device(name)


def _load_initial_weights(spec: StudySpec, task: Task, view: View, *, dense_saved: bool) -> str | None:
    """Load the weights in `spec.dense.weights`, if any, and return the digest of the model's initial weights.

    None if training starts from random weights, or if the weights file is missing but the folder holds the dense net.
    """
    path = Path(spec.dense.weights)
    if spec.dense.weights and dense_saved and not path.exists():
        view.note(f"dense.weights {path} no longer exists; using the dense net in the study's folder")
        return None
    if spec.dense.weights:
        load_required_weights(task.model, path)
    return digest_of(task.model) if spec.dense.weights or not spec.dense.epochs else None


def _check_dense_given(spec: StudySpec, task: Task) -> None:
    """Refuse a loss or a score that compares with a dense net that is yet to be trained."""
    for key, function in (("task.loss", task.loss), ("task.score", task.score)):
        if is_against_dense(function) and (not spec.dense.weights or spec.dense.epochs):
            raise SpecError(
                f"dense.weights must name trained weights and dense.epochs must be 0 where {key} compares with the dense net's "
                f"outputs, but got {spec.dense.weights!r} and {spec.dense.epochs}."
            )


def _smallest_layer(space: SearchSpace) -> Plan:
    """The plan that factorizes only the smallest layer, at its smallest ranks: it is the quickest plan to build."""
    axis = min(space.axes, key=lambda axis: axis.layer.params)
    return Plan.of({axis.layer.name: axis.smallest(axis.constraints.smaller_in[0])})


def _check_min_score(spec: StudySpec, task: Task) -> None:
    min_score = spec.search.min_score
    if is_percent(task.score_name) and min_score is not None and min_score > 1:
        raise SpecError(f"search.min_score must be at most 1 for {task.score_name}, but got {min_score:g}; 97 % is 0.97.")
