"""Limits on what a study looks for, and the gates before training: sizes over a limit, plans that are known already."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ranksearch
from ranksearch.attributes import asked, read_asked
from ranksearch.errors import SpecError
from ranksearch.limits import UNLIMITED, Limits
from ranksearch.objectives import Objectives
from ranksearch.options import Options
from ranksearch.plan import Plan
from ranksearch.record import GIVE_UP, MAX_TRIES, Outcome, StudyRecord, front_of
from ranksearch.report import write_report
from ranksearch.strategy.sampler import RankSampler
from ranksearch.strategy.space import Size, check_limits, size_of
from ranksearch.strategy.trial import Answer
from ranksearch.study import run_study
from tests.books import FOUND, SPACE, TINY, Books, answer, knowledge
from tests.conftest import essence, small_spec
from tests.report.report_study import study_record
from tests.test_strategy import finalist, trial

bounds = st.none() | st.floats(0.1, 100)


def levels(space):
    kinds = space.distributions()
    each = {key: st.sampled_from(k.choices) if hasattr(k, "choices") else st.floats(0, 1) for key, k in kinds.items()}
    return st.fixed_dictionaries(each)


@given(levels(SPACE))
def test_no_plan_is_smaller_than_the_smallest(params):
    size = size_of(SPACE.plan(params), FOUND)
    assert size_of(SPACE.smallest("params"), FOUND).params <= size.params
    assert size_of(SPACE.smallest("macs"), FOUND).macs <= size.macs


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_the_smallest_plan_is_in_the_space(cost):
    plan = SPACE.smallest(cost)
    assert SPACE.plan(SPACE.params(plan)) == plan


@given(bounds, bounds, st.integers(1, 100), st.integers(1, 100), st.floats(0, 1), st.none() | st.floats(0, 1))
def test_nothing_is_in_excess_exactly_within_the_limits(min_ratio, max_params, params, macs, score, min_score):
    max_params = max_params and int(max_params) + 1
    size = Size(params, macs, 100 / params)
    within = size.ratio >= (min_ratio or 0) and params <= (max_params or 100) and score >= (min_score or 0)
    excess = Limits(min_ratio=min_ratio, max_params=max_params, min_score=min_score).excess(size, score)
    assert (excess == 0) == within
    assert excess >= 0


def smallest(cost):
    return size_of(SPACE.smallest(cost), FOUND)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"min_ratio": 1000},
            f"search.min_ratio must be at most {int(smallest('params').ratio * 100) / 100}, which the smallest plan of the space "
            "reaches, but got 1000; lower it, or widen the space.",
        ),
        (
            {"max_params": 3},
            f"search.max_params must be at least {smallest('params').params}, which the smallest plan of the space has, but "
            "got 3; raise it, or widen the space.",
        ),
        (
            {"max_macs": 7},
            f"search.max_macs must be at least {smallest('macs').macs}, which the smallest plan of the space has, but got 7; "
            "raise it, or widen the space.",
        ),
    ],
)
def test_limits_that_no_plan_keeps(limits, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        check_limits(Limits(**limits), SPACE, FOUND)


def test_what_the_messages_name_is_accepted():
    most = int(smallest("params").ratio * 100) / 100
    least = Limits(min_ratio=most, max_params=smallest("params").params)
    check_limits(least, SPACE, FOUND)
    check_limits(Limits(max_macs=smallest("macs").macs), SPACE, FOUND)
    check_limits(UNLIMITED, SPACE, FOUND)


def test_an_accuracy_above_one(tmp_path):
    with pytest.raises(SpecError, match=r"^search.min_score must be at most 1 for accuracy, but got 97; 97 % is 0.97.$"):
        run_study(small_spec("search.min_score=97"), tmp_path / "small", Options(workers=0))
    assert not (tmp_path / "small").exists()


# --- the ledger, with made-up answers ---


@settings(deadline=None, max_examples=10)
@given(
    st.floats(1, 20), st.integers(5, 30) | st.none(), st.sampled_from(["random", "tpe", "nsga2", "rank"]), st.integers(0, 99)
)
def test_no_trained_trial_breaks_a_limit_of_size(min_ratio, share, sampler, seed):
    limits = Limits(min_ratio=min_ratio, max_macs=share and FOUND.macs * share // 100)
    books = Books(limits=limits, sampler=sampler, seed=seed)
    ledger = books.run(8)
    assert len(books.trained) == 8 or ledger._untrained_in_a_row() == GIVE_UP
    assert not any(limits.excess(trial) for trial in books.trained)
    over = [trial for trial in books.untrained if trial.outcome is Outcome.OVER_BUDGET]
    assert all(limits.excess(trial) and trial.score is None and not trial.trained for trial in over)
    told = {trial.number: trial for trial in books.study.trials}
    assert all(told[trial.number].constraints == {"within the limits": limits.excess(trial)} for trial in over)
    assert all(told[trial.number].state is optuna.trial.TrialState.PRUNED for trial in over)


def test_every_scored_trial_has_one_constraint_whatever_the_limits_were():
    """Optuna's "gp" wants as many of each."""
    books = Books(TINY, sampler="gp")
    books.run(3)
    known = next(trial for trial in books.trained if trial.score is not None)
    narrow = Limits(min_ratio=known.ratio * 1.001)
    books.arguments |= {"limits": narrow, "since": len(books.study.trials)}
    # As a killed run leaves it.
    books.study.enqueue_trial(TINY.params(known.plan), user_attrs=asked(3, "gp"))
    books.run(4)
    (again,) = (trial for trial in books.untrained if trial.same_as == known.number and trial.index == 3)
    told = {trial.number: trial.constraints for trial in books.study.trials if trial.state is optuna.trial.TrialState.COMPLETE}
    assert {name for constraints in told.values() for name in constraints} == {"worth taking home"}
    assert told[again.number]["worth taking home"] >= narrow.excess(again) > 0


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.sampled_from(["random", "tpe"]))
def test_a_known_plan_has_the_record_of_its_original(seed, sampler):
    books = Books(TINY, sampler=sampler, seed=seed)
    ledger = books.run(8)  # one more than there are plans
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
    assert all(not trial.trained for trial in ledger.records()[-GIVE_UP:])
    asked = len(books.study.trials)
    books.run(1000)
    assert len(books.study.trials) == asked


