"""What is known of a study's model before its first trial: its layers, and the dense model's size, scores and speed."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.preparing import kernel, vbmf_ranks
from ranksearch.compress.profile import Profile
from ranksearch.console import Look
from ranksearch.data import check_splits, example
from ranksearch.errors import ModelError
from ranksearch.results.record import DenseFacts, LayerFacts, StudyFacts
from ranksearch.spec import StudySpec
from ranksearch.strategy.prior import at_vbmf, quarter_ranks
from ranksearch.strategy.space import space_of
from ranksearch.study import folder
from ranksearch.study.dense import load_given, load_weights
from ranksearch.support.batch import tensors_in
from ranksearch.task import training
from ranksearch.task.task import Task, load_task

PACKAGES = ("ranksearch", "torch", "torchvision", "optuna", "tensorly", "scikit-learn", "numpy")


def look(spec: StudySpec, out: Path) -> Look:
    """The layers of a study's model, their VBMF ranks, and what each method would cost there; writes nothing.

    The dense weights are those in the study's folder `out`, or those of `dense.weights`, or what the model comes with, which
    are trained ones where the study trains none.
    """
    task = load_task(spec)
    check_splits(task.data, every_batch=False)
    kept = load_weights(task.model, out / folder.DENSE_FILE)
    if spec.dense.weights and not kept:
        load_given(task.model, Path(spec.dense.weights))
    trained = kept or bool(spec.dense.weights) or not spec.dense.epochs
    found = inventory(task.model, example(task.data.train))
    space = space_of(spec.space, found)
    vbmf = {layer.name: vbmf_ranks(kernel(task.model, layer)) for layer in found.layers}
    costs = {}
    for axis in space.axes:
        layer, estimate = axis.layer, vbmf[axis.layer.name]
        suggested = [
            (m, at_vbmf(m, layer, estimate, constraints=axis.constraints) or quarter_ranks(m, layer, axis.constraints))
            for m in axis.methods
        ]
        costs[layer.name] = tuple((str(m.value(layer, ranks)), m.params(layer, ranks)) for m, ranks in suggested)
    return Look(
        layers=layer_facts(found, vbmf), skipped=found.skipped, params=found.params, macs=found.macs, costs=costs,
        trained=trained,
    )  # fmt: skip


def study_facts(
    spec: StudySpec, task: Task, found: Inventory, layers: Profile, inputs: Tensor, *, engine: str, command: str
) -> StudyFacts:
    """The facts of a study whose dense model is trained and stands on the device of `inputs`, a batch of one input.

    Raises:
        ModelError: the dense model's score is no number, or on another scale than a share's.
    """
    device = tensors_in(inputs)[0].device
    splits = {"validation": task.data.validation, "test": task.data.test}
    scores = {name: training.score(task.model, task, split, device=device) for name, split in splits.items()}
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ModelError(
                f"The score must be a number for the dense net, but {task.score_name} gave {score} on {name}; mend it."
            )
    score = scores["validation"]
    if abs(score) > 1:
        raise ModelError(
            f"A score must be on the scale of a share, where 0.01 is a difference that counts, but {task.score_name} gave "
            f"{score:g} for the dense net; divide it, by 100 where it is a percentage."
        )
    dense = DenseFacts(
        costs=found.costs,
        score_validation=score,
        score_test=scores["test"],
        latency_ms=training.latencies_ms([task.model], inputs, channels_last=task.channels_last)[0],
    )
    return StudyFacts(
        name=spec.name,
        seed=spec.seed,
        spec=spec.to_dict(),
        score_name=task.score_name,
        dense=dense,
        layers=layer_facts(found, layers.vbmf),
        skipped=dict(found.skipped),
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        machine=f"{platform.machine()}, {os.cpu_count()} cores, device {device.type}, {engine}",
        command=command,
        data=task.data.about,
    )


def layer_facts(found: Inventory, vbmf: Mapping[str, tuple[int | None, int | None]]) -> tuple[LayerFacts, ...]:
    """The layers as the record keeps them, with their VBMF ranks."""
    return tuple(
        LayerFacts(
            name=layer.name, kind=layer.kind, weight=layer.weight, costs=layer.costs,
            vbmf=vbmf[layer.name],
        )
        for layer in found.layers
    )  # fmt: skip
