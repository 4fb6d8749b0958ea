"""Between Optuna and the engine: asks for trials, tells their results, and loses none when a run is killed.

The Optuna study is the only state. Each trial has an index, its place in the order of asking; a trial that a killed run
left behind is told FAIL and queued again under its old index, so that what follows is what would have followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import TrialState

from ranksearch.attributes import asked, read_asked, read_trials, write_trial
from ranksearch.layers import Inventory
from ranksearch.limits import Limits
from ranksearch.objectives import Objectives
from ranksearch.plan import Plan
from ranksearch.record import GIVE_UP, MAX_TRIES, Outcome, TrialRecord, untrained_in_a_row
from ranksearch.strategy.finalists import floor_of
from ranksearch.strategy.sampler import WITHIN, Knowledge, admit, make_sampler
from ranksearch.strategy.space import Space, size_of
from ranksearch.strategy.trial import Answer, Job


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
        firsts: Sequence[tuple[str, Plan]],
        *,
        sampler: str,
        seed: int,
        dense_score: float,
        limits: Limits,
        objectives: Objectives,
        since: int = 0,
        knowledge: Knowledge | None = None,
        on_untrained: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        """Trials too far below `dense_score` are not worth taking home; samplers then look elsewhere. `knowledge` is what the
        sampler "rank" starts from.

        Plans over the `limits` in size, and plans that are known already, are answered without a job; `on_untrained` is told
        of each. The limits hold `since` the trial of that number. Optuna is told the score and the ratios of the `objectives`.
        """
        self.study = study
        self._space, self._inventory, self._firsts = space, inventory, firsts
        self._sampler, self._seed, self._dense_score = sampler, seed, dense_score
        self._knowledge = knowledge
        self._distributions = space.distributions()
        self._records = {record.number: record for record in read_trials(study)}
        trials = study.get_trials(deepcopy=False)
        self._waiting = sum(trial.state is TrialState.WAITING and read_asked(trial) is not None for trial in trials)
        self._next = 1 + max((place[0] for trial in trials if (place := read_asked(trial))), default=-1)
        """The index of the next trial that is not one queued again."""
        self._limits, self._since, self._objectives, self._on_untrained = limits, since, objectives, on_untrained
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
            params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if (place := read_asked(trial)) and set(self._distributions) <= set(params):
                self._queue_again(*place, params)
            self.study.tell(trial.number, state=TrialState.FAIL)
        self._running.clear()
        self._twins.clear()
        return len(left)

    def jobs(self, trials: int) -> Iterator[Job]:
        """Jobs until `trials` trials are trained or running, or `GIVE_UP` plans in a row were answered without one."""
        while self.finished() + len(self._running) < trials and self._untrained_in_a_row() < GIVE_UP:
            opened = self._ask()
            if not self._answered(opened):
                self._running[opened.trial.number] = opened
                yield Job(opened.trial.number, opened.plan, self.seed_of(opened.index))

    def receive(self, job: Job, answer: Answer) -> TrialRecord:
        """Tell Optuna the answer to a job, and queue it again if its worker was lost, a bounded number of times."""
        opened = self._running.pop(job.key)
        # Queued before it is told: a kill in between leaves it to be found again, not lost.
        if answer.outcome is Outcome.WORKER_LOST and self._losses(opened.plan) + 1 < MAX_TRIES:
            self._queue_again(opened.index, opened.origin, opened.trial.params)
        record = self._tell(opened.trial, self._record(opened, answer))
        twins = [twin for number, twin in self._twins if number == job.key]
        self._twins = [(number, twin) for number, twin in self._twins if number != job.key]
        for twin in twins:
            self._tell_known(twin, record)
        return record

    def seed_of(self, index: int) -> int:
        """The seed of the trial at an index: its sampler's, its shuffling's, its dropout's."""
        return (self._seed * 1_000_003 + index) % 2**31

    def _ask(self) -> _Open:
        if self._waiting:
            self._waiting -= 1
        else:
            index = self._next
            self._next += 1
            if index >= len(self._firsts):
                return self._propose(index)
            origin, plan = self._firsts[index]
            self.study.enqueue_trial(self._space.params(plan), user_attrs=asked(index, origin))
        trial = self._drawn()
        place = read_asked(trial)
        assert place is not None, "a queued trial carries its place"
        admit(self.study, trial, self._sampler)
        return _Open(trial, *place, self._space.plan(trial.params))

    def _propose(self, index: int) -> _Open:
        self.study.sampler = make_sampler(self._sampler, seed=self.seed_of(index), knowledge=self._knowledge)
        trial = self._drawn()
        for key, value in asked(index, self._sampler).items():
            trial.set_user_attr(key, value)
        return _Open(trial, index, self._sampler, self._space.plan(trial.params))

    def _drawn(self) -> optuna.Trial:
        """The next trial. One that another hand queued has no place in the order: it is told FAIL, and the next is drawn."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        others = {trial.number for trial in waiting if read_asked(trial) is None}
        while (trial := self.study.ask(self._distributions)).number in others:
            self.study.tell(trial, state=TrialState.FAIL)
        return trial

    def _answered(self, opened: _Open) -> bool:
        """Whether the plan needs no training: it is known, or runs now, or its size alone answers for it."""
        plan, trial = opened.plan, opened.trial
        known = next((r for r in self.records() if r.plan == plan and r.outcome is Outcome.DONE), None)
        if known is None and self._losses(plan) >= MAX_TRIES:
            known = next(r for r in self.records() if r.plan == plan and r.outcome is Outcome.WORKER_LOST)
        running = next((number for number, other in self._running.items() if other.plan == plan), None)
        record = self._record(opened, Answer(Outcome.OVER_BUDGET))
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

    def _record(self, opened: _Open, answer: Answer) -> TrialRecord:
        size = size_of(opened.plan, self._inventory)
        return TrialRecord(
            number=opened.trial.number,
            index=opened.index,
            origin=opened.origin,
            plan=opened.plan,
            outcome=answer.outcome,
            params=size.params,
            macs=size.macs,
            ratio=size.ratio,
            score=answer.curve[-1].score if answer.outcome is Outcome.DONE else None,
            curve=answer.curve,
            seconds=answer.seconds,
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
            trial.set_constraint(WITHIN, excess)
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
