"""The latency of a study's models: predicted for every plan before the first trial, measured for the finalists at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranksearch.compress.inventory import Inventory
from ranksearch.compress.saved import load_model
from ranksearch.console import View
from ranksearch.data import example
from ranksearch.errors import RankSearchError
from ranksearch.latency.runtimes import ORT, TORCH, OnnxRuntime, Runtime, Torch, runtime_of
from ranksearch.latency.table import Table, latency_table
from ranksearch.latency.timing import in_turn
from ranksearch.methods import METHODS
from ranksearch.plan import Plan
from ranksearch.results import attributes
from ranksearch.results.record import Control, StudyFacts
from ranksearch.results.trials import Timing, TrialRecord
from ranksearch.spec import Latency, StudySpec
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.space import constraints_of, make_space
from ranksearch.study.session import Session
from ranksearch.support.batch import repeat_batch
from ranksearch.support.files import write_whole, writing
from ranksearch.support.nesting import has_lists_per_input
from ranksearch.task.task import Task

LARGE_BATCH = 64
"""Finalists are timed at this size of batch too, or at a smaller one where the dense model would take longer than..."""
MAX_LARGE_BATCH_MS = 1000.0
"""...so many milliseconds."""


def time_layers(
    spec: StudySpec, task: Task, inventory: Inventory, device: torch.device, out: Path, view: View, *, fresh: bool
) -> tuple[Inventory, Table | None]:
    """The inventory with the latency of its layers, and their table, from the study's folder or measured now. Where no latency
    is to be small, the inventory as it is.

    Raises:
        ModelError, StudyError, SpecError: the runtime does not take the model, gives no time, or is none.
    """
    if not spec.timed:
        return inventory, None
    path = _table_path(spec, inventory, device, out)
    if path.exists() and not fresh:
        table = Table.from_json(path.read_text(encoding="utf-8"))
        return table.applied(inventory), table
    runtime = runtime_of(spec.latency, device, channels_last=task.channels_last)
    view.note(f"timing the layers in {about(runtime, spec.latency.batch_size)}")
    constraints = constraints_of(spec.space)
    constraints = replace(constraints, smaller_in=tuple(cost for cost in constraints.smaller_in if cost != "latency"))
    space = make_space(inventory, spec.space.methods, layers=spec.space.layers, skip=spec.space.skip, constraints=constraints)
    methods = {axis.layer.name: axis.methods for axis in space.axes}
    inputs = repeat_batch(example(task.data.train), spec.latency.batch_size)
    table = latency_table(task.model, inventory, methods, runtime, inputs, constraints=constraints)
    view.note(f"timed; the latency of whole plans is predicted to {table.median_error:.0%} in the median")
    return table.applied(inventory), table


def keep_table(spec: StudySpec, table: Table | None, inventory: Inventory, device: torch.device, out: Path) -> None:
    """Write the table into the study's folder, so that a resumed study has the same."""
    path = _table_path(spec, inventory, device, out)
    if table is not None and not path.exists():
        path.parent.mkdir(exist_ok=True)
        with writing(f"The table of latencies {path}"):
            write_whole(path, table.to_json().encode())


def _table_path(spec: StudySpec, inventory: Inventory, device: torch.device, out: Path) -> Path:
    layers = [replace(layer, latency=None) for layer in inventory.layers]
    made_of = f"1|{spec.latency}|{device}|{spec.space}|{layers}"
    return out / "profile" / f"latency-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"


def about(runtime: Runtime, batch: int) -> str:
    """A runtime in words: `ONNX Runtime on 1 thread, batch 1`."""
    names = {ORT: "ONNX Runtime", TORCH: "torch"}
    threads = f"{runtime.threads} thread{'s' * (runtime.threads > 1)}"
    return f"{names.get(runtime.name, runtime.name)} on {threads}, batch {batch}"


