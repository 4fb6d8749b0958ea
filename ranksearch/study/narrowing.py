"""The nets that a study searches from: the given one, and narrower ones that are pruned, trained and kept in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.narrowing import narrow_, narrowing_of
from ranksearch.compress.profile import Profile, profile
from ranksearch.compress.saved import holds_model, load_model, read_plan, write_model
from ranksearch.compress.surgery import copied
from ranksearch.compress.whitening import inputs_wanted
from ranksearch.data import batches, example, sample, sample_inputs
from ranksearch.errors import ModelError, SpecError, StudyError
from ranksearch.plan import Narrowing, Plan
from ranksearch.results.messages import Job, Outcome, Result, Stage
from ranksearch.spec import StudySpec
from ranksearch.strategy.bases import Base
from ranksearch.strategy.space import SearchSpace, constraints_of, space_of
from ranksearch.study import folder
from ranksearch.study.session import Session
from ranksearch.study.timing import keep_table, time_layers
from ranksearch.support.batch import run_model
from ranksearch.support.files import writing
from ranksearch.support.seeds import seeded
from ranksearch.task import training
from ranksearch.task.distillation import pruning_loss
from ranksearch.task.evaluation import Evaluator, checkpoint_file
from ranksearch.task.task import Task, evaluation_batch, targets_for

MAX_INPUTS, BATCH_SIZE = 512, 64
"""How many training inputs choose the channels at most, and in batches of how many."""


@dataclass(frozen=True)
class Net:
    """A net to search from, and which channels of the given net it keeps (None: all)."""

    base: Base
    model: nn.Module
    narrowing: Narrowing | None = None


def make_nets(
    session: Session, spec: StudySpec, task: Task, given: Base, device: torch.device, out: Path, *, where: str
) -> list[Net]:
    """The nets of `space.widths`. The given one comes first; `task` has it, trained, on `device`. The others are on the CPU.

    If pruning cannot follow the model, the given net is the only one, and the view is told why. `where` is the device on which
    workers train.

    Raises:
        ModelError: the loss of a narrower net became NaN or infinite.
        SpecError: a width would leave a layer without channels.
        StudyError: a worker was lost, or ran out of memory.
    """
    nets = [Net(given, task.model)]
    if spec.space.widths == (1.0,):
        return nets
    task = replace(task, model=copied(task.model).cpu())
    with session.stage("narrow nets"):
        for width in _train(session, spec, task, out, where=where):
            kept = _folder(out, width)
            model = load_model(task.model, kept)
            layers = inventory(model, example(task.data.train))
            layers, table = time_layers(spec, replace(task, model=model), layers, device, out, session.view, fresh=False)
            keep_table(spec, table, layers, device, out)
            nets.append(Net(Base(layers, _space(spec, layers), width), model, read_plan(kept).narrowing))
    return nets


def _space(spec: StudySpec, layers: Inventory) -> SearchSpace:
    """The search space of a narrower net; empty if none of its layers can be made smaller."""
    try:
        return space_of(spec.space, layers)
    except SpecError:
        return SearchSpace(())


def make_profile(session: Session, spec: StudySpec, task: Task, net: Net, *, cache: Path) -> Profile:
    """Decompose each layer of a net by each of its methods and estimate its VBMF ranks."""
    if not net.base.space.axes:
        return Profile({})
    methods = {axis.layer.name: axis.methods for axis in net.base.space.axes}
    layers = net.base.inventory
    name = "" if net.base.width == 1 else f", width {net.base.width:g}"
    session.view.stage(f"profiling layers{name}", len(layers.layers))
    with session.stage("profile"):
        aware = spec.space.data_aware
        return profile(
            net.model, layers, methods, constraints=constraints_of(spec.space),
            inputs=sample_inputs(task.data.train, inputs_wanted(layers.macs), seed=spec.seed) if aware else None,
            cache=cache, seed=spec.seed, on_layer=session.view.step,
        )  # fmt: skip


def _train(session: Session, spec: StudySpec, task: Task, out: Path, *, where: str) -> list[float]:
    """Train the narrower nets that the folder does not hold yet, and return the widths of all."""
    widths = [width for width in spec.space.widths if width < 1]
    missing = [width for width in widths if not holds_model(_folder(out, width))]
    if not missing:
        return widths
    try:
        losses = _losses(task, spec.seed)
        inputs = example(task.data.train)
        narrowings = {width: narrowing_of(task.model, inputs, width, losses, in_blocks=spec.timed) for width in missing}
    except ModelError as error:
        session.view.note(f"searching at full width only: {error}")
        return []
    nets = {width: narrow_(copied(task.model), kept) for width, kept in narrowings.items()}
    _run(session, spec, task, nets, narrowings, out, where=where)
    return widths


def _losses(task: Task, seed: int) -> list[Callable[[nn.Module], Tensor]]:
    """The losses of a model on some batches of training inputs, by which channels are chosen."""

    def loss(batch: Any) -> Callable[[nn.Module], Tensor]:
        inputs, targets = batch[0], targets_for(task.loss, task.model, *batch)

        def of(model: nn.Module) -> Tensor:
            with training.in_training_mode(model) if task.loss_in_training else nullcontext():
                return pruning_loss(task.loss)(run_model(model, inputs), targets)

        return of

    inputs = sample(task.data.train, MAX_INPUTS, seed=seed)
    with seeded(seed):
        return [loss(batch) for batch in batches(inputs, min(BATCH_SIZE, evaluation_batch(inputs)))]


def _run(
    session: Session,
    spec: StudySpec,
    task: Task,
    nets: Mapping[float, nn.Module],
    narrowings: Mapping[float, Narrowing],
    out: Path,
    *,
    where: str,
) -> None:
    unfinished = out / folder.UNFINISHED
    empty = Profile({})
    evaluate = Evaluator(
        task, empty, spec.finetune, spec.finalists, where,
        narrow={width: (net, empty) for width, net in nets.items()}, narrow_recipe=spec.narrow, unfinished=unfinished.resolve(),
    )  # fmt: skip
    done = set[float]()
    session.view.stage("training narrower nets", len(nets))

    def on_result(job: Job, result: Result) -> None:
        width = job.plan.width
        if result.outcome is Outcome.DIVERGED:
            raise ModelError(
                f"The narrower net of width {width:g} must train, but its loss became NaN or infinite at learning rate "
                f"{spec.narrow.learning_rate}; lower narrow.learning_rate."
            )
        if result.outcome is Outcome.DONE:
            assert result.weights is not None
            with writing(f"The net {_folder(out, width)}"):
                write_model(_folder(out, width), replace(job.plan, narrowing=narrowings[width]), result.weights)
            done.add(width)
            checkpoint_file(unfinished, job).unlink(missing_ok=True)
            session.view.step(f"width {width:g}")

    def jobs() -> Iterator[Job]:
        return (Job(key, Plan(width=width), spec.seed, Stage.NARROW) for key, width in enumerate(nets) if width not in done)

    with writing(f"The folder {unfinished}"):
        unfinished.mkdir(exist_ok=True)
    session.run_jobs("narrow nets", jobs, evaluate, on_result)
    if lost := [f"{width:g}" for width in nets if width not in done]:
        raise StudyError(
            f"Every narrower net must be trained before the search, but those of width {', '.join(lost)} were not: a worker "
            "was lost or out of memory; run the same command again, with fewer --workers."
        )


def _folder(out: Path, width: float) -> Path:
    return out / folder.NARROW / f"{width:g}"
