"""Which trials are not fine-tuned to the end: laws of the rule, and that the study keeps to it."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.data import example
from ranksearch.factorization import METHODS
from ranksearch.layers import inventory
from ranksearch.plan import Plan, Tucker2
from ranksearch.profile import profile
from ranksearch.record import Outcome, Rung
from ranksearch.strategy.halving import LEAD, LEAD_UNTRAINED, PEERS, SIMILAR, decides, goes_on
from ranksearch.strategy.trial import Answer, Evaluator, Job
from ranksearch.study import Options, run_study
from ranksearch.training import Recipe
from tests.conftest import halving_spec, stored
from tests.test_resume import ledger_of

# Few values, so that scores and ratios tie; hundredths, so that the lead is a few steps.
SCORES = st.integers(0, 20).map(lambda value: 0.8 + value / 100)
RATIOS = st.sampled_from([4.0, 8.0, 10.0, 12.5, 16.0, 20.0, 25.0, 60.0])
POINTS = st.lists(st.tuples(SCORES, RATIOS), max_size=20)
EPOCHS = st.sampled_from([0, 1, 2, 4])


def similar(ratio, peers):
    return [(score, other) for score, other in peers if ratio / SIMILAR <= other <= ratio * SIMILAR]


@given(EPOCHS, SCORES, RATIOS, POINTS)
def test_what_no_peer_dominates_goes_on(epochs, score, ratio, peers):
    near = similar(ratio, peers)
    if not any(s >= score and r >= ratio and (s, r) != (score, ratio) for s, r in near):
        assert goes_on(Rung(epochs, score), ratio, peers)


@given(EPOCHS, SCORES, RATIOS, POINTS)
def test_what_is_stopped_is_clearly_behind_a_peer_that_is_no_larger(epochs, score, ratio, peers):
    near = similar(ratio, peers)
    if not goes_on(Rung(epochs, score), ratio, peers):
        lead = LEAD_UNTRAINED if epochs == 0 else LEAD
        assert len(near) >= PEERS
        assert any(s >= score + lead and r >= ratio for s, r in near)


@given(EPOCHS, SCORES, RATIOS, st.lists(st.tuples(SCORES, RATIOS), max_size=PEERS - 1), st.integers(0, 50))
def test_too_few_peers_stop_nothing_however_many_there_are_of_other_sizes(epochs, score, ratio, peers, others):
    far = [(1.0, ratio * SIMILAR * 1.01), (1.0, ratio / SIMILAR / 1.01)] * others
    assert goes_on(Rung(epochs, score), ratio, peers + far) or len(similar(ratio, peers)) >= PEERS


@given(EPOCHS, SCORES, RATIOS, POINTS.flatmap(lambda points: st.tuples(st.just(points), st.permutations(points))))
def test_the_order_of_peers_is_irrelevant(epochs, score, ratio, orders):
    first, second = orders
    assert goes_on(Rung(epochs, score), ratio, first) == goes_on(Rung(epochs, score), ratio, second)


@given(EPOCHS, SCORES, RATIOS, POINTS, st.integers(0, 20))
def test_a_better_score_never_stops(epochs, score, ratio, peers, more):
    if goes_on(Rung(epochs, score), ratio, peers):
        assert goes_on(Rung(epochs, score + more / 100), ratio, peers)


def test_only_a_clear_difference_stops():
    peers = [(0.95, 10.5)] * PEERS
    assert not goes_on(Rung(1, 0.90), 10.0, peers)
    assert goes_on(Rung(1, 0.93), 10.0, peers)  # noise
    assert goes_on(Rung(1, 0.90), 11.0, peers)  # smaller than they are
    assert goes_on(Rung(1, 0.90), 10.0, peers[1:])  # too few
    assert goes_on(Rung(1, 0.90), 2.0, peers)  # of another size


def test_the_better_half_goes_on():
    """Ten of one ratio, each on a front of its own: four of nine peers lead the fifth, five the sixth."""
    scores = [0.95 - 0.05 * place for place in range(10)]
    verdicts = [goes_on(Rung(1, s), 10.0, [(other, 10.0) for other in scores if other != s]) for s in scores]
    assert verdicts == [True] * 5 + [False] * 5


def test_before_any_training_only_a_huge_difference_stops():
    peers = [(0.95, 10.0)] * PEERS
    assert goes_on(Rung(0, 0.66), 10.0, peers)
    assert not goes_on(Rung(0, 0.64), 10.0, peers)
    assert goes_on(Rung(0, 0.1), 10.0, [(0.12, 10.0)] * PEERS)  # all near chance


def test_rungs_double_below_the_end():
    assert [epochs for epochs in range(20) if decides(epochs, 20)] == [0, 1, 2, 4, 8, 16]
    assert [epochs for epochs in range(20) if decides(epochs, 4)] == [0, 1, 2]
    assert [epochs for epochs in range(20) if decides(epochs, 1)] == [0]
    assert not any(decides(epochs, 0) for epochs in range(5))
    assert not decides(0.5, 4)


def jobs_of(ledger, count):
    """Jobs until there are `count` trials, all with the plan of the first: peers of equal size."""
    plan = next((record.plan for record in ledger.records()), None)
    for job in ledger.jobs(count):
        plan = plan or job.plan
        yield replace(job, plan=plan)


@pytest.fixture
def ledger():
    return ledger_of(optuna.create_study(directions=["maximize", "maximize"]), firsts=[], halve_below=3)


def fill(ledger, count, scores=(0.3, 0.9, 0.95, 0.96)):
    for job in jobs_of(ledger, count):
        rungs = tuple(Rung(epochs, score) for epochs, score in enumerate(scores))
        assert all(ledger.goes_on(job, rung) for rung in rungs)
        ledger.receive(job, Answer(Outcome.DONE, rungs))


def test_a_trial_is_judged_against_the_record(ledger):
    fill(ledger, PEERS)
    job = next(jobs_of(ledger, PEERS + 1))
    assert ledger.goes_on(job, Rung(0, 0.3))
    assert not ledger.goes_on(job, Rung(1, 0.8))
    found = ledger.receive(job, Answer(Outcome.STOPPED_EARLY, (Rung(0, 0.3), Rung(1, 0.8))))
    assert (found.outcome, found.score, found.curve) == (Outcome.STOPPED_EARLY, 0.8, (Rung(0, 0.3), Rung(1, 0.8)))
    assert ledger.study.trials[-1].state is optuna.trial.TrialState.PRUNED
    assert ledger.finished() == PEERS + 1


def test_running_and_stopped_trials_are_peers_and_lost_ones_are_not(ledger):
    *running, last = jobs_of(ledger, PEERS + 1)  # drawn, none of them answered
    for job in running:
        assert ledger.goes_on(job, Rung(1, 0.9))
    assert not ledger.goes_on(last, Rung(1, 0.8))
    ledger.receive(running[0], Answer(Outcome.STOPPED_EARLY, (Rung(0, 0.3), Rung(1, 0.9))))
    assert not ledger.goes_on(last, Rung(1, 0.8))
    ledger.receive(running[1], Answer(Outcome.WORKER_LOST))
    assert ledger.goes_on(last, Rung(1, 0.8))


def test_only_rungs_that_decide_stop(ledger):
    fill(ledger, PEERS)
    job = next(jobs_of(ledger, PEERS + 1))
    assert ledger.goes_on(job, Rung(3, 0.1))  # the end: there is nothing left to save


def test_first_plans_run_to_their_end(ledger):
    firsts = [(f"first {place}", job.plan) for place, job in enumerate(ledger.jobs(2 * PEERS))]
    ledger = ledger_of(optuna.create_study(directions=["maximize", "maximize"]), firsts=firsts, halve_below=3)
    verdicts = []
    for job in jobs_of(ledger, len(firsts) + 1):
        rungs = (Rung(0, 0.9), Rung(1, 0.9 - 0.1 * len(verdicts)))  # each worse than all before
        verdicts.append(ledger.goes_on(job, rungs[1]))
        ledger.receive(job, Answer(Outcome.DONE, rungs))
    assert verdicts == [True] * len(firsts) + [False]


def test_without_halving_nothing_is_stopped():
    ledger = ledger_of(optuna.create_study(directions=["maximize", "maximize"]), firsts=[])
    fill(ledger, PEERS)
    job = next(jobs_of(ledger, PEERS + 1))
    assert ledger.goes_on(job, Rung(1, 0.0))


@pytest.fixture(scope="module")
def evaluator(trained):
    found = inventory(trained.model, example(trained.data.train))
    layers = profile(trained.model, found, {found["conv2"].name: [METHODS[Tucker2]]})
    return Evaluator(trained, layers, Recipe(3), Recipe(3), "cpu")


JOB = Job(0, Plan.of({"conv2": Tucker2(2, 2)}), seed=0)


@pytest.mark.parametrize("stops_at", [0, 1, 2])
def test_a_trial_that_may_not_go_on_ends_with_its_curve(evaluator, stops_at):
    messages = evaluator(JOB)
    rungs = [next(messages)]
    while rungs[-1].epochs < stops_at:
        rungs.append(messages.send(True))
    answer = messages.send(False)
    assert (answer.outcome, answer.curve) == (Outcome.STOPPED_EARLY, tuple(rungs))
    assert [rung.epochs for rung in rungs] == list(range(stops_at + 1))
    assert answer.seconds > 0
    assert list(messages) == []


def test_who_is_not_answered_goes_on(evaluator):
    *rungs, answer = evaluator(JOB)
    assert (answer.outcome, answer.curve) == (Outcome.DONE, tuple(rungs))
    assert [rung.epochs for rung in rungs] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_study_with_halving(harsh, tmp_path, workers):
    spec = halving_spec(f"finalists.count={1 if workers else 22}")  # once with room for every trial
    record = run_study(spec, tmp_path / "small", Options(workers=workers))
    stopped = [trial for trial in record.trials if trial.outcome is Outcome.STOPPED_EARLY]
    assert stopped
    assert len(record.trials) == 22
    states = {trial.number: trial.state for trial in stored(tmp_path / "small").trials}
    for trial in stopped:
        assert len(trial.curve) in (1, 2)
        assert trial.score == trial.curve[-1].score
        assert trial.finalist is None
        assert states[trial.number] is optuna.trial.TrialState.PRUNED
    assert all(len(trial.curve) == 3 for trial in record.trials if trial.outcome is Outcome.DONE)
    assert not set(stopped) & set(record.front)
