"""`run_study` runs all steps of a study, from its spec to the front, the report and the finalists' models."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ranksearch.compress.export import check_reloading
from ranksearch.compress.inventory import check_weights, inventory
from ranksearch.compress.profile import Profile, profile
from ranksearch.compress.scratch import check_scratch
from ranksearch.compress.surgery import copied
from ranksearch.compress.weights import check_state, digest_of, weights_of
from ranksearch.compress.whitening import inputs_wanted
from ranksearch.console import Silent, View
from ranksearch.data import batches, check_splits, example, sample_inputs
from ranksearch.engines import local, ray
from ranksearch.engines.base import Engine
from ranksearch.engines.shared import check_portable
from ranksearch.errors import SpecError, StudyError
from ranksearch.plan import Plan
from ranksearch.report import write_report
from ranksearch.results import attributes
from ranksearch.results.messages import Job, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import StudyFacts, StudyRecord
from ranksearch.spec import StudySpec
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.space import Space, check_limits, constraints_of, space_of
from ranksearch.study import folder
from ranksearch.study.dense import load_required_weights, load_weights, train_dense
from ranksearch.study.facts import study_facts
from ranksearch.study.finishing import train_finalists
from ranksearch.study.inputs import inputs_of
from ranksearch.study.options import Options, Ray
from ranksearch.study.probing import check_user_plans, choose_initial_plans, probe_layers, read_user_plans
from ranksearch.study.run import Run, choose_device
from ranksearch.study.timing import keep_table, time_layers
from ranksearch.support.batch import batch_to
from ranksearch.support.files import write_whole, writing
from ranksearch.task import training
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import Task, accuracy, check_float32, check_outputs, load_task

DENSE_DIGEST = "ranksearch:dense"
"""Name of the study attribute that holds the SHA-256 of the dense model's trained weights."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C stopped the study. `record` holds the results so far, or None if the dense model was not yet measured."""

    def __init__(self, record: StudyRecord | None) -> None:
        super().__init__()
        self.record = record


def run_study(
    spec: StudySpec,
    out: Path,
    options: Options | None = None,
    *,
    task: Task | None = None,
    first: Sequence[Plan] = (),
    view: View | None = None,
) -> StudyRecord:
    """Run a study, or resume it where an earlier run stopped, and write its folder.

    Args:
        spec: the study.
        out: the study's folder, created if missing.
        options: how to run the study.
        task: model and data; None loads them from `spec.task`.
        first: plans to try first, after those that `spec.search.first` names.
        view: shows the progress.

    Returns:
        The complete record. The user chooses a model from its `front`.

    Raises:
        RankSearchError: the input is bad (mostly raised before anything is written), or the cluster, the storage or the
            workers were lost.
        Stopped: Ctrl-C was pressed. The running trials were queued again and a report was written.
    """
    options, view = options or Options(), view or Silent()
    device = choose_device(options.engine.device)
    model_given, task = task is not None, task or load_task(spec)
    check_splits(task.data)
    fresh = copied(task.model)
    layers = inventory(task.model, example(task.data.train))
    check_outputs(task, trains=any(part.epochs for part in (spec.dense, spec.finetune, spec.finalists)))
    if device.type == "mps":
        check_float32(task)
    check_state(task.model)
    task = replace(task, channels_last=training.takes_channels_last(task))
    layers, table = time_layers(spec, task, layers, device, out, view, fresh=options.fresh)
    space = space_of(spec.space, layers)
    check_limits(spec.search.limits, space, layers)
    check_reloading(task.model, fresh, _smallest_layer(space), next(batches(task.data.train, 2))[0])
    user_plans = read_user_plans(spec.search.first, first, space, layers)
    if spec.space.start == "scratch":
        check_scratch(task.model)
    _check_min_score(spec, task)
    objectives = Objectives(spec.search.minimize, layers.costs)
    dense_saved = (out / folder.DENSE_FILE).exists() and not options.fresh
    inputs = inputs_of(task.data, _load_initial_weights(spec, task, view, dense_saved=dense_saved))
    if options.storage:
        folder.check_study(spec, options.storage, inputs, fresh=options.fresh, announce=view.note)
    if options.engine.workers != 0:
        check_portable(task)
    with (
        _engine(options, device) as engine,
        folder.folder_lock(out, spec, options.storage, fresh=options.fresh, announce=view.note),
        view,
    ):
        url = folder.storage_url(out, options.storage)
        if options.fresh and options.storage:
            folder.delete_study(spec.name, url, announce=view.note)
        # spec.toml marks a new folder as a study's. An existing spec.toml is only overwritten below, after the checks that the
        # study is the same.
        if not (out / folder.SPEC).exists():
            folder.write_spec(out, spec, options.storage)
        study = folder.create_study(spec.name, url, objectives, announce=view.note)
        folder.write_identity(study, spec, inputs)
        check_user_plans(study, user_plans)
        folder.write_spec(out, spec, options.storage)
        keep_table(spec, table, layers, device, out)
        one_input = batch_to(example(task.data.validation), device)
        run = Run(spec, out, options, device, task, one_input, layers, space, user_plans, study, engine, view)
        try:
            _run_steps(run, model_given=model_given)
        except KeyboardInterrupt:
            raise Stopped(_report_after_stop(run)) from None
        return attributes.read_study(study)


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


