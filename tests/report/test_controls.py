"""The controls in the report: whether the front beats them, in words, in the charts and in every file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.report import figures, points, summary
from ranksearch.results import pareto
from tests.report_study import study_record, with_controls

RECORD = study_record()
POOR = [(40.0, 0.90), (20.0, 0.92), (5.0, 0.95), (3.0, 0.96)]


def searching(record, **search):
    return replace(
        record, facts=replace(record.facts, spec=record.facts.spec | {"search": record.facts.spec["search"] | search})
    )


@given(st.floats(1.0, 60.0), st.floats(0.8, 1.0), st.sampled_from([["params"], ["macs"], ["params", "macs"]]))
def test_a_control_is_beaten_unless_it_would_be_on_the_front(ratio, score, minimize):
    record = with_controls(searching(RECORD, minimize=minimize), (ratio, score))
    objectives, (control,) = record.facts.objectives, record.controls
    cloud = [objectives.point(trial.score_validation, trial) for trial in record.front]
    on_front = len(cloud) in pareto.front([*cloud, objectives.point(score, control)])
    winner = figures.beaten_by(record, control)
    assert (winner is None) == on_front
    if winner:
        assert winner.score_validation >= score
        assert all(winner.costs[cost] <= control.costs[cost] for cost in minimize)


def test_a_front_that_is_no_larger_and_scores_as_well_ties_and_that_is_enough():
    best = RECORD.front[0]
    record = with_controls(RECORD, (best.ratio, best.score_validation))
    (control,) = record.controls
    record = replace(record, controls=(replace(control, costs=best.costs),))
    assert figures.beaten_by(record, record.controls[0]) == best


@pytest.mark.parametrize(
    ("controls", "minimize", "sentence"),
    [
        (
            POOR,
            ["params"],
            "The front beats all 4 controls, narrower nets trained from scratch: for each, a model of the front with at most its "
            "parameters scores at least as well on validation.",
        ),
        (
            POOR[1:2],
            ["params", "macs"],
            "The front beats the control, a narrower net trained from scratch: a model of the front with at most its parameters "
            "and MACs scores at least as well on validation.",
        ),
        (
            [*POOR[:2], (5.0, 0.995), (3.0, 0.997)],
            ["params"],
            "The front does not beat 2 of 4 controls, narrower nets trained from scratch (5.00x at 99.5 %; 3.00x at 99.7 %): for "
            "each, no model of the front with at most its parameters scores as well on validation.",
        ),
        (
            [(1.2, 0.9), (1.1, 0.997)],
            ["latency"],
            "The front does not beat 1 of 2 controls, narrower nets trained from scratch (1.10x speed at 99.7 %): no model of the "
            "front with at most its latency scores as well on validation.",
        ),
        (
            [(5.0, 0.995), (3.0, 0.997)],
            ["params"],
            "The front does not beat any of 2 controls, narrower nets trained from scratch (5.00x at 99.5 %; 3.00x at 99.7 %): for "
            "each, no model of the front with at most its parameters scores as well on validation.",
        ),
        (
            [(5.0, 0.995)],
            ["params", "macs"],
            "The front does not beat the control, a narrower net trained from scratch (5.00x, 5.00x MACs at 99.5 %): no model of "
            "the front with at most its parameters and MACs scores as well on validation.",
        ),
        ([], ["params"], ""),
    ],
)
def test_the_sentence(controls, minimize, sentence):
    assert summary.against_controls(with_controls(searching(RECORD, minimize=minimize), *controls)) == sentence


def test_controls_over_a_limit_of_size_are_not_compared():
    record = with_controls(searching(RECORD, min_ratio=10.0), (20.0, 0.9), (5.0, 0.999))
    assert summary.against_controls(record).startswith("The front beats the control,")
    assert next(line.beaten_by for line in summary.control_lines(record)) == "outside the limits"


def test_a_control_below_the_minimum_score_is_not_ahead():
    smallest = max(trial.ratio for trial in RECORD.front)
    record = with_controls(RECORD, (2 * smallest, 0.9))
    assert "does not beat" in summary.against_controls(record)
    assert summary.against_controls(searching(record, min_score=0.95)).startswith("The front beats the control,")


def test_controls_wait_for_the_latency_that_is_minimised():
    record = with_controls(searching(RECORD, minimize=["latency"]), (5.0, 0.9))
    assert summary.against_controls(record)
    untimed = {name: cost for name, cost in record.controls[0].costs.items() if name != "latency"}
    record = replace(record, controls=(replace(record.controls[0], costs=untimed, timings=()),))
    assert summary.against_controls(record) == ""
    assert summary.control_lines(record)[0].beaten_by == "\N{EN DASH}"
    assert not [row for row in points.front_points(record, "latency") if row["kind"] == points.CONTROL]


def test_the_test_split_chooses_nothing():
    record = with_controls(RECORD, *POOR)
    lucky = replace(record, controls=tuple(replace(control, score_test=1.0) for control in record.controls))
    assert summary.against_controls(lucky) == summary.against_controls(record)


def test_every_file_shows_the_controls(written):
    report = written(with_controls(RECORD, *POOR))
    sentence = summary.against_controls(report.record)
    page, markdown = report.page.text.replace("\N{NO-BREAK SPACE}", " "), report.text("report.md").replace("\\", "")
    for words in (page, markdown):
        assert sentence in words
        assert summary.controls_note(report.record) in words
    rows = report.json["controls"]
    assert [(row["control"], row["ratio"], row["score_validation"]) for row in rows] == [
        (number, *control) for number, control in enumerate(POOR, start=1)
    ]
    for flat, row in zip(report.rows("controls.csv"), rows, strict=True):
        assert set(flat) == set(row) - {"timings"}
        assert all(flat[key] == str(row[key]) for key in flat)
        assert row["beaten_by"] in {trial.number for trial in report.record.front}
        assert f"| {row['control']} | {row['ratio']:.{1 if row['ratio'] > 10 else 2}f}x |" in markdown
    assert f"control {rows[0]['control']}" in page, "with its latency"


def test_every_chart_of_the_front_shows_the_controls(written):
    record = with_controls(searching(RECORD, minimize=["params", "macs"]), *POOR)
    charts = written(record).page.charts
    for name in ("chart-front", "chart-front-macs", "chart-front-latency"):
        rows = [row for row in charts[name]["datasets"]["points"] if row["kind"] == points.CONTROL]
        assert [row["score"] for row in rows] == [score for _, score in POOR]


def test_a_control_below_the_chart_is_no_trial_below_it():
    record = with_controls(RECORD, *POOR, (30.0, 0.1))
    assert points.window(record, "params").below == points.window(RECORD, "params").below


def test_the_note_says_how_the_controls_were_trained():
    record = with_controls(RECORD, *POOR)
    spec = record.facts.spec
    trained = replace(record, facts=replace(record.facts, spec=spec | {"dense": {"epochs": 15, "weights": ""}}))
    assert "from random weights for 27 epochs, as many as the dense net and a finalist together" in summary.controls_note(
        trained
    )
    assert "given weights" not in summary.controls_note(trained)
    for dense in ({"epochs": 0, "weights": ""}, {"epochs": 15, "weights": "mine.pt"}):
        given = replace(record, facts=replace(record.facts, spec=spec | {"dense": dense}))
        assert "The dense net began with given weights; their training is not counted." in summary.controls_note(given)