# TPE takes 24 to 159 proposals, by the seed.
@pytest.mark.parametrize(("sampler", "seed"), [("random", 0), ("tpe", 8), ("nsga2", 0), ("rank", 0)])
def test_a_search_that_found_nothing_within_its_limits_goes_on_within_wider_ones(sampler, seed):
    smallest = size_of(SPACE.smallest("params"), FOUND)
    books = Books(sampler=sampler, seed=seed, limits=Limits(max_params=smallest.params))
    assert books.run(20)._untrained_in_a_row() == GIVE_UP
    asked, trained = len(books.study.trials), len(books.trained)
    books.arguments |= {"limits": Limits(max_params=3 * smallest.params), "since": asked}
    books.run(trained + 8)
    assert len(books.trained) == trained + 8
    assert not any(books.arguments["limits"].excess(trial) for trial in books.trained)
    assert len(books.study.trials) < asked + GIVE_UP


def test_the_trials_of_a_study_count_since_its_limits_changed(tmp_path):
    """Limits that leave next to nothing; then such as let in more, but none of what was turned down at first."""
    smallest = size_of(SPACE.smallest("params"), FOUND).params
    out, spec = tmp_path / "small", ["search.sampler=random", "finalists.count=1", "search.trials=20"]

    def run(most):
        return run_study(small_spec(*spec, f"search.max_params={most}"), out, Options(workers=0))

    first = run(smallest + 1)
    assert any("The search ended after" in note for note in first.notes)
    assert run(smallest + 1).trials == first.trials
    least = min(trial.params for trial in first.trials if trial.outcome is Outcome.OVER_BUDGET)
    second = run(least - 1)
    assert len(second.trials) > len(first.trials)
    assert second.facts.since == len(first.trials)