def _run_steps(run: Run, *, model_given: bool) -> None:
    _make_dense(run, model_given=model_given)
    layers = _make_profile(run)
    _write_facts(run, layers)
    evaluate = _evaluator(run, layers)
    probe_layers(run, layers, evaluate)
    _search(run, layers, evaluate)
    train_finalists(run, evaluate)
    _report(run)


def _make_dense(run: Run, *, model_given: bool) -> None:
    """Load the dense model's weights from an earlier run, or else train the model as the spec says."""
    path, unfinished = run.out / folder.DENSE_FILE, run.unfinished / "dense.pt"
    with run.stage("dense"):
        # A model passed from Python keeps its own weights: the folder may hold those of another model.
        if model_given or not load_weights(run.task.model, path):
            train_dense(run.task, run.spec, run.device, run.view, unfinished=unfinished)
        digest = digest_of(run.task.model)
        _check_digest(run, digest)
        # Weights first: a digest without them could not be resumed from, since retraining seldom gives the same bits.
        if not path.exists():
            with writing(f"The dense net's {path}"):
                write_whole(path, weights_of(run.task.model))
        unfinished.unlink(missing_ok=True)
        if DENSE_DIGEST not in run.study.user_attrs:
            run.study.set_user_attr(DENSE_DIGEST, digest)
    # Use the memory layout of training: otherwise the factors of a resumed run would differ in their last bits.
    training.place(run.task.model, run.device, channels_last=run.task.channels_last).eval()
    # Training may have made weights NaN or infinite.
    check_weights(run.task.model)


def _make_profile(run: Run) -> Profile:
    """Decompose each layer by each of its methods and estimate its VBMF ranks."""
    methods = {axis.layer.name: axis.methods for axis in run.space.axes}
    run.view.stage("profiling layers", len(run.inventory.layers))
    aware, seed, count = run.spec.space.data_aware, run.spec.seed, inputs_wanted(run.inventory.macs)
    with run.stage("profile"):
        return profile(
            run.task.model, run.inventory, methods, constraints=constraints_of(run.spec.space),
            inputs=sample_inputs(run.task.data.train, count, seed=seed) if aware else None,
            cache=run.out / "profile", seed=seed, on_layer=run.view.step,
        )  # fmt: skip


def _write_facts(run: Run, layers: Profile) -> None:
    """Write the study's facts to its storage. The dense model is measured only in the study's first run."""
    saved = attributes.read_facts(run.study) if attributes.has_facts(run.study) else _measure_facts(run, layers)
    since = saved.since if saved.limits == run.spec.search.limits else len(run.study.get_trials(deepcopy=False))
    facts = replace(saved, spec=run.spec.to_dict(), command=run.options.command, since=since)
    attributes.write_facts(run.study, facts)
    run.view.facts(facts)


def _measure_facts(run: Run, layers: Profile) -> StudyFacts:
    return study_facts(
        run.spec, run.task, run.inventory, layers, run.example, engine=run.engine.description, command=run.options.command
    )


