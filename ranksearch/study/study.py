"""`run_study` runs all steps of a study, from its spec to the front, the report and the finalists' models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import torch

from ranksearch.compress.profile import Profile
from ranksearch.console import Silent, View
from ranksearch.engines import processes, ray
from ranksearch.engines.base import Engine
from ranksearch.plan import Plan
from ranksearch.report import write_report
from ranksearch.results import attributes
from ranksearch.results.messages import Job, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import StudyFacts, StudyRecord
from ranksearch.results.trials import TrialRecord
from ranksearch.spec import StudySpec
from ranksearch.strategy.bases import Base, Bases, check_limits
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.sampler import Knowledge
from ranksearch.study import folder
from ranksearch.study.checking import Checked, check_inputs
from ranksearch.study.controls import control_recipe, train_controls
from ranksearch.study.dense import make_dense
from ranksearch.study.facts import make_facts
from ranksearch.study.finishing import train_finalists
from ranksearch.study.narrowing import Net, make_nets, make_profile
from ranksearch.study.options import Local, Options, Ray
from ranksearch.study.pictures import draw_pictures
from ranksearch.study.probing import check_user_plans, choose_initial_plans, probe_layers
from ranksearch.study.session import Session
from ranksearch.study.timing import keep_table, time_finalists
from ranksearch.support.cores import usable_cores
from ranksearch.task import training
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import Task


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
    checked = check_inputs(spec, out, options, task, first, view)
    with (
        _engine(options, checked.device) as engine,
        folder.folder_lock(out, spec, options.storage, fresh=options.fresh, announce=view.note),
        view,
    ):
        study = _open_study(spec, out, options, checked, view)
        session = Session(study, engine, view, attributes.read_seconds(study))
        try:
            return _run_steps(session, spec, out, options, checked)
        except KeyboardInterrupt:
            raise Stopped(_report_after_stop(study, out)) from None


def _open_study(spec: StudySpec, out: Path, options: Options, checked: Checked, view: View) -> optuna.Study:
    """Open the Optuna study, or create it, and write the first files of its folder."""
    url = folder.storage_url(out, options.storage)
    if options.fresh and options.storage:
        folder.delete_study(spec.name, url, announce=view.note)
    # spec.toml marks a new folder as a study's. An existing spec.toml is only overwritten below, after the checks that the
    # study is the same.
    if not (out / folder.SPEC).exists():
        folder.write_spec(out, spec, options.storage)
    objectives = Objectives(spec.search.minimize, checked.inventory.costs)
    study = folder.create_study(spec.name, url, objectives, announce=view.note)
    folder.write_identity(study, spec, checked.inputs)
    check_user_plans(study, checked.user_plans)
    folder.write_spec(out, spec, options.storage)
    keep_table(spec, checked.table, checked.inventory, checked.device, out)
    return study


def _run_steps(session: Session, spec: StudySpec, out: Path, options: Options, checked: Checked) -> StudyRecord:
    """All steps of a study. Each one reads from the storage and the folder what an earlier run made."""
    device, search = checked.device, spec.search
    task = make_dense(session, spec, checked.task, device, out, model_given=checked.model_given)
    task, show = replace(task, show=None), task.show  # only the driver draws, so workers need not be able to
    where = _worker_device(device, options.engine)
    nets = make_nets(session, spec, task, Base(checked.inventory, checked.space), device, out, where=where)
    bases = Bases(tuple(net.base for net in nets))
    check_limits(search.limits, bases)
    profiles = [make_profile(session, spec, task, net, cache=out / "profile") for net in nets]
    facts = make_facts(session, spec, task, nets, profiles[0], device, command=options.command)
    evaluate = _evaluator(spec, task, nets, profiles, device, where=where, unfinished=out / folder.UNFINISHED)
    dense_losses, probes = probe_layers(session, bases, profiles, evaluate, seed=spec.seed)
    initial_plans = choose_initial_plans(
        session.study, spec, bases, profiles, checked.user_plans, dense_losses=dense_losses, probes=probes
    )
    knowledge = Knowledge.of(
        bases, profiles, probes, dense_losses=dense_losses, dense_score=facts.dense.score_validation,
        noise=facts.dense.standard_error, limits=search.limits, minimize=search.minimize,
    )  # fmt: skip
    trials = _search(session, spec, bases, initial_plans, knowledge, facts, evaluate)
    narrowings = {net.base.width: net.narrowing for net in nets if net.narrowing is not None}
    finalists = train_finalists(session, spec, trials, facts, evaluate, narrowings, out)
    controls = train_controls(session, spec, task, evaluate, out)
    with session.stage("finalists"):
        time_finalists(session, spec, task, bases, facts, finalists, controls, device)
    draw_pictures(replace(task, show=show), finalists, out, session.view)
    return _report(session.study, out)


def _evaluator(
    spec: StudySpec, task: Task, nets: Sequence[Net], profiles: Sequence[Profile], device: torch.device, *, where: str,
    unfinished: Path,
) -> Evaluator:  # fmt: skip
    """What evaluates the jobs, in a worker. Moves the dense model to the CPU."""
    task = replace(task, model=task.model.cpu())
    training.release(device)
    narrow = {net.base.width: (net.model, profile) for net, profile in zip(nets[1:], profiles[1:], strict=True)}
    return Evaluator(
        task, profiles[0], spec.finetune, spec.finalists, where, scratch=spec.space.start == "scratch", narrow=narrow,
        controls=control_recipe(spec, len(profiles[0].layers)), unfinished=unfinished.resolve(),
    )  # fmt: skip


def _worker_device(device: torch.device, engine: Local | Ray) -> str:
    """The device on which workers train."""
    return ("cuda" if engine.gpus_per_trial else "cpu") if isinstance(engine, Ray) else str(device)


def _search(
    session: Session, spec: StudySpec, bases: Bases, initial_plans: Sequence[tuple[str, Plan]], knowledge: Knowledge,
    facts: StudyFacts, evaluate: Evaluator,
) -> tuple[TrialRecord, ...]:  # fmt: skip
    """Ask for plans, evaluate them and tell their results, until the budget is spent. Returns all trials."""
    view, search = session.view, spec.search
    ledger = Ledger(
        session.study, bases, initial_plans, sampler=search.sampler, seed=spec.seed,
        dense_score=facts.dense.score_validation, limits=search.limits, since=facts.since, objectives=facts.objectives,
        knowledge=knowledge, on_untrained=lambda record: view.trial(record, ledger.records()),
        on_note=view.note,
    )  # fmt: skip
    ledger.recover()
    view.stage("trials", search.trials, min(search.trials, ledger.finished()))
    before, start = session.seconds.get("trials", 0.0), time.monotonic()

    def time_is_up() -> bool:
        return search.minutes is not None and before + time.monotonic() - start >= search.minutes * 60

    def on_result(job: Job, result: Result) -> None:
        view.trial(ledger.receive(job, result), ledger.records())

    try:
        session.run_jobs("trials", lambda: ledger.jobs(search.trials), evaluate, on_result, time_is_up)
    except KeyboardInterrupt:
        # Leave no trial RUNNING in the record: other tools read it, and the next run may start much later.
        ledger.recover()
        raise
    return ledger.records()


def _report(study: optuna.Study, out: Path) -> StudyRecord:
    """Write the report from the storage alone, and return the record."""
    record = attributes.read_study(study)
    write_report(record, out)
    return record


def _report_after_stop(study: optuna.Study, out: Path) -> StudyRecord | None:
    """Write the report after Ctrl-C and return the record.

    None if the dense model was not yet measured, if the storage is still unusable, or if Ctrl-C is pressed again.
    """
    try:
        return _report(study, out) if attributes.has_facts(study) else None
    except KeyboardInterrupt:
        return None


def _engine(options: Options, device: torch.device) -> Engine:
    chosen = options.engine
    if isinstance(chosen, Ray):
        return ray.engine(ray.Cluster(chosen.address, chosen.workers, chosen.cpus_per_trial, chosen.gpus_per_trial))
    # One worker by default on a GPU, since all workers would share its memory.
    default_workers = 1 if device.type != "cpu" else usable_cores()
    return processes.engine(default_workers if chosen.workers is None else chosen.workers)
