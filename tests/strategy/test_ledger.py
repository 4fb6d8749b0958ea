"""The ledger with made-up results: it asks, tells and queues again, over kills and changes of limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.plan import SVD, Plan
from ranksearch.results.attributes import asked, read_asked
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.messages import Outcome, Result
from ranksearch.results.trials import MAX_TRIES, MAX_UNTRAINED
from ranksearch.strategy.sampler import RankSampler
from ranksearch.strategy.space import size_of
from tests.books import FOUND, SPACE, TINY, Books, knowledge, result
from tests.conftest import essence

MANY = 30
ends_soon, ends_later = (patch("ranksearch.strategy.ledger.MAX_UNTRAINED", many) for many in (15, MANY))
"""End a search after 15 untrained proposals in a row instead of 100, to save time."""


@settings(deadline=None, max_examples=10)
@given(
    st.floats(1, 20), st.integers(5, 30) | st.none(), st.sampled_from(["random", "tpe", "nsga2", "rank"]), st.integers(0, 99)
)
def test_no_trained_trial_breaks_a_limit_of_size(min_ratio, share, sampler, seed):
    limits = Limits(min_ratio=min_ratio, max_costs={"macs": FOUND.macs * share // 100} if share else {})
    books = Books(limits=limits, sampler=sampler, seed=seed)
    ledger = books.run(8)
    assert len(books.trained) == 8 or ledger._untrained_in_a_row() == MAX_UNTRAINED
    assert not any(limits.excess(trial) for trial in books.trained)
    over = [trial for trial in books.untrained if trial.outcome is Outcome.OVER_BUDGET]
    assert all(limits.excess(trial) and trial.score is None and not trial.trained for trial in over)
    told = {trial.number: trial for trial in books.study.trials}
    assert all(told[trial.number].constraints == {"within the limits": limits.excess(trial)} for trial in over)
    assert all(told[trial.number].state is optuna.trial.TrialState.PRUNED for trial in over)


@pytest.mark.slow
@patch("ranksearch.strategy.ledger.MAX_UNTRAINED", 2)
def test_every_scored_trial_has_one_constraint_whatever_the_limits_were():
    """Optuna's "gp" needs the same constraints on all trials."""
    books = Books(TINY, sampler="gp")
    books.run(3)
    known = next(trial for trial in books.trained if trial.score is not None)
    narrow = Limits(min_ratio=known.ratio * 1.001)
    books.arguments |= {"limits": narrow, "since": len(books.study.trials)}
    # As a killed run leaves a trial to be asked for again.
    books.study.enqueue_trial(TINY.params(known.plan), user_attrs=asked(3, "gp"))
    books.run(4)
    (again,) = (trial for trial in books.untrained if trial.same_as == known.number and trial.index == 3)
    told = {trial.number: trial.constraints for trial in books.study.trials if trial.state is optuna.trial.TrialState.COMPLETE}
    assert {name for constraints in told.values() for name in constraints} == {"worth taking home"}
    assert told[again.number]["worth taking home"] >= narrow.excess(again) > 0


@ends_soon
@settings(deadline=None, max_examples=5)
@given(st.integers(0, 99), st.sampled_from(["random", "tpe"]))
def test_a_known_plan_has_the_record_of_its_original(seed, sampler):
    books = Books(TINY, sampler=sampler, seed=seed)
    ledger = books.run(8)  # one more than the space has plans
    records = {trial.number: trial for trial in ledger.records()}
    twins = [trial for trial in records.values() if trial.same_as is not None]
    assert twins
    for twin in twins:
        original = records[twin.same_as]
        assert original.same_as is None
        assert original.seconds == 2.5
        assert twin == replace(
            original, number=twin.number, index=twin.index, origin=twin.origin, same_as=original.number, seconds=0.0
        )
        assert books.study.trials[twin.number].values == books.study.trials[original.number].values
    done = [trial.plan for trial in books.trained if trial.outcome is Outcome.DONE]
    assert len(done) == len(set(done))


