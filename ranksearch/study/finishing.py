"""After the last trial: trains the finalists for longer, scores them on the test split and saves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import optuna

from ranksearch.compress.saved import holds_model, write_model
from ranksearch.plan import Narrowing
from ranksearch.results import attributes
from ranksearch.results.messages import Job, Outcome, Result, Stage
from ranksearch.results.record import StudyFacts
from ranksearch.results.trials import Finalist, TrialRecord
from ranksearch.spec import StudySpec
from ranksearch.strategy.finalists import choose_finalists
from ranksearch.study import folder
from ranksearch.study.session import Session
from ranksearch.support.files import writing
from ranksearch.task.evaluation import Evaluator, checkpoint_file, remove_checkpoints

RESUMABLE = {Outcome.WORKER_LOST, Outcome.OUT_OF_MEMORY}
"""Outcomes after which the next run resumes the finalist from its checkpoint."""


def train_finalists(
    session: Session, spec: StudySpec, trials: Sequence[TrialRecord], facts: StudyFacts, evaluate: Evaluator,
    narrowings: Mapping[float, Narrowing], out: Path,
) -> list[tuple[TrialRecord, Path]]:  # fmt: skip
    """Fine-tune the best trials for longer, score them on the test split and save their weights.

    `narrowings` say by width which channels the narrower nets keep; the plan of a saved model says it too.

    Returns:
        All finalists that have a model, also those of earlier runs, and the folders of their models.
    """
    limits, unfinished = spec.search.limits, out / folder.UNFINISHED
    chosen = choose_finalists(trials, facts.dense.score_validation, spec.finalists.count, limits, facts.objectives)
    # A finalist that diverged would diverge again. One that ran out of memory may succeed in this run.
    waiting = [t for t in chosen if t.failed is not Outcome.DIVERGED and not _has_model(t, out)]
    records = {trial.number: trial for trial in trials}
    outcomes = {trial.number: Outcome.WORKER_LOST for trial in waiting}
    session.view.stage("finalists", len(chosen), len(chosen) - len(waiting))

    def on_result(job: Job, result: Result) -> None:
        outcomes[job.key] = result.outcome
        if result.outcome is Outcome.DONE:
            trial = records[job.key] = _finish(session.study, records[job.key], result, narrowings, out)
            session.view.trial(trial, tuple(records.values()))
        else:
            _tell_failed(session, job.key, result.outcome)
        if result.outcome not in RESUMABLE:
            checkpoint_file(unfinished, job).unlink(missing_ok=True)

    def jobs() -> Iterator[Job]:
        left = (trial for trial in waiting if outcomes[trial.number] is Outcome.WORKER_LOST)
        return (Job(trial.number, trial.plan, trial.seed, Stage.FINALIST) for trial in left)

    with writing(f"The folder {unfinished}"):
        unfinished.mkdir(exist_ok=True)
    session.run_jobs("finalists", jobs, evaluate, on_result)
    if not RESUMABLE & set(outcomes.values()):
        remove_checkpoints(unfinished)
    # The weights of a former finalist may be missing; it is not trained again.
    return [(trial, _model_folder(trial, out)) for trial in records.values() if _has_model(trial, out)]


def _finish(
    study: optuna.Study, trial: TrialRecord, result: Result, narrowings: Mapping[float, Narrowing], out: Path
) -> TrialRecord:
    """Save a finalist's model and result, and return its record."""
    assert result.score_test is not None
    assert result.weights is not None
    with writing(f"The model {_model_folder(trial, out)}"):
        plan = replace(trial.plan, narrowing=narrowings.get(trial.plan.width))
        write_model(_model_folder(trial, out), plan, result.weights)
    finalist = Finalist(
        score_validation=result.curve[-1].score, score_test=result.score_test, curve=result.curve,
        seconds=result.seconds, difference_validation=result.difference_validation, difference_test=result.difference_test,
    )  # fmt: skip
    attributes.write_finalist(study, trial.number, finalist)
    return replace(trial, finalist=finalist, failed=None)


def _tell_failed(session: Session, number: int, outcome: Outcome) -> None:
    if outcome is Outcome.WORKER_LOST:
        session.view.note(f"finalist {number}: {outcome.value}")
    else:
        attributes.write_failed(session.study, number, outcome)
        session.view.note(f"finalist {number}: {outcome.of_finalist}")
        session.view.step()


def _has_model(trial: TrialRecord, out: Path) -> bool:
    return trial.finalist is not None and holds_model(_model_folder(trial, out))


def _model_folder(trial: TrialRecord, out: Path) -> Path:
    return out / "models" / str(trial.number)
