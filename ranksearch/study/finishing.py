"""After the last trial: trains the finalists for longer, scores them on the test split, saves and times them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ranksearch.compress.export import holds_model, save_model
from ranksearch.results import attributes
from ranksearch.results.messages import Job, Outcome, Result, Stage
from ranksearch.results.record import Finalist, TrialRecord
from ranksearch.strategy.finalists import choose_finalists
from ranksearch.study.run import Run
from ranksearch.study.timing import time_finalists
from ranksearch.support.files import writing
from ranksearch.task.evaluation import Evaluator, checkpoint_file

RESUMABLE = {Outcome.WORKER_LOST, Outcome.OUT_OF_MEMORY}
"""Outcomes after which the next run resumes the finalist from its checkpoint."""


def train_finalists(run: Run, evaluate: Evaluator) -> None:
    """Fine-tune the best trials for longer, score them on the test split, save their weights and time them."""
    trials, facts = attributes.read_trials(run.study), attributes.read_facts(run.study)
    chosen = choose_finalists(
        trials, facts.dense.score_validation, run.spec.finalists.count, run.spec.search.limits, facts.objectives
    )
    # A finalist that diverged would diverge again. One that ran out of memory may succeed in this run.
    waiting = [t for t in chosen if t.failed is not Outcome.DIVERGED and not (t.finalist and _has_model(run, t))]
    by_number = {trial.number: trial for trial in trials}
    outcomes = {trial.number: Outcome.WORKER_LOST for trial in waiting}
    run.view.stage("finalists", len(chosen), len(chosen) - len(waiting))

    def on_result(job: Job, result: Result) -> None:
        _record_result(run, by_number[job.key], result)
        outcomes[job.key] = result.outcome
        if result.outcome not in RESUMABLE:
            checkpoint_file(run.unfinished, job.key).unlink(missing_ok=True)

    def jobs() -> Iterator[Job]:
        left = (trial for trial in waiting if outcomes[trial.number] is Outcome.WORKER_LOST)
        return (Job(trial.number, trial.plan, trial.seed, Stage.FINALIST) for trial in left)

    with writing(f"The folder {run.unfinished}"):
        run.unfinished.mkdir(exist_ok=True)
    run.run_jobs("finalists", jobs, evaluate, on_result)
    if not RESUMABLE & set(outcomes.values()):
        shutil.rmtree(run.unfinished, ignore_errors=True)
    with run.stage("finalists"):
        _measure_latencies(run)


def _record_result(run: Run, trial: TrialRecord, result: Result) -> None:
    if result.outcome is Outcome.WORKER_LOST:
        run.view.note(f"finalist {trial.number}: {result.outcome.value}")
        return
    if result.outcome is not Outcome.DONE:
        attributes.write_failed(run.study, trial.number, result.outcome)
        run.view.note(f"finalist {trial.number}: {result.outcome.of_finalist}")
        run.view.step()
        return
    assert result.score_test is not None
    assert result.weights is not None
    with writing(f"The model {_model_folder(run, trial)}"):
        save_model(_model_folder(run, trial), trial.plan, result.weights)
    finalist = Finalist(
        score_validation=result.curve[-1].score, score_test=result.score_test, curve=result.curve,
        seconds=result.seconds,
    )  # fmt: skip
    attributes.write_finalist(run.study, trial.number, finalist)
    run.view.trial(replace(trial, finalist=finalist), attributes.read_trials(run.study))


def _measure_latencies(run: Run) -> None:
    """Measure the latency of the dense model and all finalists."""
    # The weights of a former finalist may be missing; it is not trained again.
    trials = [trial for trial in attributes.read_trials(run.study) if trial.finalist and _has_model(run, trial)]
    time_finalists(run, [(trial, _model_folder(run, trial)) for trial in trials])


def _model_folder(run: Run, trial: TrialRecord) -> Path:
    return run.out / "models" / str(trial.number)


def _has_model(run: Run, trial: TrialRecord) -> bool:
    return holds_model(_model_folder(run, trial))
