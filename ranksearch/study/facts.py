"""Facts measured before the first trial: the model's layers, and the dense model's size, scores and speed."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.preparing import kernel, vbmf_ranks
from ranksearch.compress.profile import Profile
from ranksearch.console import Look
from ranksearch.data import check_splits, example
from ranksearch.errors import ModelError
from ranksearch.results import attributes
from ranksearch.results.account import account_by_kind, account_by_layer
from ranksearch.results.certainty import MIN_STANDARD_ERROR
from ranksearch.results.record import DEFAULT_STANDARD_ERROR, DenseFacts, LayerFacts, NarrowFacts, StudyFacts
from ranksearch.spec import StudySpec
from ranksearch.strategy.prior import at_vbmf, quarter_ranks
from ranksearch.strategy.space import space_of
from ranksearch.study import folder
from ranksearch.study.dense import load_required_weights, load_weights
from ranksearch.study.narrowing import Net
from ranksearch.study.session import Session
from ranksearch.task import training
from ranksearch.task.bootstrap import standard_error
from ranksearch.task.checks import check_arguments
from ranksearch.task.task import Task, load_task

PACKAGES = ("ranksearch", "torch", "torchvision", "optuna", "tensorly", "scikit-learn", "numpy")


def look(spec: StudySpec, out: Path) -> Look:
    """The layers of a study's model, their VBMF ranks, and each method's cost in each layer. Writes nothing.

    The weights come from the study's folder `out`, else from `dense.weights`, else from the model itself; the last count as
    trained if `dense.epochs` is 0.
    """
    task = load_task(spec)
    check_splits(task.data, every_batch=False)
    kept = load_weights(task.model, out / folder.DENSE_FILE)
    if spec.dense.weights and not kept:
        load_required_weights(task.model, Path(spec.dense.weights))
    trained = kept or bool(spec.dense.weights) or not spec.dense.epochs
    check_arguments(task)
    layers = inventory(task.model, example(task.data.train))
    space = space_of(spec.space, layers)
    vbmf = {layer.name: vbmf_ranks(kernel(task.model, layer)) for layer in layers.layers}
    costs = {}
    for axis in space.axes:
        layer, estimate = axis.layer, vbmf[axis.layer.name]
        suggested = [
            (m, at_vbmf(m, layer, estimate, constraints=axis.constraints) or quarter_ranks(m, layer, axis.constraints))
            for m in axis.methods
        ]
        costs[layer.name] = tuple((str(m.value(layer, ranks)), m.params(layer, ranks)) for m, ranks in suggested)
    return Look(
        layers=layer_facts(layers, vbmf), account=account_by_layer(layers.account), permanent=layers.permanent,
        params=layers.params, macs=layers.macs, costs=costs, trained=trained,
    )  # fmt: skip


def make_facts(
    session: Session, spec: StudySpec, task: Task, nets: Sequence[Net], profile: Profile, device: torch.device, *, command: str
) -> StudyFacts:
    """Store the study's facts and return them. The dense model is measured only in the study's first run."""
    study = session.study
    if attributes.has_facts(study):
        saved = attributes.read_facts(study)
    else:
        saved = study_facts(spec, task, nets, profile, device, engine=session.engine.description, command=command)
    since = saved.since if saved.limits == spec.search.limits else len(study.get_trials(deepcopy=False))
    facts = replace(saved, spec=spec.to_dict(), command=command, since=since)
    attributes.write_facts(study, facts)
    session.view.facts(facts)
    return facts


def study_facts(
    spec: StudySpec, task: Task, nets: Sequence[Net], profile: Profile, device: torch.device, *, engine: str, command: str
) -> StudyFacts:
    """Measure the facts of a study. The dense model is trained and is on the device; it is the first of `nets`.

    Raises:
        ModelError: the dense model's score is NaN or infinite, or its validation score is outside [-1, 1].
    """
    layers = nets[0].base.inventory
    splits = {"validation": task.data.validation, "test": task.data.test}
    predicted = {name: training.predictions(task.model, task, split, device=device) for name, split in splits.items()}
    scores = {name: float(task.score(*pair)) for name, pair in predicted.items()}
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ModelError(
                f"The dense net's score must be finite, but {task.score_name} returned {score} on {name}; fix the score "
                "function."
            )
    score = scores["validation"]
    if abs(score) > 1:
        raise ModelError(
            f"Scores should lie in [0, 1], where 0.01 is one percentage point, but {task.score_name} returned {score:g} for "
            "the dense net; divide it (a percentage by 100)."
        )
    noise = standard_error(task.score, *predicted["validation"], seed=spec.seed)
    dense = DenseFacts(
        costs=layers.costs,
        score_validation=score,
        score_test=scores["test"],
        standard_error=max(noise, MIN_STANDARD_ERROR) if noise else DEFAULT_STANDARD_ERROR,
    )
    return StudyFacts(
        name=spec.name,
        seed=spec.seed,
        spec=spec.to_dict(),
        score_name=task.score_name,
        dense=dense,
        layers=layer_facts(layers, profile.vbmf),
        skipped=dict(layers.skipped),
        account=account_by_kind(layers.account),
        permanent=dict(layers.permanent),
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        machine=f"{platform.machine()}, {os.cpu_count()} cores, device {device.type}, {engine}",
        command=command,
        data=task.data.about,
        narrow=tuple(_narrow_facts(net, task, device) for net in nets[1:]),
    )


def _narrow_facts(net: Net, task: Task, device: torch.device) -> NarrowFacts:
    """Measure a narrower net, on the device and then back on the CPU."""
    model = training.place(net.model, device, channels_last=task.channels_last)
    score = training.score(model, task, task.data.validation, device=device)
    model.cpu()
    return NarrowFacts(width=net.base.width, costs=net.base.inventory.costs, score_validation=score)


def layer_facts(layers: Inventory, vbmf: Mapping[str, tuple[int | None, int | None]]) -> tuple[LayerFacts, ...]:
    """The layers, with their VBMF ranks, in the form that the record stores."""
    return tuple(
        LayerFacts(
            name=layer.name, kind=layer.kind, weight=layer.weight, groups=layer.groups, costs=layer.costs,
            vbmf=vbmf[layer.name],
        )
        for layer in layers.layers
    )  # fmt: skip
