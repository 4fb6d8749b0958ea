"""Laws of the report's derived figures, texts and chart data."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ranksearch.report import charts, figures, points, summary, text
from ranksearch.results import pareto
from ranksearch.results.messages import CurvePoint, Outcome
from tests.report_study import study_record

RECORD = study_record()
scores = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20)


@given(scores)
def test_spearman_equals_scipy(pairs):
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(figures.spearman(first, second))
    else:
        assert figures.spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_hypervolume_never_falls_and_ends_at_that_of_all():
    values = [value for _, value in figures.hypervolumes(RECORD)]
    assert values == sorted(values)
    done = [(t.score, math.log10(t.ratio)) for t in RECORD.trials if t.outcome is Outcome.DONE]
    reference = (RECORD.facts.dense.score_validation - 0.10, 0)
    assert values[-1] == pytest.approx(pareto.hypervolume(done, reference))


def test_hypervolume_is_above_the_best_trial_where_none_reaches_the_dense_model():
    lowered = replace(RECORD, trials=tuple(replace(t, score=t.score and t.score - 0.3, finalist=None) for t in RECORD.trials))
    alone, whole = figures.hypervolume_gain(lowered)
    assert 0 < alone <= whole
    assert summary.worst_that_counts(RECORD) == "10 points worse than the dense one"
    assert summary.worst_that_counts(lowered) == "10 points worse than the best trial, as none reaches the dense one,"


def test_one_point_below_dense_counts_as_near():
    facts = replace(RECORD.facts, dense=replace(RECORD.facts.dense, score_validation=0.98))
    trial = replace(RECORD.front[0], finalist=None, score=0.97)
    assert figures.near_dense(replace(RECORD, facts=facts, trials=(trial,))) is trial
    assert figures.near_dense(replace(RECORD, facts=facts, trials=(replace(trial, score=0.9699),))) is None


def test_correlations_need_three_trials_that_got_to_the_end():
    assert [entry.epochs for entry in figures.curve_correlations(RECORD)] == [0, 1, 3]
    assert all(entry.trials == len(figures.scored(RECORD.trials)) for entry in figures.curve_correlations(RECORD))
    assert figures.curve_correlations(replace(RECORD, trials=figures.scored(RECORD.trials)[:2])) == []


def test_unfinished_trials_are_in_no_correlation_and_in_no_front_chart():
    trials = tuple(replace(t, outcome=Outcome.DIVERGED, score=None, finalist=None) for t in RECORD.trials if t.curve)
    assert figures.curve_correlations(replace(RECORD, trials=trials)) == []
    assert [row["kind"] for row in points.front_points(replace(RECORD, trials=trials), "params")] == [points.DENSE]
    assert {row["kind"] for row in points.curve_points(replace(RECORD, trials=trials))} == {points.UNFINISHED}


def test_equal_scores_have_no_correlation():
    flat = tuple(replace(t, curve=(CurvePoint(0, 0.5), CurvePoint(1, 0.5))) for t in figures.scored(RECORD.trials))
    assert figures.curve_correlations(replace(RECORD, trials=flat)) == []


def test_the_window_holds_the_front_and_counts_the_rest():
    window = points.window(RECORD, "params")
    assert all(window.low <= trial.score_validation <= window.high for trial in RECORD.front)
    assert all(window.ratios[0] < trial.ratio < window.ratios[1] for trial in RECORD.trials if trial.curve)
    assert window.low >= RECORD.facts.dense.score_validation - 0.10
    below = [t for t in RECORD.trials if t.score is not None and max(t.score, t.score_validation) < window.low]
    assert window.below == len(below) > 0


def test_one_bad_trial_does_not_move_the_window():
    bad = replace(RECORD.trials[5], number=99, score=0.02, finalist=None)
    window, worse = points.window(RECORD, "params"), points.window(replace(RECORD, trials=(*RECORD.trials, bad)), "params")
    assert worse.low == pytest.approx(window.low, abs=0.01)
    assert worse.below == window.below + 1


def test_a_front_far_below_dense_is_still_shown():
    poor = tuple(replace(t, score=t.score and t.score - 0.5, finalist=None) for t in RECORD.trials)
    record = replace(RECORD, trials=poor)
    window = points.window(record, "params")
    assert any(window.low <= t.score <= window.high for t in record.front)


@pytest.mark.parametrize("kind", [points.FRONT, points.TEST])
def test_the_chart_shows_every_finalist_with_its_plan(kind):
    rows = {int(row["trial"]): row for row in points.front_points(RECORD, "params") if row["kind"] == kind}
    chosen = RECORD.front if kind == points.FRONT else [t for t in RECORD.trials if t.finalist]
    assert set(rows) == {trial.number for trial in chosen}
    for trial in chosen:
        lines = rows[trial.number]["plan"].split("\n")
        assert lines == [f"{name}: {value}" for name, value in trial.plan]


def test_vbmf_has_its_own_mark():
    rows = [row for row in points.front_points(RECORD, "params") if row["kind"] == points.VBMF]
    assert [row["origin"] for row in rows] == ["vbmf", "vbmf x 0.5"]


def test_the_predicted_front_has_its_own_mark_and_line():
    record = study_record()
    rows = [row for row in points.front_points(record, "params") if row["kind"] == points.PREDICTED]
    assert len(rows) == sum(t.origin.startswith("frontier") and t.score is not None for t in record.trials) > 0
    line = points.baseline_line(record, "params")
    assert line
    assert {(row["ratio"], row["score"]) for row in line} <= {(row["ratio"], row["score"]) for row in rows}


def test_the_predicted_front_is_no_better_than_the_whole_search():
    alone, whole = figures.hypervolume_gain(study_record())
    assert 0 < alone <= whole
    assert whole == figures.hypervolumes(study_record())[-1][1]
    assert figures.hypervolume_gain(study_record(trials=2, finalists=0)) is None


def test_before_finalists_the_front_is_the_searchs_own():
    record = study_record(finalists=0)
    assert points.search_line(record, "params") == []
    assert points.front_line(record, "params") == points.search_line(RECORD, "params")


def test_charts_have_no_names_that_count_upwards():
    for chart in (partial(charts.front_chart, cost="params"), charts.hypervolume_chart, charts.curves_chart):
        assert charts.page_spec(chart(RECORD)) == charts.page_spec(chart(RECORD))


def test_charts_take_more_rows_than_altair_allows_by_default():
    many = tuple(replace(RECORD.trials[i % 45], number=i) for i in range(1700))
    drawing = charts.curves_chart(replace(RECORD, trials=many))
    assert len(charts.page_spec(drawing)["datasets"]["curves"]) > 5000


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.count(1180160), "1,180,160"),
        (text.percent(0.9781), "97.8 %"),
        (text.ratio(55.31), "55.3x"),
        (text.ratio(9.996), "10.0x"),
        (text.ratio(999.96), "1,000x"),
        (text.ratio(1240.4), "1,240x"),
        (text.score(0.9781, "accuracy"), "97.8 %"),
        (text.score(0.9781, "1 - AUC"), "0.9781"),
        (text.score(None, "accuracy"), "\N{EN DASH}"),
        (text.difference(-0.004, "accuracy"), "\N{MINUS SIGN}0.4"),
        (text.difference(-0.0001, "accuracy"), "0.0"),
        (text.difference(0.0123, "1 - AUC"), "+0.0123"),
        (text.margin(0.01, "accuracy"), "one point"),
        (text.margin(0.10, "accuracy"), "10 points"),
        (text.margin(0.01, "1 - AUC"), "0.01"),
        (text.share(0.0003), "<0.1 %"),
        (text.share(0.0), "0.0 %"),
        (text.milliseconds(0.2), "0.200 ms"),
        (text.milliseconds(99.96), "100 ms"),
        (text.duration(0.42), "0.4 s"),
        (text.duration(200), "3 min 20 s"),
        (text.duration(3599.8), "1 h 0 min"),
        (text.duration(7500), "2 h 5 min"),
    ],
)
def test_numbers_read_well(shown, expected):
    assert shown == expected