def test_a_search_that_finds_nothing_new_ends():
    books = Books(TINY)
    ledger = books.run(1000)
    assert ledger.finished() == len(books.trained) < 1000
    assert all(not trial.trained for trial in ledger.records()[-MAX_UNTRAINED:])
    asked = len(books.study.trials)
    books.run(1000)
    assert len(books.study.trials) == asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "seed", "many"),
    [("random", 0, MAX_UNTRAINED), ("tpe", 8, MAX_UNTRAINED), ("nsga2", 0, MAX_UNTRAINED), ("rank", 0, MANY)],
)
def test_a_search_that_found_nothing_within_its_limits_goes_on_within_wider_ones(monkeypatch, sampler, seed, many):
    monkeypatch.setattr("ranksearch.strategy.ledger.MAX_UNTRAINED", many)
    smallest = size_of(SPACE.smallest("params"), FOUND)
    books = Books(sampler=sampler, seed=seed, limits=Limits(max_costs={"params": smallest.params}))
    assert books.run(20)._untrained_in_a_row() == many
    asked, trained = len(books.study.trials), len(books.trained)
    books.arguments |= {"limits": Limits(max_costs={"params": 5 * smallest.params}), "since": asked}
    books.run(trained + 8)
    assert len(books.trained) == trained + 8
    assert not any(books.arguments["limits"].excess(trial) for trial in books.trained)
    assert len(books.study.trials) < asked + many


def test_plans_over_the_limits_may_be_proposed_again_but_not_those_that_lost_too_many_workers():
    books, known = Books(TINY, limits=Limits(max_costs={"params": 1})), knowledge(TINY)

    def seen():
        return RankSampler(known, seed=0)._seen([t for t in books.study.trials if t.params]) - {known.table.row(Plan())}

    books.run(1)
    assert any(trial.outcome is Outcome.OVER_BUDGET for trial in books.untrained)
    assert not seen()
    books.arguments |= {"limits": UNLIMITED, "since": len(books.study.trials)}
    ledger = books.ledger()
    for tries, job in zip(range(1, MAX_TRIES + 1), ledger.jobs(1), strict=False):
        ledger.receive(job, Result(Outcome.WORKER_LOST))
        assert seen() == ({known.table.row(job.plan)} if tries == MAX_TRIES else set())


@pytest.mark.slow
@ends_later
@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "rank"])
def test_a_plan_that_lost_too_many_workers_is_not_tried_under_another_index(sampler):
    books = Books(TINY, sampler=sampler)
    ledger, tried, killer = books.ledger(), Counter(), None
    for job in ledger.jobs(100):
        killer, tried[job.plan] = killer or job.plan, tried[job.plan] + 1
        ledger.receive(job, Result(Outcome.WORKER_LOST) if job.plan == killer else result(job.plan))
    assert tried.pop(killer) == MAX_TRIES
    assert set(tried.values()) == {1}
    twins = [trial for trial in ledger.records() if trial.plan == killer and trial.same_as is not None]
    assert all(trial.outcome is Outcome.WORKER_LOST and not trial.trained for trial in twins)
    if sampler == "rank":
        assert len(twins) <= MANY // 2, "it knows what was lost, and proposes it by chance alone"


