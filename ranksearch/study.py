"""`run_study`: one straight line from a study file to a front, a report and models to take home."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
import torch

from ranksearch import attributes, folder, training
from ranksearch.console import Silent, View
from ranksearch.data import check_splits, example, sample_inputs
from ranksearch.dense import load_given, load_weights, train_dense
from ranksearch.engines import local, ray
from ranksearch.engines.base import Engine, check_portable
from ranksearch.errors import SpecError, StudyError
from ranksearch.export import check_state, holds_model, load_model, save_model, weights_of
from ranksearch.facts import study_facts
from ranksearch.files import write_whole
from ranksearch.layers import Inventory, check_weights, inventory
from ranksearch.objectives import Objectives, prices
from ranksearch.options import Options, choose_device
from ranksearch.plan import Plan
from ranksearch.profile import Profile, profile
from ranksearch.record import MAX_TRIES, Finalist, Outcome, Probe, Rung, StudyFacts, StudyRecord, TrialRecord
from ranksearch.report import write_report
from ranksearch.scratch import check_scratch
from ranksearch.spec import StudySpec
from ranksearch.strategy.finalists import choose_finalists
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.prior import vbmf_plans
from ranksearch.strategy.sampler import Knowledge
from ranksearch.strategy.sensitivity import predicted_frontier, rescuable, spread, values_to_probe
from ranksearch.strategy.space import Space, check_limits, offer_of, size_of, space_of
from ranksearch.strategy.trial import Answer, Evaluator, Job, Stage, checkpoint_file
from ranksearch.tasks import Task, accuracy, check_outputs, load_task

CALIBRATION = 512
"""Training inputs that data-aware factors are fitted for; with 128 the output error on held-out digits is a tenth higher."""
FRONTIER_PLANS = 4
"""How many plans of the predicted frontier are tried first."""
DIGEST = "ranksearch:dense"
"""Of the dense model's weights, among the study's attributes."""
WORST_LOSS = 1e6
"""Stands for a probe's loss that is no number, which no storage keeps."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with the record so far; None where it came before the dense model was measured."""

    def __init__(self, found: StudyRecord | None) -> None:
        super().__init__()
        self.record = found


def run_study(
    spec: StudySpec, out: Path, options: Options | None = None, *, task: Task | None = None, view: View | None = None
) -> StudyRecord:
    """Run a study, or go on with it where an earlier run stopped, and write its folder.

    Args:
        spec: the study.
        out: its folder, made if it is not there.
        options: how to run it.
        task: model and data, where they do not come from `spec.task`.
        view: what is told while it runs.

    Returns:
        The whole record; its `front` is what the user chooses from.

    Raises:
        RankSearchError: bad input, most of it before anything is written; or a cluster, a storage or workers that are lost.
        Stopped: Ctrl-C; the running trials were queued again and a report was written.
    """
    options, view = options or Options(), view or Silent()
    device = choose_device(options.device)
    given, task = task is not None, task or load_task(spec)
    check_splits(task.data)
    found = inventory(task.model, example(task.data.train))
    check_outputs(task, trains=any(part.epochs for part in (spec.dense, spec.finetune, spec.finalists)))
    check_state(task.model)
    space = space_of(spec.space, found)
    check_limits(spec.search.limits, space, found)
    if spec.space.start == "scratch":
        check_scratch(task.model)
    _check_min_score(spec, task)
    objectives = Objectives(spec.search.minimize, found.macs)
    if spec.dense.weights:
        load_given(task.model, Path(spec.dense.weights))
    if options.storage:
        folder.check_study(spec, options.storage, fresh=options.fresh)
    if options.workers != 0:
        check_portable(task)
    with _engine(options) as engine, folder.claimed(out, spec, options.storage, fresh=options.fresh), view:
        url = folder.storage_url(out, options.storage)
        if options.fresh and options.storage:
            folder.delete_study(spec.name, url)
        folder.write_spec(out, spec, options.storage)
        study = folder.create_study(spec.name, url, objectives, announce=view.note)
        folder.own_study(study, spec)
        run = _Run(spec, out, options, device, task, given, found, space, study, engine, view)
        try:
            run.straight_on()
        except KeyboardInterrupt:
            raise Stopped(run.stopped()) from None
        return attributes.read_study(study)


