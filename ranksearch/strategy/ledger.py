"""Between Optuna and the engine: asks for trials, tells their results, and loses none when a run is killed.

The Optuna study is the only state. Each trial has an index, its place in the order of asking; a trial that a killed run
left behind is told FAIL and queued again under its old index, so that what follows is what would have followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from ranksearch.compress.inventory import Inventory
from ranksearch.plan import Plan
from ranksearch.results.attributes import asked, read_asked, read_trials, write_trial
from ranksearch.results.limits import Limits
from ranksearch.results.messages import Job, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import MAX_TRIES, MAX_UNTRAINED, TrialRecord, untrained_in_a_row
from ranksearch.strategy.finalists import floor_of
from ranksearch.strategy.sampler import SIZE_CONSTRAINT, Knowledge, admit, make_sampler
from ranksearch.strategy.space import Space, size_of

ENQUEUED = "enqueued"
"""The origin of trials that another program queued, by Optuna's `enqueue_trial`."""
_FIXED = "fixed_params"
"""Where Optuna keeps the parameters that a trial was queued with."""


@dataclass(frozen=True)
class _Open:
    """A trial that was asked for and not told yet: its place in the study, who proposed it, and what."""

    trial: optuna.Trial
    index: int
    origin: str
    plan: Plan


class Ledger:
    """The trials of one study: those in the storage, and those that run now."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        inventory: Inventory,
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
        """Trials too far below `dense_score` are not worth taking home; samplers then look elsewhere. `knowledge` is what the
        sampler "rank" starts from.

        Plans over the `limits` in size, and plans that are known already, are answered without a job; `on_untrained` is told
        of each. The limits hold `since` the trial of that number. Optuna is told the score and the ratios of the `objectives`.
        `on_note` is told why a trial that another program queued cannot be evaluated.
        """
        self.study = study
        self._space, self._inventory, self._firsts = space, inventory, initial_plans
        self._sampler, self._seed, self._dense_score = sampler, seed, dense_score
        self._knowledge = knowledge
        self._distributions = space.distributions()
        self._records = {record.number: record for record in read_trials(study)}
        trials = study.get_trials(deepcopy=False)
        self._waiting = sum(trial.state is TrialState.WAITING and read_asked(trial) is not None for trial in trials)
        """How many trials with a place are queued."""
        places = {place for trial in trials if (place := read_asked(trial))}
        self._next = 1 + max((index for index, _ in places), default=-1)
        """The index of the next trial that is not one queued again."""
        self._begun = sum(origin in {first for first, _ in initial_plans} for _, origin in places)
        """How many of the plans that are tried first have a place."""
        self._limits, self._since, self._objectives = limits, since, objectives
        self._on_untrained, self._on_note = on_untrained, on_note
        self._running: dict[int, _Open] = {}
        self._twins: list[tuple[int, _Open]] = []
        """Trials of plans that are running, with the numbers of those; they will have their answers."""

    def records(self) -> tuple[TrialRecord, ...]:
        """Every finished trial, by number: those that were in the storage at first, and those told since, by us alone."""
        return tuple(self._records[number] for number in sorted(self._records))

    def finished(self) -> int:
        """How many trials were trained to an answer; those lost with their worker have none."""
        return sum(record.trained for record in self.records())

    def recover(self) -> int:
        """Tell every trial that is left running FAIL and queue its parameters again; returns how many there were."""
        left = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in left:
            # Queued before it is told: a kill in between leaves it to be found again, not lost.
            # Parameters of a queued trial that were not all asked for yet stand in what it was queued with. One that was not
            # wholly asked for has no place yet, and asking again proposes the same.
            params = {**trial.system_attrs.get(_FIXED, {}), **trial.params}
            place = read_asked(trial)
            if place and set(self._distributions) <= set(params):
                self._queue_again(*place, params)
            elif place is None and self._fixed(trial) is not None:
                self._put_back(trial)
            self.study.tell(trial.number, state=TrialState.FAIL)
        self._running.clear()
        self._twins.clear()
        return len(left)

    def jobs(self, trials: int) -> Iterator[Job]:
        """Jobs until `trials` trials are trained or running, or `MAX_UNTRAINED` plans in a row were answered without one."""
        while self.finished() + len(self._running) < trials and self._untrained_in_a_row() < MAX_UNTRAINED:
            opened = self._ask()
            if not self._settled(opened):
                self._running[opened.trial.number] = opened
                yield Job(opened.trial.number, opened.plan, self.seed_of(opened.index))

    def receive(self, job: Job, result: Result) -> TrialRecord:
        """Tell Optuna the answer to a job, and queue it again if its worker was lost, a bounded number of times."""
        opened = self._running.pop(job.key)
        # Queued before it is told: a kill in between leaves it to be found again, not lost.
        if result.outcome is Outcome.WORKER_LOST and self._losses(opened.plan) + 1 < MAX_TRIES:
            self._queue_again(opened.index, opened.origin, opened.trial.params)
        record = self._tell(opened.trial, self._record(opened, result))
        twins = [twin for number, twin in self._twins if number == job.key]
        self._twins = [(number, twin) for number, twin in self._twins if number != job.key]
        for twin in twins:
            self._tell_known(twin, record)
        return record

    def seed_of(self, index: int) -> int:
        """The seed of the trial at an index: its sampler's, its shuffling's, its dropout's."""
        return (self._seed * 1_000_003 + index) % 2**31

    def _ask(self) -> _Open:
        while (trial := self._drawn()) and (reason := self._unfit(trial)):
            self.study.tell(trial, state=TrialState.FAIL)
            self._on_note(f"trial {trial.number}, which another program queued, is not evaluated: {reason}")
        place, queued = read_asked(trial), self._fixed(trial) is not None
        for name, kind in self._distributions.items():
            _suggest(trial, name, kind)
        if place is None:
            # Set last: a proposal without all of its parameters is made anew by the next run, at the same index.
            place = self._next, ENQUEUED if queued else self._sampler
            self._next += 1
            for key, value in asked(*place).items():
                trial.set_user_attr(key, value)
        if queued:
            admit(self.study, trial, self._sampler)
        return _Open(trial, *place, self._space.plan(trial.params))

    def _drawn(self) -> optuna.Trial:
        """The next trial: of ours that were queued again, then of those that another program queued, then of the plans that
        are tried first; or a new one, for the sampler."""
        while True:
            if not self._waiting:
                self._prepare()
            trial = self.study.ask()
            if read_asked(trial) is not None:
                self._waiting -= 1
                return trial
            if not self._waiting or self._fixed(trial) is None:
                return trial
            # Samplers see trials in the order of their numbers, so it is queued behind ours.
            self._put_back(trial)
            self.study.tell(trial, state=TrialState.FAIL)

    def _prepare(self) -> None:
        """Queue the next of the plans that are tried first, or set the sampler for a proposal."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._begun < len(self._firsts) and not waiting:
            origin, plan = self._firsts[self._begun]
            self.study.enqueue_trial(self._space.params(plan), user_attrs=asked(self._next, origin))
            self._begun, self._next, self._waiting = self._begun + 1, self._next + 1, self._waiting + 1
        else:
            self.study.sampler = make_sampler(self._sampler, seed=self.seed_of(self._next), knowledge=self._knowledge)

    def _unfit(self, trial: optuna.Trial) -> str | None:
        """Why a trial that another program queued cannot be evaluated; None if it can, and for all other trials."""
        params = self._fixed(trial)
        if params is None or read_asked(trial) is not None:
            return None
        for name, kind in self._distributions.items():
            if name not in params:
                return f"every parameter of the space must be given, but {name!r} is not"
            if not _holds(kind, params[name]):
                return f"{name!r} must be {_range(kind)}, but is {params[name]!r}"
        return None

    def _settled(self, opened: _Open) -> bool:
        """Whether the plan needs no training: it is known, or runs now, or its size alone answers for it."""
        plan, trial = opened.plan, opened.trial
        known = next((r for r in self.records() if r.plan == plan and r.outcome is Outcome.DONE), None)
        if known is None and self._losses(plan) >= MAX_TRIES:
            known = next(r for r in self.records() if r.plan == plan and r.outcome is Outcome.WORKER_LOST)
        running = next((number for number, other in self._running.items() if other.plan == plan), None)
        record = self._record(opened, Result(Outcome.OVER_BUDGET))
        if known is not None:
            self._tell_known(opened, known)
        elif running is not None:
            self._twins.append((running, opened))
        elif not plan.layers:
            # Each layer of a plan is smaller than dense in all that must shrink, so the dense plan alone is not.
            self._on_untrained(self._tell(trial, replace(record, outcome=Outcome.NOT_SMALLER)))
        elif self._limits.excess(record):
            self._on_untrained(self._tell(trial, record))
        else:
            return False
        return True

    def _tell_known(self, opened: _Open, known: TrialRecord) -> None:
        """Tell a trial what the first of the same plan found, whatever that was."""
        same_as = known.number if known.same_as is None else known.same_as
        record = replace(
            known,
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
            self.records(), self._since, waiting=[twin.trial.number for _, twin in self._twins], running=self._running
        )

    def _record(self, opened: _Open, result: Result) -> TrialRecord:
        size = size_of(opened.plan, self._inventory)
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
            # Without it a sampler spends half its trials on ever smaller models that know nothing. One constraint for every
            # trial that has a score, since "gp" wants as many of each.
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
        """How many workers were lost over a plan."""
        lost = [r for r in self._records.values() if r.outcome is Outcome.WORKER_LOST and r.same_as is None]
        return sum(record.plan == plan for record in lost)

    def _queue_again(self, index: int, origin: str, params: Mapping[str, Any]) -> None:
        waiting = [read_asked(t) for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))]
        if (index, origin) not in waiting:
            self.study.enqueue_trial(dict(params), user_attrs=asked(index, origin))
            self._waiting += 1

    def _fixed(self, trial: FrozenTrial | optuna.Trial) -> dict[str, Any] | None:
        """The parameters that a trial was queued with; None for a new one."""
        return self.study.get_trials(deepcopy=False)[trial.number].system_attrs.get(_FIXED)

    def _put_back(self, trial: FrozenTrial | optuna.Trial) -> None:
        """Queue a trial of another program again that was drawn but has no place yet."""
        params = self._fixed(trial)
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        # A run that was killed in between has queued it already.
        if not any(read_asked(other) is None and self._fixed(other) == params for other in waiting):
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