def test_a_trial_that_lost_its_worker_is_queued_before_it_is_told(monkeypatch):
    """After a kill between the two, the next run finds the trial running and queued, and asks for it once."""
    books = Books()
    ledger = books.ledger()
    job = next(ledger.jobs(1))
    for step in ("enqueue_trial", "tell"):
        with monkeypatch.context() as patch:
            patch.setattr(books.study, step, killed)
            with pytest.raises(KeyboardInterrupt, match="killed"):
                ledger.receive(job, Result(Outcome.WORKER_LOST))
        ledger = books.ledger()
        ledger.recover()
        job = next(ledger.jobs(1))
        assert read_asked(books.study.trials[job.key]) == (0, "random")
    ledger.receive(job, result(job.plan))
    assert [record.plan for record in books.ledger().records() if record.outcome is not Outcome.WORKER_LOST] == [job.plan]


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize(
    "sampler", ["random", pytest.param("tpe", marks=pytest.mark.slow), pytest.param("rank", marks=pytest.mark.slow)]
)
@ends_soon
@settings(deadline=None, max_examples=2)
@given(kills=st.lists(st.integers(0, 4), max_size=4), seed=st.integers(0, 9))
def test_killed_and_resumed_equals_uninterrupted(kills, sampler, seed, tiny):
    space, limits = (TINY, Limits(min_ratio=1.01)) if tiny else (SPACE, Limits(min_ratio=6.0))
    whole, broken = (Books(space, limits=limits, sampler=sampler, seed=seed) for _ in range(2))
    whole.run(6)
    for kill in kills:
        broken.run(6, kill_after=kill)
    broken.run(6)
    assert essence(broken.ledger().records()) == essence(whole.ledger().records())


@pytest.mark.parametrize("kill", [2, 21, 25])
def test_killed_and_resumed_equals_uninterrupted_over_the_generations_of_nsga2(kill):
    """Queued trials belong to its population too: initial plans, and trials that were queued again."""
    plan = SPACE.smallest("params")
    initial_plans = [("frontier", plan), ("vbmf", Plan.of(dict(list(plan)[:1])))]
    whole, broken = (Books(sampler="nsga2", initial_plans=initial_plans) for _ in range(2))
    whole.run(30)
    broken.run(30, kill_after=kill)
    broken.run(30)
    assert essence(broken.ledger().records()) == essence(whole.ledger().records())
    generations = [trial.system_attrs.get("NSGAIISampler:generation") for trial in whole.study.trials]
    assert None not in generations
    assert max(generations) > 0


def test_a_plan_that_runs_now_is_not_trained_beside_itself():
    plan = SPACE.smallest("params")
    other = Plan.of(dict(list(plan)[:1]))
    for found in (result(plan), Result(Outcome.OUT_OF_MEMORY)):
        books = Books(initial_plans=[("first", plan), ("second", plan), ("third", other)])
        ledger = books.ledger()
        jobs = ledger.jobs(2)
        first, second = next(jobs), next(jobs)
        assert (first.plan, second.plan) == (plan, other)
        assert books.untrained == []
        record = ledger.receive(first, found)
        (twin,) = books.untrained
        assert twin == replace(record, number=twin.number, index=1, origin="second", seconds=0.0, same_as=record.number)
        ledger.receive(second, result(other))
        assert next(jobs, None) is None
        assert ledger.finished() == 2


def test_a_twin_that_a_kill_left_is_answered_by_the_next_run():
    plan = SPACE.smallest("params")
    books = Books(initial_plans=[("first", plan), ("second", plan), ("third", Plan.of(dict(list(plan)[:1])))])
    jobs = books.ledger().jobs(2)
    next(jobs), next(jobs)
    ledger = books.run(2)
    assert sorted((t.index, t.same_as is not None) for t in ledger.records()) == [(0, False), (1, True), (2, False)]


# --- trials that another program queued ---

INITIAL_PLANS = [("frontier", Plan.of({"fc1": SVD(rank)})) for rank in (2, 4)]
MINE = Plan.of({"fc1": SVD(3)})


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_trial_that_another_program_queued_has_the_next_index(at):
    """It is trained like others. All initial plans are still tried, and earlier trials stay as they were."""
    alone, disturbed = (Books(sampler="rank", initial_plans=INITIAL_PLANS) for _ in range(2))
    alone.run(5)
    disturbed.run(at)
    disturbed.study.enqueue_trial(SPACE.params(MINE))
    ledger = disturbed.run(5)
    assert [(trial.index, trial.origin) for trial in ledger.records()] == [
        (index, "enqueued" if index == at else "frontier" if index < 2 + (at < 2) else "rank") for index in range(5)
    ]
    assert ledger.records()[at].plan == MINE
    assert ledger.records()[at].score == result(MINE).curve[-1].score
    assert essence(ledger.records()[:at]) == essence(alone.ledger().records()[:at])
    initial_plans = [trial.plan for trial in ledger.records() if trial.origin == "frontier"]
    assert initial_plans == [plan for _, plan in INITIAL_PLANS]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=4), st.sampled_from(["random", "tpe", "nsga2", "rank"]))