class _Run:
    """One run of one study: what the steps of the straight line share."""

    def __init__(
        self, spec: StudySpec, out: Path, options: Options, device: torch.device, task: Task, given: bool,
        found: Inventory, space: Space, study: optuna.Study, engine: Engine, view: View,
    ) -> None:  # fmt: skip
        self.given = given
        self.spec, self.out, self.options, self.device, self.task = spec, out, options, device, task
        self.inventory, self.space, self.study, self.engine, self.view = found, space, study, engine, view
        self.example = example(task.data.validation).to(device)
        self.seconds: dict[str, float] = attributes.read_seconds(study)
        self.ledger: Ledger | None = None
        self.unfinished = out / folder.UNFINISHED

    def straight_on(self) -> None:
        self.dense()
        layers = self.profile()
        self.facts(layers)
        evaluate = self.evaluator(layers)
        self.probes(layers, evaluate)
        self.search(layers, evaluate)
        self.finalists(evaluate)
        self.report()

    def dense(self) -> None:
        """The dense model's weights: from an earlier run, or from the spec's file and training."""
        path, unfinished = self.out / folder.DENSE, self.unfinished / "dense.pt"
        with self.stage("dense"):
            # A model given from Python is what it is; the folder's weights are those of an earlier one.
            if self.given or not load_weights(self.task.model, path):
                train_dense(self.task, self.spec, self.device, self.view, unfinished=unfinished)
            weights = weights_of(self.task.model)
            digest = hashlib.sha256(weights).hexdigest()
            self._check_dense(digest)
            # First the file: a digest without its weights could not be gone on from, since they seldom train to the same bits.
            if not path.exists():
                write_whole(path, weights)
            unfinished.unlink(missing_ok=True)
            if DIGEST not in self.study.user_attrs:
                self.study.set_user_attr(DIGEST, digest)
        # As training lays it out: else what a resumed run decomposes would differ in its last bits.
        training.place(self.task.model, self.device).eval()
        # Trained weights can be what initial ones were not.
        check_weights(self.task.model)

    def profile(self) -> Profile:
        """Every candidate's factors and the VBMF ranks."""
        methods = {axis.layer.name: axis.methods for axis in self.space.axes}
        self.view.stage("profiling layers", len(self.inventory.layers))
        aware, seed = self.spec.space.data_aware, self.spec.seed
        with self.stage("profile"):
            return profile(
                self.task.model, self.inventory, methods, offer=offer_of(self.spec.space),
                inputs=sample_inputs(self.task.data.train, CALIBRATION, seed=seed) if aware else None,
                cache=self.out / "profile", seed=seed, device=self.device, on_layer=self.view.step,
            )  # fmt: skip

    def facts(self, layers: Profile) -> None:
        """The study's facts into its storage; what the dense model is is measured once."""
        known = attributes.read_facts(self.study) if attributes.has_facts(self.study) else self._measured(layers)
        since = known.since if known.limits == self.spec.search.limits else len(self.study.get_trials(deepcopy=False))
        facts = replace(known, spec=self.spec.to_dict(), command=self.options.command, since=since)
        attributes.write_facts(self.study, facts)
        self.view.facts(facts)

    def probes(self, layers: Profile, evaluate: Evaluator) -> None:
        """The loss with one layer at a time decomposed: what the frontier is predicted from. Kept after every one."""
        wanted = [Plan()]
        for name, layer in layers.layers.items():
            wanted += [Plan.of({name: value}) for value in values_to_probe(layer)]
        dense, known = attributes.read_probes(self.study)
        done = {Plan.of({probe.layer: probe.value}) for probe in known} | ({Plan()} if dense is not None else set())
        self.view.stage("probing layers", len(wanted), len(done))

        def on_answer(job: Job, answer: Answer) -> None:
            nonlocal dense
            if answer.outcome is Outcome.WORKER_LOST:
                self.view.note(f"probe of {job.plan}: {answer.outcome.value}")
                return
            if answer.loss is None:
                done.add(job.plan)  # in this run; the next may have more memory for it
                self.view.step(f"{job.plan}: {answer.outcome.value}")
                return
            loss = answer.loss if math.isfinite(answer.loss) else WORST_LOSS
            if job.plan.layers:
                known.append(Probe(*job.plan.layers[0], loss))
            else:
                dense = loss
            done.add(job.plan)
            attributes.write_probes(self.study, dense, known)
            self.view.step(str(job.plan))

        def jobs() -> Iterator[Job]:
            return (Job(key, plan, self.spec.seed, Stage.PROBE) for key, plan in enumerate(wanted) if plan not in done)

        self.run_jobs("probes", jobs, evaluate, on_answer)

    def firsts(self, layers: Profile) -> list[tuple[str, Plan]]:
        """The plans within the limits that are tried first, with their origins; chosen once in a study."""
        if (known := attributes.read_firsts(self.study)) is not None:
            return known
        dense, probes = attributes.read_probes(self.study)
        price = prices(self.spec.search.minimize, self.inventory)[0]
        # Where the worker of the dense probe was lost, there is nothing to set the others against.
        corners = predicted_frontier(layers, probes, dense, price) if dense is not None else []
        # The dense corner, which is never chosen, stays: `spread` takes the first for it.
        within = [*corners[:1], *(corner for corner in corners[1:] if self._fits(corner.plan))]
        chosen = spread(rescuable(within), price.of(self.inventory), FRONTIER_PLANS)
        vbmf = [(origin, plan) for origin, plan in vbmf_plans(self.space, layers.vbmf) if self._fits(plan)]
        firsts = [*(("frontier", corner.plan) for corner in chosen), *vbmf]
        attributes.write_firsts(self.study, firsts)
        return firsts

    def search(self, layers: Profile, evaluate: Evaluator) -> None:
        """Ask, evaluate, tell, until the budget is spent."""
        firsts = self.firsts(layers)
        limits, facts = self.spec.search.limits, attributes.read_facts(self.study)
        dense_score = facts.dense.score_validation
        dense_loss, probes = attributes.read_probes(self.study)
        knowledge = Knowledge.of(
            self.space,
            self.inventory,
            layers,
            probes,
            dense_loss=dense_loss,
            dense_score=dense_score,
            limits=limits,
            minimize=self.spec.search.minimize,
        )
        ledger = self.ledger = Ledger(
            self.study, self.space, self.inventory, firsts, sampler=self.spec.search.sampler, seed=self.spec.seed,
            dense_score=dense_score, limits=limits, since=facts.since, objectives=facts.objectives, knowledge=knowledge,
            on_untrained=lambda found: self.view.trial(found, ledger.records()),
        )  # fmt: skip
        ledger.recover()
        trials, minutes = self.spec.search.trials, self.spec.search.minutes
        self.view.stage("trials", trials, min(trials, ledger.finished()))
        before, start = self.seconds.get("trials", 0.0), time.monotonic()

        def spent() -> bool:
            return minutes is not None and before + time.monotonic() - start >= minutes * 60

        def on_answer(job: Job, answer: Answer) -> None:
            self.view.trial(ledger.receive(job, answer), ledger.records())

        self.run_jobs("trials", lambda: ledger.jobs(trials), evaluate, on_answer, spent)

    def finalists(self, evaluate: Evaluator) -> None:
        """Fine-tune the best trials for longer, score them on the test split, keep their weights, time them."""
        trials, facts = attributes.read_trials(self.study), attributes.read_facts(self.study)
        chosen = choose_finalists(
            trials, facts.dense.score_validation, self.spec.finalists.count, self.spec.search.limits, facts.objectives
        )
        # What diverged would again; what ran out of memory may have more of it now.
        waiting = [t for t in chosen if t.failed is not Outcome.DIVERGED and not (t.finalist and self._kept(t))]
        by_number, answered = {trial.number: trial for trial in trials}, set[int]()
        self.view.stage("finalists", len(chosen), len(chosen) - len(waiting))

        def on_answer(job: Job, answer: Answer) -> None:
            self._finalist(by_number[job.key], answer)
            if answer.outcome is not Outcome.WORKER_LOST:
                answered.add(job.key)
                checkpoint_file(self.unfinished, job.key).unlink(missing_ok=True)

        def jobs() -> Iterator[Job]:
            left = (trial for trial in waiting if trial.number not in answered)
            return (Job(trial.number, trial.plan, trial.seed, Stage.FINALIST) for trial in left)

        self.unfinished.mkdir(exist_ok=True)
        self.run_jobs("finalists", jobs, evaluate, on_answer)
        # What lost its worker too often goes on in the next run.
        if all(trial.number in answered for trial in waiting):
            shutil.rmtree(self.unfinished, ignore_errors=True)
        with self.stage("finalists"):
            self._latencies()

    def report(self) -> None:
        """The report, from the storage alone."""
        write_report(attributes.read_study(self.study), self.out)

    def stopped(self) -> StudyRecord | None:
        """After Ctrl-C: nothing is left running, and the report shows what there is; None before the facts are known."""
        if self.ledger:
            self.ledger.recover()
        if not attributes.has_facts(self.study):
            return None
        self.report()
        return attributes.read_study(self.study)

    # --- details ---

    def _kept(self, trial: TrialRecord) -> bool:
        return holds_model(self.out / "models" / str(trial.number))

    def _fits(self, plan: Plan) -> bool:
        return not self.spec.search.limits.excess(size_of(plan, self.inventory))

    def run_jobs(
        self, stage: str, jobs: Callable[[], Iterator[Job]], evaluate: Evaluator, on_answer: Callable[[Job, Answer], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Evaluate what `jobs()` gives; and again what it gives then, where workers were lost, but none more than `MAX_TRIES`
        times. The stage's seconds are kept after each answer."""
        losses, again = Counter[int](), True

        def on_message(job: Job, message: Rung | Answer) -> None:
            nonlocal again
            if isinstance(message, Rung):
                self.view.rung(job.key, message)
                return
            if message.outcome is Outcome.WORKER_LOST:
                losses[job.key] += 1
                again = again or losses[job.key] < MAX_TRIES
            on_answer(job, message)
            keep()

        with self.stage(stage) as keep:
            while again:
                again = False
                self.engine.run(jobs(), evaluate, on_message=on_message, should_stop=should_stop)

    def evaluator(self, layers: Profile) -> Evaluator:
        task = replace(self.task, model=self.task.model.cpu())
        long = self.spec.finalists
        device = self.device.type if self.options.engine == "local" else "cuda" if self.options.gpus_per_trial else "cpu"
        return Evaluator(
            task, layers, self.spec.finetune, long, device, long.sweeps,
            layerwise=long.schedule == "layerwise", scratch=self.spec.space.start == "scratch",
            unfinished=self.unfinished.resolve(),
        )  # fmt: skip

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], None]]:
        """Adds the seconds that a stage takes to those of earlier runs, at its end and whenever what it gives is called."""
        before, start = self.seconds.get(name, 0.0), time.monotonic()

        def keep() -> None:
            self.seconds[name] = before + time.monotonic() - start
            attributes.write_seconds(self.study, self.seconds)

        try:
            yield keep
        finally:
            keep()

    def _check_dense(self, digest: str) -> None:
        """Go on only with the dense model that the study was begun with."""
        if self.study.user_attrs.get(DIGEST, digest) != digest:
            raise StudyError(
                f"The study {self.spec.name!r} in this storage was made from another dense model; choose another name or "
                "--storage, or --fresh to start over."
            )

    def _measured(self, layers: Profile) -> StudyFacts:
        return study_facts(
            self.spec, self.task, self.inventory, layers, self.example, engine=self.engine.about, command=self.options.command
        )

    def _finalist(self, trial: TrialRecord, answer: Answer) -> None:
        if answer.outcome is Outcome.WORKER_LOST:
            self.view.note(f"finalist {trial.number}: {answer.outcome.value}")
            return
        if answer.outcome is not Outcome.DONE:
            attributes.write_failed(self.study, trial.number, answer.outcome)
            self.view.note(f"finalist {trial.number}: {answer.outcome.of_finalist}")
            self.view.step()
            return
        assert answer.score_test is not None
        assert answer.weights is not None
        save_model(self.out / "models" / str(trial.number), trial.plan, answer.weights)
        finalist = Finalist(
            score_validation=answer.curve[-1].score, score_test=answer.score_test, curve=answer.curve,
            seconds=answer.seconds, latency_ms=None,
        )  # fmt: skip
        attributes.write_finalist(self.study, trial.number, finalist)
        self.view.trial(replace(trial, finalist=finalist), attributes.read_trials(self.study))

    def _latencies(self) -> None:
        """Milliseconds of the dense model and of every finalist, taken in turn in one go, so that they compare."""
        # Weights of one that is a finalist no more may be gone: it is not made again.
        trials = [trial for trial in attributes.read_trials(self.study) if trial.finalist and self._kept(trial)]
        if all(trial.finalist and trial.finalist.latency_ms is not None for trial in trials):
            return
        folders = [self.out / "models" / str(trial.number) for trial in trials]
        models = [load_model(self.task.model.cpu(), path).to(self.device) for path in folders]
        dense, *times = training.latencies_ms([self.task.model.to(self.device), *models], self.example)
        for trial, latency in zip(trials, times, strict=True):
            assert trial.finalist is not None
            attributes.write_finalist(self.study, trial.number, replace(trial.finalist, latency_ms=latency))
        facts = attributes.read_facts(self.study)
        attributes.write_facts(self.study, replace(facts, dense=replace(facts.dense, latency_ms=dense)))


def _engine(options: Options) -> Engine:
    if options.engine == "ray":
        return ray.engine(ray.Cluster(options.address, options.workers, options.cpus_per_trial, options.gpus_per_trial))
    return local.engine(options.workers if options.workers is not None else (os.cpu_count() or 1))


def _check_min_score(spec: StudySpec, task: Task) -> None:
    least = spec.search.min_score
    if task.score is accuracy and least is not None and least > 1:
        raise SpecError(f"search.min_score must be at most 1 for accuracy, but got {least:g}; 97 % is 0.97.")