def _evaluator(run: Run, layers: Profile) -> Evaluator:
    task = replace(run.task, model=run.task.model.cpu())
    training.release(run.device)
    chosen = run.options.engine
    device = ("cuda" if chosen.gpus_per_trial else "cpu") if isinstance(chosen, Ray) else str(run.device)
    return Evaluator(
        task, layers, run.spec.finetune, run.spec.finalists, device, scratch=run.spec.space.start == "scratch",
        unfinished=run.unfinished.resolve(),
    )  # fmt: skip


def _search(run: Run, layers: Profile, evaluate: Evaluator) -> None:
    """Ask for plans, evaluate them and tell their results, until the budget is spent."""
    initial_plans = choose_initial_plans(run, layers)
    limits, facts = run.spec.search.limits, attributes.read_facts(run.study)
    dense_score = facts.dense.score_validation
    dense_loss, probes = attributes.read_probes(run.study)
    knowledge = Knowledge.of(
        run.space, run.inventory, layers, probes, dense_loss=dense_loss, dense_score=dense_score, limits=limits,
        minimize=run.spec.search.minimize,
    )  # fmt: skip
    ledger = Ledger(
        run.study, run.space, run.inventory, initial_plans, sampler=run.spec.search.sampler, seed=run.spec.seed,
        dense_score=dense_score, limits=limits, since=facts.since, objectives=facts.objectives, knowledge=knowledge,
        on_untrained=lambda record: run.view.trial(record, ledger.records()), on_note=run.view.note,
    )  # fmt: skip
    ledger.recover()
    trials, minutes = run.spec.search.trials, run.spec.search.minutes
    run.view.stage("trials", trials, min(trials, ledger.finished()))
    before, start = run.seconds.get("trials", 0.0), time.monotonic()

    def time_is_up() -> bool:
        return minutes is not None and before + time.monotonic() - start >= minutes * 60

    def on_result(job: Job, result: Result) -> None:
        run.view.trial(ledger.receive(job, result), ledger.records())

    try:
        run.run_jobs("trials", lambda: ledger.jobs(trials), evaluate, on_result, time_is_up)
    except KeyboardInterrupt:
        # Leave no trial RUNNING in the record: other tools read it, and the next run may start much later.
        ledger.recover()
        raise


def _report(run: Run) -> None:
    """Write the report from the storage alone."""
    write_report(attributes.read_study(run.study), run.out)


def _report_after_stop(run: Run) -> StudyRecord | None:
    """Write the report after Ctrl-C and return the record.

    None if the dense model was not yet measured, if the storage is still unusable, or if Ctrl-C is pressed again.
    """
    try:
        if not attributes.has_facts(run.study):
            return None
        _report(run)
        return attributes.read_study(run.study)
    except KeyboardInterrupt:
        return None


def _check_digest(run: Run, digest: str) -> None:
    """Raise `StudyError` unless the study was started with this dense model."""
    if run.study.user_attrs.get(DENSE_DIGEST, digest) != digest:
        raise StudyError(
            f"The study {run.spec.name!r} in this storage was started from another dense model; choose another name or "
            "--storage, or --fresh to start over."
        )


def _engine(options: Options, device: torch.device) -> Engine:
    chosen = options.engine
    if isinstance(chosen, Ray):
        return ray.engine(ray.Cluster(chosen.address, chosen.workers, chosen.cpus_per_trial, chosen.gpus_per_trial))
    # One worker by default on a GPU, since all workers would share its memory.
    default_workers = 1 if device.type != "cpu" else os.cpu_count() or 1
    return local.engine(default_workers if chosen.workers is None else chosen.workers)


def _smallest_layer(space: Space) -> Plan:
    """The plan that factorizes only the smallest layer, at its smallest ranks: it is the quickest plan to build."""
    axis = min(space.axes, key=lambda axis: axis.layer.params)
    return Plan.of({axis.layer.name: axis.smallest(axis.constraints.smaller_in[0])})


def _check_min_score(spec: StudySpec, task: Task) -> None:
    min_score = spec.search.min_score
    if task.score is accuracy and min_score is not None and min_score > 1:
        raise SpecError(f"search.min_score must be at most 1 for accuracy, but got {min_score:g}; 97 % is 0.97.")