def test_what_was_over_the_limits_may_be_proposed_but_not_what_lost_too_many_workers():
    books, known = Books(TINY, limits=Limits(max_params=1)), knowledge(TINY)

    def seen():
        return RankSampler(known, seed=0)._seen([t for t in books.study.trials if t.params]) - {known.table.row(Plan())}

    books.run(1)
    assert any(trial.outcome is Outcome.OVER_BUDGET for trial in books.untrained)
    assert not seen()
    books.arguments |= {"limits": UNLIMITED, "since": len(books.study.trials)}
    ledger = books.ledger()
    for tries, job in zip(range(1, MAX_TRIES + 1), ledger.jobs(1), strict=False):
        ledger.receive(job, Answer(Outcome.WORKER_LOST))
        assert seen() == ({known.table.row(job.plan)} if tries == MAX_TRIES else set())


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "rank"])
def test_a_plan_that_lost_too_many_workers_is_not_tried_under_another_index(sampler):
    books = Books(TINY, sampler=sampler)
    ledger, tried, killer = books.ledger(), Counter(), None
    for job in ledger.jobs(100):
        killer, tried[job.plan] = killer or job.plan, tried[job.plan] + 1
        ledger.receive(job, Answer(Outcome.WORKER_LOST) if job.plan == killer else answer(job.plan))
    assert tried.pop(killer) == MAX_TRIES
    assert set(tried.values()) == {1}
    twins = [trial for trial in ledger.records() if trial.plan == killer and trial.same_as is not None]
    assert all(trial.outcome is Outcome.WORKER_LOST and not trial.trained for trial in twins)
    if sampler == "rank":
        assert len(twins) <= GIVE_UP // 2, "it knows what was lost, and proposes it by chance alone"


def test_a_trial_that_lost_its_worker_is_queued_before_it_is_told(monkeypatch):
    """A kill between the two: the next run finds both the orphan and its place in the queue, and asks for it once."""
    books = Books()
    ledger = books.ledger()
    job = next(ledger.jobs(1))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt("killed")

    for step in ("enqueue_trial", "tell"):
        with monkeypatch.context() as patch:
            patch.setattr(books.study, step, killed)
            with pytest.raises(KeyboardInterrupt, match="killed"):
                ledger.receive(job, Answer(Outcome.WORKER_LOST))
        ledger = books.ledger()
        ledger.recover()
        job = next(ledger.jobs(1))
        assert read_asked(books.study.trials[job.key]) == (0, "random")
    ledger.receive(job, answer(job.plan))
    assert [record.plan for record in books.ledger().records() if record.outcome is not Outcome.WORKER_LOST] == [job.plan]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(["random", "tpe", "rank"]), st.integers(0, 9), st.booleans())
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
    """Its population holds queued trials too: the first plans, and what was asked for again."""
    plan = SPACE.smallest("params")
    firsts = [("frontier", plan), ("vbmf", Plan.of(dict(list(plan)[:1])))]
    whole, broken = (Books(sampler="nsga2", firsts=firsts) for _ in range(2))
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
    for found in (answer(plan), Answer(Outcome.OUT_OF_MEMORY)):
        books = Books(firsts=[("first", plan), ("second", plan), ("third", other)])
        ledger = books.ledger()
        jobs = ledger.jobs(2)
        first, second = next(jobs), next(jobs)
        assert (first.plan, second.plan) == (plan, other)
        assert books.untrained == []
        record = ledger.receive(first, found)
        (twin,) = books.untrained
        assert twin == replace(record, number=twin.number, index=1, origin="second", seconds=0.0, same_as=record.number)
        ledger.receive(second, answer(other))
        assert next(jobs, None) is None
        assert ledger.finished() == 2


def test_a_twin_that_a_kill_left_is_answered_by_the_next_run():
    plan = SPACE.smallest("params")
    books = Books(firsts=[("first", plan), ("second", plan), ("third", Plan.of(dict(list(plan)[:1])))])
    jobs = books.ledger().jobs(2)
    next(jobs), next(jobs)
    ledger = books.run(2)
    assert sorted((t.index, t.same_as is not None) for t in ledger.records()) == [(0, False), (1, True), (2, False)]


# --- whole studies ---


def test_a_study_with_limits(tmp_path):
    limits = Limits(min_ratio=4.0, max_macs=40_000)
    spec = small_spec("search.min_ratio=4", "search.max_macs=40000", "search.trials=9", "finalists.count=2")
    out = tmp_path / "small"
    record = run_study(spec, out, Options(workers=0))
    assert record.facts.limits == limits
    assert sum(trial.trained for trial in record.trials) == 9
    assert not any(limits.excess(trial) for trial in record.trials if trial.trained)
    # The first plans were chosen within the limits.
    assert all(trial.origin == "tpe" for trial in record.trials if trial.outcome is Outcome.OVER_BUDGET)
    assert {"frontier"} < {trial.origin for trial in record.trials}
    assert record.front
    # Other limits are no other study; none at all, and all that was trained counts.
    best = max(trial.score for trial in record.trials if trial.trained and trial.score is not None)
    high = run_study(
        small_spec("search.trials=9", "finalists.count=2", "search.min_score=1.0", "search.min_ratio=4"),
        out,
        Options(workers=0),
    )
    assert best < 1
    assert high.front == []
    assert high.shown == high.unconstrained_front != []
    assert high.notes[0] == (
        "No model keeps the limits (min_score 1, min_ratio 4): shown is the front without them, and the nearest trials are the "
        "finalists."
    )
    assert max(t.score for t in high.trials if t.finalist) == best
    rows = json.loads((out / "front.json").read_text())
    assert [row["within_limits"] for row in rows["front"]] == [False] * len(high.shown)
    assert rows["limits"] == {"min_score": 1.0, "min_ratio": 4.0, "max_params": None, "max_macs": None}
    assert high.notes[0] in (out / "report.html").read_text()


