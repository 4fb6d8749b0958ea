"""The ledger asks Optuna for trials, hands them out as jobs, and tells Optuna the results. No trial is lost if a run is killed.

The Optuna study holds all state. Each trial has an index, its place in the order of asking. A trial that a killed run left
unfinished is told FAIL and queued again under its old index, so the study continues as if the run had not been killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from ranksearch.plan import Plan
from ranksearch.results.attributes import asked, read_asked, read_trials, write_trial
from ranksearch.results.limits import Limits
from ranksearch.results.messages import Job, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import MAX_TRIES, MAX_UNTRAINED, TrialRecord, untrained_in_a_row
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.finalists import floor_of
from ranksearch.strategy.sampler import SIZE_CONSTRAINT, Knowledge, admit, make_sampler

ENQUEUED = "enqueued"
"""The origin of trials that another program queued with Optuna's `enqueue_trial`."""
QUEUED_PARAMS = "fixed_params"
"""The key of a trial's system attributes under which Optuna keeps the parameters it was queued with."""


@dataclass(frozen=True)
class _Open:
    """A trial that was asked for but not told yet, with its index, origin and plan."""

    trial: optuna.Trial
    index: int
    origin: str
    plan: Plan


class Ledger:
    """The finished and running trials of one study.

    Args:
        study: the Optuna study that holds the trials.
        bases: the nets to search from, and the space of the plans.
        initial_plans: pairs (origin, plan) to try before the sampler proposes.
        sampler: name of the sampler.
        seed: the study's seed.
        dense_score: score of the dense model. Trials far below it break a constraint, so samplers avoid their region.
        limits: limits of score and size. Plans over a size limit are not trained.
        objectives: what Optuna is told of a trial: its score and the ratios of these costs.
        since: number of the first trial that was proposed under these limits.
        knowledge: what the sampler "rank" needs; None for other samplers.
        on_untrained: called with the record of each trial that gets a result without a job.
        on_note: called with the reason if a trial that another program queued cannot be evaluated.
    """

    def __init__(
        self,
        study: optuna.Study,
        bases: Bases,
        initial_plans: Sequence[tuple[str, Plan]],
        *,
        sampler: str,
        seed: int,
        dense_score: float,
        limits: Limits,
        objectives: Objectives,
        since: int = 0,
        knowledge: Knowledge | None = None,
        on_untrained: Callable[[TrialRecord], None] = lambda record: None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.study = study
        self._bases, self._initial_plans = bases, initial_plans
        self._sampler, self._seed, self._dense_score = sampler, seed, dense_score
        self._knowledge = knowledge
        self._distributions = bases.distributions()
        self._records = {record.number: record for record in read_trials(study)}
        trials = study.get_trials(deepcopy=False)
        self._queued_count = sum(trial.state is TrialState.WAITING and read_asked(trial) is not None for trial in trials)
        """The number of queued trials that have an index."""
        places = {place for trial in trials if (place := read_asked(trial))}
        self._next_index = 1 + max((index for index, _ in places), default=-1)
        """The index that the next new trial gets."""
        self._initial_plans_asked = sum(origin in {first for first, _ in initial_plans} for _, origin in places)
        """How many initial plans have an index already."""
        self._limits, self._since, self._objectives = limits, since, objectives
        self._on_untrained, self._on_note = on_untrained, on_note
        self._running: dict[int, _Open] = {}
        self._duplicates: list[tuple[int, _Open]] = []
        """Trials whose plan another trial is training now, each with the number of that trial; they will share its result."""

    def records(self) -> tuple[TrialRecord, ...]:
        """All finished trials by number: those in the storage at the start, and those that this ledger told."""
        return tuple(self._records[number] for number in sorted(self._records))

    def finished(self) -> int:
        """The number of trials that were trained; trials whose worker was lost are not counted."""
        return sum(record.trained for record in self.records())

    def recover(self) -> int:
        """Tell every trial that a killed run left running FAIL and queue it again; returns the number of these trials."""
        unfinished = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in unfinished:
            # Queue the trial before it is told FAIL: after a kill in between, the next run finds it still running.
            # A queued trial keeps the parameters not suggested yet in its system attributes. A new trial without all of its
            # parameters has no index yet; it is dropped, since asking again with that index proposes the same plan.
            params = {**trial.system_attrs.get(QUEUED_PARAMS, {}), **trial.params}
            place = read_asked(trial)
            if place and set(self._distributions) <= set(params):
                self._queue_again(*place, params)
            elif place is None and self._queued_params(trial) is not None:
                self._put_back(trial)
            self.study.tell(trial.number, state=TrialState.FAIL)
        self._running.clear()
        self._duplicates.clear()
        return len(unfinished)

    def jobs(self, trials: int) -> Iterator[Job]:
        """Yield jobs until `trials` trials are trained or running, or `MAX_UNTRAINED` trials in a row needed no training."""
        while self.finished() + len(self._running) < trials and self._untrained_in_a_row() < MAX_UNTRAINED:
            opened = self._ask()
            if (earlier := self._earlier(opened.plan)) is not None:
                self._tell_duplicate(opened, earlier)
            elif (number := self._running_number(opened.plan)) is not None:
                self._duplicates.append((number, opened))
            elif (outcome := self._refusal(opened.plan)) is not None:
                self._on_untrained(self._tell(opened.trial, self._record(opened, Result(outcome))))
            else:
                self._running[opened.trial.number] = opened
                yield Job(opened.trial.number, opened.plan, self.seed_of(opened.index))

    def receive(self, job: Job, result: Result) -> TrialRecord:
        """Tell Optuna the result of a job. If the worker was lost, queue the trial again, up to `MAX_TRIES` tries per plan."""
        opened = self._running.pop(job.key)
        # Queue the trial before it is told FAIL: after a kill in between, the next run finds it still running.
        if result.outcome is Outcome.WORKER_LOST and self._losses(opened.plan) + 1 < MAX_TRIES:
            self._queue_again(opened.index, opened.origin, opened.trial.params)
        record = self._tell(opened.trial, self._record(opened, result))
        duplicates = [duplicate for number, duplicate in self._duplicates if number == job.key]
        self._duplicates = [(number, duplicate) for number, duplicate in self._duplicates if number != job.key]
        for duplicate in duplicates:
            self._tell_duplicate(duplicate, record)
        return record

    def seed_of(self, index: int) -> int:
        """The seed of the trial at an index, for the sampler that proposes it and for its training."""
        return (self._seed * 1_000_003 + index) % 2**31

    def _ask(self) -> _Open:
        while (trial := self._draw()) and (reason := self._rejection(trial)):
            self.study.tell(trial, state=TrialState.FAIL)
            self._on_note(f"trial {trial.number}, which another program queued, is not evaluated: {reason}")
        place, queued = read_asked(trial), self._queued_params(trial) is not None
        for name, kind in self._distributions.items():
            _suggest(trial, name, kind)
        if place is None:
            # The index is set last: if the run is killed before, the next run proposes this trial anew at the same index.
            place = self._next_index, ENQUEUED if queued else self._sampler
            self._next_index += 1
            for key, value in asked(*place).items():
                trial.set_user_attr(key, value)
        if queued:
            admit(self.study, trial, self._sampler)
        return _Open(trial, *place, self._bases.plan(trial.params))

    def _draw(self) -> optuna.Trial:
        """The next trial from Optuna: first trials that were queued again, then trials that another program queued, then the
        initial plans, then a new trial for the sampler."""
        while True:
            if not self._queued_count:
                self._prepare()
            trial = self.study.ask()
            if read_asked(trial) is not None:
                self._queued_count -= 1
                return trial
            if not self._queued_count or self._queued_params(trial) is None:
                return trial
            # Another program queued this trial before ours. Queue it again behind them, since samplers see trials in the order
            # of their numbers.
            self._put_back(trial)
            self.study.tell(trial, state=TrialState.FAIL)

    def _prepare(self) -> None:
        """Queue the next initial plan, or give the study a sampler for the next proposal."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._initial_plans_asked < len(self._initial_plans) and not waiting:
            origin, plan = self._initial_plans[self._initial_plans_asked]
            self.study.enqueue_trial(self._bases.params(plan), user_attrs=asked(self._next_index, origin))
            self._initial_plans_asked += 1
            self._next_index += 1
            self._queued_count += 1
        else:
            self.study.sampler = make_sampler(self._sampler, seed=self.seed_of(self._next_index), knowledge=self._knowledge)

    def _rejection(self, trial: optuna.Trial) -> str | None:
        """Why a trial that another program queued cannot be evaluated; None if it can be, and for all other trials."""
        params = self._queued_params(trial)
        if params is None or read_asked(trial) is not None:
            return None
        for name, kind in self._distributions.items():
            if name not in params:
                return f"every parameter of the space must be given, but {name!r} is not"
            if not _holds(kind, params[name]):
                return f"{name!r} must be {_range(kind)}, but is {params[name]!r}"
        return None

    def _earlier(self, plan: Plan) -> TrialRecord | None:
        """The trial whose result a new trial of the same plan gets: a finished one, or one that lost too many workers."""
        final = [Outcome.DONE, Outcome.WORKER_LOST] if self._losses(plan) >= MAX_TRIES else [Outcome.DONE]
        earlier = [record for record in self.records() if record.plan == plan and record.outcome in final]
        return min(earlier, key=lambda record: final.index(record.outcome), default=None)

    def _running_number(self, plan: Plan) -> int | None:
        """The number of the running trial of this plan."""
        return next((number for number, other in self._running.items() if other.plan == plan), None)

    def _refusal(self, plan: Plan) -> Outcome | None:
        """The outcome of a plan that is not trained: the dense plan, and plans over a size limit."""
        if plan == Plan():
            # Every other plan is smaller than dense: the space holds only factorizations that make their layer smaller.
            return Outcome.NOT_SMALLER
        return Outcome.OVER_BUDGET if self._limits.excess(self._bases.size_of(plan)) else None

    def _tell_duplicate(self, opened: _Open, earlier: TrialRecord) -> None:
        """Tell a trial the result of an earlier trial of the same plan."""
        same_as = earlier.number if earlier.same_as is None else earlier.same_as
        record = replace(
            earlier,
            number=opened.trial.number,
            index=opened.index,
            origin=opened.origin,
            seconds=0.0,
            same_as=same_as,
            finalist=None,
        )
        self._on_untrained(self._tell(opened.trial, record))

    def _untrained_in_a_row(self) -> int:
        return untrained_in_a_row(
            self.records(), self._since, waiting=[twin.trial.number for _, twin in self._duplicates], running=self._running
        )

    def _record(self, opened: _Open, result: Result) -> TrialRecord:
        size = self._bases.size_of(opened.plan)
        return TrialRecord(
            number=opened.trial.number,
            index=opened.index,
            origin=opened.origin,
            plan=opened.plan,
            outcome=result.outcome,
            costs=size.costs,
            ratio=size.ratio,
            score=result.curve[-1].score if result.outcome is Outcome.DONE else None,
            curve=result.curve,
            seconds=result.seconds,
            seed=self.seed_of(opened.index),
        )

    def _tell(self, trial: optuna.Trial, record: TrialRecord) -> TrialRecord:
        write_trial(trial, record)
        excess = self._limits.excess(record)
        if record.score is not None:
            # Without this constraint a sampler spends half its trials on tiny models with a useless score. One constraint for
            # score and size together, since Optuna's GP needs the same number of constraints in every trial.
            scores = [r.score for r in (*self._records.values(), record) if r.score is not None]
            lacking = floor_of(self._dense_score, scores, self._limits) - record.score
            trial.set_constraint("worth taking home", max(0.0, lacking) + excess if excess else lacking)
        elif excess:
            trial.set_constraint(SIZE_CONSTRAINT, excess)
        values = self._objectives.point(record.score, record) if record.score is not None else None
        self.study.tell(trial, values if record.outcome is Outcome.DONE else None, state=record.outcome.state)
        self._records[record.number] = record
        return record

    def _losses(self, plan: Plan) -> int:
        """How many workers were lost while they evaluated this plan."""
        lost = [r for r in self._records.values() if r.outcome is Outcome.WORKER_LOST and r.same_as is None]
        return sum(record.plan == plan for record in lost)

    def _queue_again(self, index: int, origin: str, params: Mapping[str, Any]) -> None:
        waiting = [read_asked(t) for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))]
        if (index, origin) not in waiting:
            self.study.enqueue_trial(dict(params), user_attrs=asked(index, origin))
            self._queued_count += 1

    def _queued_params(self, trial: FrozenTrial | optuna.Trial) -> dict[str, Any] | None:
        """The parameters that a trial was queued with; None for a new one."""
        return self.study.get_trials(deepcopy=False)[trial.number].system_attrs.get(QUEUED_PARAMS)

    def _put_back(self, trial: FrozenTrial | optuna.Trial) -> None:
        """Queue a trial of another program again that was taken from the queue but has no index yet."""
        params = self._queued_params(trial)
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        # A run that was killed right after this step has queued it already.
        if not any(read_asked(other) is None and self._queued_params(other) == params for other in waiting):
            self.study.enqueue_trial(params or {}, user_attrs=trial.user_attrs)


def _suggest(trial: optuna.Trial, name: str, kind: BaseDistribution) -> None:
    if isinstance(kind, CategoricalDistribution):
        trial.suggest_categorical(name, kind.choices)
    else:
        assert isinstance(kind, FloatDistribution)
        trial.suggest_float(name, kind.low, kind.high)


def _holds(kind: BaseDistribution, value: Any) -> bool:
    if isinstance(kind, CategoricalDistribution):
        return value in kind.choices
    assert isinstance(kind, FloatDistribution)
    return isinstance(value, int | float) and kind.low <= value <= kind.high


def _range(kind: BaseDistribution) -> str:
    if isinstance(kind, CategoricalDistribution):
        return f"one of {', '.join(map(str, kind.choices))}"
    assert isinstance(kind, FloatDistribution)
    return f"a number from {kind.low:g} to {kind.high:g}"
