"""After the finalists: trains narrower nets from random weights, the controls that the front is compared with."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from torch import nn

from ranksearch.compress.inventory import count_macs, count_params
from ranksearch.compress.surgery import copied
from ranksearch.compress.widths import scale_width_
from ranksearch.console import control_line
from ranksearch.data import example
from ranksearch.errors import ModelError
from ranksearch.plan import Plan
from ranksearch.results import attributes
from ranksearch.results.costs import MACS, PARAMS
from ranksearch.results.messages import Job, Outcome, Result, Stage
from ranksearch.results.record import Control, StudyRecord
from ranksearch.spec import Recipe, StudySpec
from ranksearch.study import folder
from ranksearch.study.finishing import RESUMABLE
from ranksearch.study.session import Session
from ranksearch.support.files import writing
from ranksearch.task.evaluation import CONTROLS, Evaluator, checkpoint_file, remove_checkpoints
from ranksearch.task.task import Task

SHARES = [1.03**-step for step in range(120, 0, -1)]
"""The shares of the channels that the first controls may keep, from 3 % to 97 %. Costs fall with about the square."""


def control_recipe(spec: StudySpec, layers: int) -> Recipe:
    """The recipe of the dense net, for as many epochs as the dense net, a narrower one of it if the study makes any, and a
    finalist of so many layers have together."""
    dense, steps = spec.dense, layers if spec.finalists.schedule == "layerwise" else 1
    narrow = spec.narrow.epochs if len(spec.space.widths) > 1 else 0
    epochs = dense.epochs + narrow + steps * spec.finalists.epochs
    return Recipe(epochs, dense.batch_size, dense.learning_rate, dense.weight_decay, dense.precision)


def train_controls(
    session: Session, spec: StudySpec, task: Task, evaluate: Evaluator, out: Path
) -> list[tuple[Control, nn.Module]]:
    """Train the controls, and score them on the validation and the test split.

    Returns:
        All controls, also those of earlier runs, each with an untrained net of its structure.
    """
    record = attributes.read_study(session.study)
    try:
        shares = _shares(session, spec, task, record)
        nets = {number: _Narrow(task, share) for number, share in enumerate(shares, start=1)}
    except ModelError as error:
        attributes.write_shares(session.study, [], str(error))
        session.view.note(f"no controls: {error}")
        return []
    controls, failed = attributes.read_controls(session.study)
    # A control that diverged would diverge again. One that ran out of memory may succeed in this run.
    done = {*controls, *(number for number, outcome in failed.items() if outcome is Outcome.DIVERGED)}
    waiting = [number for number in range(1, spec.controls + 1) if number in nets and number not in done]
    if waiting:
        session.view.stage("controls", spec.controls, spec.controls - len(waiting))
        _train(session, spec, record, {number: nets[number] for number in waiting}, evaluate, out / folder.UNFINISHED)
        controls, _ = attributes.read_controls(session.study)
    return [(control, nets[number].model) for number, control in controls.items()]


class _Narrow:
    """The net with this share of the dense net's channels, untrained. Raises `ModelError` as `scale_width_` does."""

    def __init__(self, task: Task, share: float) -> None:
        inputs = example(task.data.train)
        self.share = share
        self.model = scale_width_(copied(task.model), inputs, share)
        self.costs: dict[str, float] = {"params": count_params(self.model), "macs": count_macs(self.model, inputs)}


def _train(
    session: Session, spec: StudySpec, record: StudyRecord, nets: dict[int, _Narrow], evaluate: Evaluator, unfinished: Path
) -> None:
    """Train these controls, by number, and store each result at once."""
    outcomes = dict.fromkeys(nets, Outcome.WORKER_LOST)

    def on_result(job: Job, result: Result) -> None:
        outcomes[job.key] = result.outcome
        if result.outcome is Outcome.DONE:
            control = _control(record, job.key, nets[job.key], result)
            attributes.write_control(session.study, control)
            session.view.note(control_line(control, record.facts))
            session.view.step()
        else:
            _tell_failed(session, job.key, result.outcome)
        if result.outcome not in RESUMABLE:
            checkpoint_file(unfinished, job).unlink(missing_ok=True)

    def jobs() -> Iterator[Job]:
        left = [number for number, outcome in outcomes.items() if outcome is Outcome.WORKER_LOST]
        return (Job(number, Plan(), spec.seed, Stage.CONTROL, nets[number].share) for number in left)

    with writing(f"The folder {unfinished}"):
        (unfinished / CONTROLS).mkdir(parents=True, exist_ok=True)
    session.run_jobs("controls", jobs, evaluate, on_result)
    if not RESUMABLE & set(outcomes.values()):
        remove_checkpoints(unfinished / CONTROLS)
        with suppress(OSError):  # finalists may have checkpoints there
            unfinished.rmdir()


def _control(record: StudyRecord, number: int, net: _Narrow, result: Result) -> Control:
    assert result.score_test is not None
    return Control(
        number=number, share=net.share, costs=net.costs, ratio=record.facts.dense.params / net.costs["params"],
        score_validation=result.curve[-1].score, score_test=result.score_test, curve=result.curve, seconds=result.seconds,
    )  # fmt: skip


def _tell_failed(session: Session, number: int, outcome: Outcome) -> None:
    session.view.note(f"control {number}: {outcome.of_control}")
    if outcome is not Outcome.WORKER_LOST:
        attributes.write_failed_control(session.study, number, outcome)
        session.view.step()


def _shares(session: Session, spec: StudySpec, task: Task, record: StudyRecord) -> list[float]:
    """The shares of the channels that the controls keep. They are chosen once; a later run may only add some."""
    stored, _ = attributes.read_shares(session.study)
    if len(stored) >= spec.controls or not record.shown:
        return stored
    shares = _filled(stored, spec.controls) if stored else _first_shares(spec, task, record)
    attributes.write_shares(session.study, shares)
    return shares


def _first_shares(spec: StudySpec, task: Task, record: StudyRecord) -> list[float]:
    """Log-spaced, the largest first, from the dense net or the largest that a limit allows to the smallest model of the front.

    A control is the narrowest net that costs as much as the wanted one, so the smallest control has a model of the front
    that is no larger.
    """
    # The latency of a net is not known before it is timed.
    cost = PARAMS.name if spec.search.minimize[0] == PARAMS.name else MACS.name
    limits, dense = spec.search.limits, record.facts.dense.costs[cost]
    low = min(trial.costs[cost] for trial in record.shown)
    bounds = [limits.max_costs.get(cost, dense), dense / limits.min_ratio if limits.min_ratio and cost == "params" else dense]
    high = max(low, min(dense, *bounds))
    wanted = [low * (high / low) ** (step / spec.controls) for step in reversed(range(spec.controls))]

    @functools.cache
    def cost_of(share: float) -> float:
        return _Narrow(task, share).costs[cost]

    return [SHARES[min(bisect.bisect_left(SHARES, each, key=cost_of), len(SHARES) - 1)] for each in wanted]


def _filled(shares: Sequence[float], count: int) -> list[float]:
    """The shares with others added, each in the middle of the widest gap, on a logarithmic axis that ends at the dense net."""
    found = list(shares)
    while len(found) < count:
        ends = sorted([*found, 1.0])
        below, above = max(itertools.pairwise(ends), key=lambda pair: pair[1] / pair[0])
        found.append(math.sqrt(below * above))
    return found