def time_finalists(
    session: Session, spec: StudySpec, task: Task, bases: Bases, facts: StudyFacts,
    trials: Sequence[tuple[TrialRecord, Path]], controls: Sequence[tuple[Control, nn.Module]], device: torch.device,
) -> None:  # fmt: skip
    """Time the dense model, the finalists and the controls in turn, in the study's runtime and in the other one, at several
    sizes of batch.

    Args:
        session: the study's run.
        spec: the study.
        task: the dense model and its data.
        bases: the nets that the finalists were made from.
        facts: the study's facts, stored again with the dense model's timings.
        trials: the finalists and the folders of their models.
        controls: the controls and nets of their structure.
        device: where torch runs the models.
    """
    records = [*(trial.finalist for trial, _ in trials), *(control for control, _ in controls)]
    if all(each and each.timings for each in records):
        return
    dense = task.model.cpu()
    models = [dense, *(load_model(dense, folder) for _, folder in trials), *(net.eval() for _, net in controls)]
    found: list[list[Timing]] = [[] for _ in models]
    for runtime in _runtimes(spec.latency, device, channels_last=task.channels_last):
        try:
            _time_in(runtime, models, example(task.data.validation), spec.latency.batch_size, found)
        except RankSearchError as error:
            # A front of latencies must not be of another runtime's.
            if spec.timed and not found[0]:
                raise
            session.view.note(f"not timed in {runtime.name}: {error}")
    # First, since a later run times all models again unless all finalists and controls have their timings.
    attributes.write_facts(session.study, replace(facts, dense=replace(facts.dense, timings=tuple(found[0]))))
    of_finalists, of_controls = found[1 : 1 + len(trials)], found[1 + len(trials) :]
    for (control, _), timings in zip(controls, of_controls, strict=True):
        attributes.write_control(session.study, replace(control, timings=tuple(timings)))
    for (trial, _), timings in zip(trials, of_finalists, strict=True):
        assert trial.finalist is not None
        finalist = replace(
            trial.finalist,
            timings=tuple(timings),
            predicted_ms=trial.costs.get("latency"),
            layers_ms=_layers_ms(bases[trial.plan.width].inventory, trial.plan),
        )
        attributes.write_finalist(session.study, trial.number, finalist)


def _runtimes(latency: Latency, device: torch.device, *, channels_last: bool) -> list[Runtime]:
    """The study's own runtime first, and the other one of torch and ONNX Runtime, or both of a function of the user's."""
    own = runtime_of(latency, device, channels_last=channels_last)
    both = [OnnxRuntime(latency.threads), Torch(device, latency.threads, channels_last)]
    return [own, *(runtime for runtime in both if runtime.name != own.name)]


def _time_in(runtime: Runtime, models: Sequence[nn.Module], one: Any, batch_size: int, found: list[list[Timing]]) -> None:
    """Add the timings of all models in one runtime, at the study's size of batch, at 1 and at a large one.

    `one` is a batch of one input. Lists of inputs are not timed at a large one.
    """
    sizes = [batch_size, 1]
    # ONNX Runtime would get a copy of the model for each entry of a list, such as images of several sizes.
    if runtime.name in (ORT, TORCH) and not has_lists_per_input(one):
        calls = [runtime.prepare(models[0], one)]
        sizes.append(_large_batch(in_turn(calls, rounds=1).ms[0]))
    for size in dict.fromkeys(sizes):
        inputs = repeat_batch(one, size)
        times = in_turn([runtime.prepare(model, inputs) for model in models])
        for each, ms, spread in zip(found, times.ms, times.spreads, strict=True):
            each.append(Timing(runtime.name, runtime.threads, size, ms, spread, times.quiet))


def _large_batch(ms: float) -> int:
    """The largest power of two up to `LARGE_BATCH` at which the dense model takes no longer than `MAX_LARGE_BATCH_MS`."""
    size = LARGE_BATCH
    while size > 1 and size * ms > MAX_LARGE_BATCH_MS:
        size //= 2
    return size


def _layers_ms(inventory: Inventory, plan: Plan) -> Mapping[str, float]:
    """By layer that the plan names, its predicted milliseconds; empty where layers were not timed."""
    costs: dict[str, Any] = {name: METHODS[type(value)].costs(inventory[name], value.ranks) for name, value in plan}
    return {name: cost["latency"] for name, cost in costs.items() if "latency" in cost}
