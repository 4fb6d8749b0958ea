"""Between Optuna and the engine: asks for trials, tells their results, and loses none when a run is killed.

The Optuna study is the only state. Each trial has an index, its place in the order of asking; a trial that a killed run
left behind is told FAIL and queued again under its old index, so that what follows is what would have followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from ranksearch.factorization import METHODS
from ranksearch.layers import Inventory
from ranksearch.plan import Plan
from ranksearch.record import Outcome, Rung, TrialRecord, asked, attributes, read_asked, read_trials
from ranksearch.strategy.halving import decides, goes_on
from ranksearch.strategy.sampler import Knowledge, make_sampler
from ranksearch.strategy.space import Space
from ranksearch.strategy.trial import Answer, Job

MAX_TRIES = 3
"""A plan whose worker was lost so often is not tried again: by then the plan is the cause."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


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
        floor: float,
        knowledge: Knowledge | None = None,
        halve_below: int = 0,
    ) -> None:
        """`floor` is the score below which a trial is not worth taking home; samplers then look elsewhere. `knowledge` is
        what the sampler "rank" starts from.

        Trials may be stopped at rungs of fewer epochs than `halve_below`; 0 lets all run to their end.
        """
        self.study = study
        self._space, self._inventory, self._firsts = space, inventory, firsts
        self._sampler, self._seed, self._floor = sampler, seed, floor
        self._knowledge = knowledge
        self._distributions = space.distributions()
        self._halve_below = halve_below
        self._running: dict[int, optuna.Trial] = {}
        self._reached: dict[int, list[tuple[Rung, float]]] = {}

    def records(self) -> tuple[TrialRecord, ...]:
        """Every finished trial."""
        return read_trials(self.study)

    def finished(self) -> int:
        """How many trials have an answer; those lost with their worker have none."""
        return len(self.study.get_trials(deepcopy=False, states=FINISHED))

    def recover(self) -> int:
        """Tell every trial that is left running FAIL and queue its parameters again; returns how many there were."""
        left = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in left:
            # Queued before it is told: a kill in between leaves it to be found again, not lost.
            # Parameters of a queued trial that were not all asked for yet stand in what it was queued with.
            self._queue_again(read_asked(trial), {**trial.system_attrs.get("fixed_params", {}), **trial.params})
            self.study.tell(trial.number, state=TrialState.FAIL)
        self._running.clear()
        self._reached.clear()
        return len(left)

    def jobs(self, trials: int) -> Iterator[Job]:
        """Jobs until `trials` trials are finished or running; a plan that is not smaller is answered without one."""
        while self.finished() + len(self._running) < trials:
            trial, index, origin = self._ask()
            plan = self._space.plan(trial.params)
            # Each layer of a plan is smaller than dense in all that must shrink, so the dense plan alone is not.
            if not plan.layers:
                self._tell(trial, index, origin, plan, Answer(Outcome.NOT_SMALLER))
                continue
            self._running[trial.number] = trial
            yield Job(trial.number, plan, self.seed_of(index))

    def goes_on(self, job: Job, rung: Rung) -> bool:
        """Whether a running trial goes on after a rung, judged against all others that got there."""
        ratio = self._inventory.params / self._params(job.plan)
        self._reached.setdefault(job.key, []).append((rung, ratio))
        place = read_asked(self._running[job.key])
        assert place is not None, "a job's trial was asked for"
        # First plans are what the search is set against: cut short, they would make it look better than it is.
        if place[0] < len(self._firsts) or not decides(rung.epochs, self._halve_below):
            return True
        return goes_on(rung, ratio, self._peers(job.key, rung.epochs))

    def receive(self, job: Job, answer: Answer) -> TrialRecord:
        """Tell Optuna the answer to a job, and queue it again if its worker was lost, a bounded number of times."""
        trial = self._running.pop(job.key)
        self._reached.pop(job.key, None)
        place = read_asked(trial)
        assert place is not None, "a job's trial was asked for"
        record = self._tell(trial, *place, job.plan, answer)
        if answer.outcome is Outcome.WORKER_LOST and self._losses(record.index) < MAX_TRIES:
            self._queue_again(place, trial.params)
        return record

    def seed_of(self, index: int) -> int:
        """The seed of the trial at an index: its sampler's, its shuffling's, its dropout's."""
        return (self._seed * 1_000_003 + index) % 2**31

    def _ask(self) -> tuple[optuna.Trial, int, str]:
        trials = self.study.get_trials(deepcopy=False)
        if not any(trial.state is TrialState.WAITING for trial in trials):
            index = 1 + max((place[0] for trial in trials if (place := read_asked(trial))), default=-1)
            if index >= len(self._firsts):
                self.study.sampler = make_sampler(self._sampler, seed=self.seed_of(index), knowledge=self._knowledge)
                trial = self.study.ask(self._distributions)
                for key, value in asked(index, self._sampler).items():
                    trial.set_user_attr(key, value)
                return trial, index, self._sampler
            origin, plan = self._firsts[index]
            self.study.enqueue_trial(self._space.params(plan), user_attrs=asked(index, origin))
        trial = self.study.ask(self._distributions)
        place = read_asked(trial)
        assert place is not None, "a queued trial carries its place"
        return trial, *place

    def _peers(self, key: int, epochs: float) -> list[tuple[float, float]]:
        """(score, ratio) of every other trial, finished or running, that reached the rung of so many epochs."""
        points = [(rung, record.ratio) for record in self.records() for rung in record.curve]
        points += [point for other, reached in self._reached.items() if other != key for point in reached]
        return [(rung.score, ratio) for rung, ratio in points if rung.epochs == epochs]

    def _tell(self, trial: optuna.Trial, index: int, origin: str, plan: Plan, answer: Answer) -> TrialRecord:
        params = self._params(plan)
        record = TrialRecord(
            number=trial.number,
            index=index,
            origin=origin,
            plan=plan,
            outcome=answer.outcome,
            params=params,
            macs=self._macs(plan),
            ratio=self._inventory.params / params,
            score=answer.curve[-1].score if answer.outcome in (Outcome.DONE, Outcome.STOPPED_EARLY) else None,
            curve=answer.curve,
            seconds=answer.seconds,
            seed=self.seed_of(index),
        )
        for key, value in attributes(record).items():
            trial.set_user_attr(key, value)
        if record.score is not None:
            # Without it a sampler spends half its trials on ever smaller models that know nothing.
            trial.set_constraint("worth taking home", self._floor - record.score)
        values = (record.score, math.log10(record.ratio)) if record.score is not None else None
        self.study.tell(trial, values if record.outcome is Outcome.DONE else None, state=record.outcome.state)
        return record

    def _losses(self, index: int) -> int:
        return sum(record.index == index and record.outcome is Outcome.WORKER_LOST for record in self.records())

    def _queue_again(self, place: tuple[int, str] | None, params: Mapping[str, Any]) -> None:
        # Killed before it was wholly asked for: it has no place yet, and asking again proposes the same.
        waiting = [read_asked(t) for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))]
        if place is not None and place not in waiting and set(self._distributions) <= set(params):
            self.study.enqueue_trial(dict(params), user_attrs=asked(*place))

    def _params(self, plan: Plan) -> int:
        return self._inventory.params - sum(
            self._inventory[name].params - METHODS[type(value)].params(self._inventory[name], value.ranks)
            for name, value in plan
        )

    def _macs(self, plan: Plan) -> int:
        return self._inventory.macs - sum(
            self._inventory[name].macs - METHODS[type(value)].macs(self._inventory[name], value.ranks) for name, value in plan
        )