def test_killed_and_resumed_equals_uninterrupted_with_a_trial_of_another_program(at, kills, sampler):
    """Even if it was queued before the killed trial is queued again, and so precedes it in Optuna's queue."""

    def run(kills):
        books, ledgers = Books(sampler=sampler, initial_plans=INITIAL_PLANS), []
        for kill in (*kills, None):
            ledgers.append(books.ledger())
            ledgers[-1].recover()
            for count, job in enumerate(ledgers[-1].jobs(6)):
                if ledgers[-1].finished() == at and len(books.queued) == 0:
                    books.queued.append(books.study.enqueue_trial(SPACE.params(MINE)))
                if count == kill:
                    break
                ledgers[-1].receive(job, result(job.plan))
        return books.ledger().records()

    whole = run([])
    assert essence(run(kills)) == essence(whole)
    assert [trial.plan for trial in whole if trial.origin == "enqueued"] == [MINE]


BAD = [
    ({}, "every parameter of the space must be given, but 'conv1.method' is not"),
    ({"conv2.cp.rank": None}, "every parameter of the space must be given, but 'conv2.cp.rank' is not"),
    ({"conv2.cp.rank": 1.5}, "'conv2.cp.rank' must be a number from 0 to 1, but is 1.5"),
    ({"conv2.cp.rank": "high"}, "'conv2.cp.rank' must be a number from 0 to 1, but is 'high'"),
    ({"fc2.method": "cp"}, "'fc2.method' must be one of dense, svd, but is 'cp'"),
]


@pytest.mark.parametrize("change", range(len(BAD)))
def test_parameters_that_the_space_does_not_hold_are_told_in_words(change):
    changed, reason = BAD[change]
    params = {**SPACE.params(MINE), **changed} if changed else {}
    books, said = Books(sampler="rank", initial_plans=INITIAL_PLANS), []
    books.arguments["on_note"] = said.append
    books.run(1)
    books.study.enqueue_trial({name: value for name, value in params.items() if value is not None})
    ledger = books.run(4)
    assert said == [f"trial 1, which another program queued, is not evaluated: {reason}"]
    assert books.study.trials[1].state is optuna.trial.TrialState.FAIL
    alone = Books(sampler="rank", initial_plans=INITIAL_PLANS)
    assert essence(ledger.records()) == essence(alone.run(4).records())


def test_a_trial_of_another_program_is_not_lost_by_a_kill(monkeypatch):
    """A kill after the trial is drawn from the queue and before it has an index; it is tried once all the same."""
    books = Books()
    books.study.enqueue_trial(SPACE.params(MINE), user_attrs={"why": "a guess"})
    for name in ("_suggest", "asked"):
        with monkeypatch.context() as patch:
            patch.setattr(f"ranksearch.strategy.ledger.{name}", killed)
            with pytest.raises(KeyboardInterrupt, match="killed"):
                books.run(1)
    with monkeypatch.context() as patch:
        patch.setattr(books.study, "tell", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            books.ledger().recover()
    ledger = books.run(2)
    assert [(trial.index, trial.origin) for trial in ledger.records()] == [(0, "enqueued"), (1, "random")]
    assert books.study.trials[ledger.records()[0].number].user_attrs["why"] == "a guess"


def killed(*args, **kwargs):
    raise KeyboardInterrupt("killed")