def test_a_study_of_an_older_release_has_no_limits():
    assert study_record().facts.limits == UNLIMITED
    assert study_record().front == study_record().unconstrained_front


def test_limits_from_python(trained, tmp_path):
    record = ranksearch.search(
        trained, out=tmp_path / "mine", trials=1, min_score=0.01, min_ratio=2, max_params=4000, max_macs=60_000,
        finetune=ranksearch.Recipe(1), finalists=ranksearch.Recipe(1), finalist_count=1, options=ranksearch.Options(workers=0),
    )  # fmt: skip
    assert record.facts.limits == Limits(min_score=0.01, min_ratio=2.0, max_params=4000, max_macs=60_000)


# --- what the report says ---


def limited(**search) -> StudyRecord:
    record = study_record()
    return replace(record, facts=replace(record.facts, spec=dict(record.facts.spec) | {"search": search}))


def charts(folder):
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])["chart-front"]


def test_the_report_draws_the_limits(tmp_path):
    record = limited(min_score=0.95, min_ratio=2.0, max_params=400_000)
    assert record.front
    assert all(t.ratio >= 2 and t.params <= 400_000 and t.score_validation >= 0.95 for t in record.front)
    write_report(record, tmp_path)
    sets = charts(tmp_path)["datasets"]
    assert sets["least score"] == [{"score": 0.95}]
    assert sets["least ratio"] == [{"ratio": record.facts.dense.params / 400_000}]
    assert "min_score 0.95, min_ratio 2, max_params 400,000" in (tmp_path / "report.html").read_text()


def test_limits_outside_the_picture_are_not_drawn(tmp_path):
    write_report(limited(min_score=0.2, min_ratio=1e6), tmp_path)
    sets = charts(tmp_path)["datasets"]
    assert sets["least score"] == sets["least ratio"] == []


def test_the_report_counts_what_was_not_trained():
    record = limited(trials=60)
    (over,) = [trial for trial in record.trials if trial.outcome is Outcome.OVER_BUDGET]
    twin = replace(record.trials[0], number=45, index=45, same_as=0, finalist=None)
    notes = replace(record, trials=(*record.trials, twin)).notes
    assert notes == [
        "Proposals over the limits, which were not trained: 1.",
        "Proposals of a plan that was known already, answered from the record: 1.",
    ]
    many = tuple(replace(over, number=50 + i, index=50 + i) for i in range(GIVE_UP))
    trained = sum(trial.trained for trial in record.trials)
    ended = replace(limited(trials=60, max_params=over.params - 1), trials=(*record.trials, *many))
    assert ended.notes[0] == (
        f"The search ended after {trained} of 60 trials: 100 proposals in a row were over the limits or known already; widen "
        "the limits or the space."
    )
    since = replace(ended.facts, since=many[1].number)
    assert not any("ended after" in note for note in replace(ended, facts=since).notes)


def test_a_twin_is_drawn_once(tmp_path):
    record = study_record()
    twin = replace(record.trials[0], number=45, index=45, same_as=0, finalist=None)
    for name, trials in (("with", (*record.trials, twin)), ("without", record.trials)):
        write_report(replace(record, trials=trials), tmp_path / name)
    assert charts(tmp_path / "with") == charts(tmp_path / "without")
    assert (tmp_path / "with" / "front.csv").read_bytes() == (tmp_path / "without" / "front.csv").read_bytes()


def test_trials_within_the_limits_are_shown_before_finalists_outside():
    objectives = Objectives(("params",), 1000)
    small, large = trial(0, 0.8, 6.0), trial(1, 0.9, 2.0, finalist=finalist(0.95))
    assert front_of([small, large], objectives) == [large]
    assert front_of([small, large], objectives, Limits(min_ratio=5)) == [small]
