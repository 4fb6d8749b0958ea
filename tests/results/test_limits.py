"""Limits of a study, and the checks before training: plans over a limit of size, plans that were tried already."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ranksearch
from ranksearch.errors import SpecError
from ranksearch.report import write_report
from ranksearch.results.choosing import front_of
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.messages import Outcome
from ranksearch.results.objectives import Objectives
from ranksearch.results.record import StudyRecord
from ranksearch.results.trials import MAX_UNTRAINED
from ranksearch.strategy.bases import Bases, check_limits
from ranksearch.strategy.space import Size, size_of
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests.books import FOUND, SPACE, finalist, trial
from tests.conftest import small_spec
from tests.report_study import study_record

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
    size = Size({"params": params, "macs": macs}, 100 / params)
    within = size.ratio >= (min_ratio or 0) and params <= (max_params or 100) and score >= (min_score or 0)
    excess = Limits(min_ratio=min_ratio, max_costs={"params": max_params} if max_params else {}, min_score=min_score).excess(
        size, score
    )
    assert (excess == 0) == within
    assert excess >= 0


def smallest(cost):
    return size_of(SPACE.smallest(cost), FOUND)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"min_ratio": 1000},
            f"search.min_ratio must be at most {int(smallest('params').ratio * 100) / 100}, the ratio of the smallest plan in the "
            "space, but got 1000; lower it, or widen the space.",
        ),
        (
            {"max_params": 3},
            f"search.max_params must be at least {smallest('params').params}, that of the smallest plan in the space, but "
            "got 3; raise it, or widen the space.",
        ),
        (
            {"max_macs": 7},
            f"search.max_macs must be at least {smallest('macs').macs}, that of the smallest plan in the space, but got 7; "
            "raise it, or widen the space.",
        ),
    ],
)
def test_limits_that_no_plan_keeps(limits, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        check_limits(Limits.of(limits), Bases.of(SPACE, FOUND))


def test_what_the_messages_name_is_accepted():
    most = int(smallest("params").ratio * 100) / 100
    least = Limits(min_ratio=most, max_costs={"params": smallest("params").params})
    check_limits(least, Bases.of(SPACE, FOUND))
    check_limits(Limits(max_costs={"macs": smallest("macs").macs}), Bases.of(SPACE, FOUND))
    check_limits(UNLIMITED, Bases.of(SPACE, FOUND))


def test_an_accuracy_above_one(tmp_path):
    with pytest.raises(SpecError, match=r"^search.min_score must be at most 1 for accuracy, but got 97; 97 % is 0.97.$"):
        run_study(small_spec("search.min_score=97"), tmp_path / "small", Options(Local(0)))
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_the_trials_of_a_study_count_since_its_limits_changed(bare, tmp_path):
    """First limits that almost no plan keeps; then wider ones that still exclude all plans refused before."""
    smallest = size_of(SPACE.smallest("params"), FOUND).params
    out, spec = tmp_path / "small", ["dense.epochs=1", "search.sampler=random", "finalists.count=1", "search.trials=20"]

    def run(most):
        return run_study(small_spec(*spec, f"search.max_params={most}"), out, Options(Local(0)))

    first = run(smallest + 1)
    assert any("The search ended after" in note for note in first.notes)
    assert run(smallest + 1).trials == first.trials
    least = min(trial.params for trial in first.trials if trial.outcome is Outcome.OVER_BUDGET)
    second = run(least - 1)
    assert len(second.trials) > len(first.trials)
    assert second.facts.since == len(first.trials)


# --- whole studies ---


@pytest.mark.slow
def test_a_study_with_limits(tmp_path):
    limits = Limits(min_ratio=4.0, max_costs={"macs": 40_000})
    spec = small_spec("search.min_ratio=4", "search.max_macs=40000", "search.trials=9", "finalists.count=2")
    out = tmp_path / "small"
    record = run_study(spec, out, Options(Local(0)))
    assert record.facts.limits == limits
    assert sum(trial.trained for trial in record.trials) == 9
    assert not any(limits.excess(trial) for trial in record.trials if trial.trained)
    # All initial plans are within the limits.
    assert all(trial.origin == "tpe" for trial in record.trials if trial.outcome is Outcome.OVER_BUDGET)
    assert {"frontier"} < {trial.origin for trial in record.trials}
    assert record.front
    # Other limits make no other study; without limits of size, all trained trials count.
    best = max(trial.score for trial in record.trials if trial.trained and trial.score is not None)
    high = run_study(
        small_spec("search.trials=9", "finalists.count=2", "search.min_score=1.0", "search.min_ratio=4"),
        out,
        Options(Local(0)),
    )
    assert best < 1
    assert high.front == []
    assert high.shown == high.unconstrained_front != []
    assert high.notes[0] == (
        "No model keeps the limits (min_score 1, min_ratio 4). The front is shown without them, and the finalists are the trials "
        "nearest to them."
    )
    assert max(t.score for t in high.trials if t.finalist) == best
    rows = json.loads((out / "front.json").read_text())
    assert [row["within_limits"] for row in rows["front"]] == [False] * len(high.shown)
    assert rows["limits"] == {"min_score": 1.0, "min_ratio": 4.0, "max_params": None, "max_macs": None, "max_latency_ms": None}
    assert high.notes[0] in (out / "report.html").read_text()


def test_a_study_without_limits_has_one_front():
    assert study_record().facts.limits == UNLIMITED
    assert study_record().front == study_record().unconstrained_front


def test_limits_from_python(bare, trained, tmp_path):
    record = ranksearch.search(
        trained, out=tmp_path / "mine", finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1),
        search=ranksearch.Search(trials=1, min_score=0.01, min_ratio=2, max_params=4000, max_macs=60_000), engine=ranksearch.Local(0),
    )  # fmt: skip
    assert record.facts.limits == Limits(min_score=0.01, min_ratio=2.0, max_costs={"params": 4000, "macs": 60_000})


# --- the report ---


def limited(**search) -> StudyRecord:
    record = study_record()
    return replace(
        record, facts=replace(record.facts, spec=dict(record.facts.spec) | {"search": record.facts.spec["search"] | search})
    )


def charts(folder):
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])["chart-front"]


def test_the_report_draws_the_limits(tmp_path):
    record = limited(min_score=0.95, min_ratio=2.0, max_params=400_000)
    assert record.front
    assert all(t.ratio >= 2 and t.params <= 400_000 and t.score_validation >= 0.95 for t in record.front)
    write_report(record, tmp_path)
    sets = charts(tmp_path)["datasets"]
    assert sets["min score"] == [{"score": 0.95}]
    assert sets["min ratio"] == [{"ratio": record.facts.dense.params / 400_000}]
    assert "min_score 0.95, min_ratio 2, max_params 400,000" in (tmp_path / "report.html").read_text()


def test_limits_outside_the_picture_are_not_drawn(tmp_path):
    write_report(limited(min_score=0.2, min_ratio=1e6), tmp_path)
    sets = charts(tmp_path)["datasets"]
    assert sets["min score"] == sets["min ratio"] == []


def test_the_report_counts_what_was_not_trained():
    record = limited(trials=60)
    (over,) = [trial for trial in record.trials if trial.outcome is Outcome.OVER_BUDGET]
    twin = replace(record.trials[0], number=45, index=45, same_as=0, finalist=None)
    notes = replace(record, trials=(*record.trials, twin)).notes
    assert notes == [
        "Proposals over the limits, not trained: 1.",
        "Proposals that repeated an earlier plan, not trained again: 1.",
    ]
    many = tuple(replace(over, number=50 + i, index=50 + i) for i in range(MAX_UNTRAINED))
    trained = sum(trial.trained for trial in record.trials)
    ended = replace(limited(trials=60, max_params=over.params - 1), trials=(*record.trials, *many))
    assert ended.notes[0] == (
        f"The search ended after {trained} of 60 trials: 100 proposals in a row were over the limits or repeated an earlier plan; "
        "widen the limits or the space."
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
    objectives = Objectives(("params",), {"params": 100})
    small, large = trial(0, 0.8, 6.0), trial(1, 0.9, 2.0, finalist=finalist(0.95))
    assert front_of([small, large], objectives) == [large]
    assert front_of([small, large], objectives, Limits(min_ratio=5)) == [small]
