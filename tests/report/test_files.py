"""Laws of the report's files: each has every point of the front, with the same figures, at every stage of a study."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ranksearch.plan import FORMAT, Plan
from ranksearch.report import summary, text
from ranksearch.results.messages import Outcome
from tests import ROOT
from tests.report_study import study_record

FILES = {"report.html", "report.md", "front.csv", "front.json", "front.png", "front-latency.png", "trials.csv"}
FRONT_KEYS = {
    "trial", "score_validation", "score_validation_interval", "score_test", "score_test_interval", "ratio", "params", "macs",
    "width", "plan", "plan_text", "origin", "epochs",
    "latency_ms", "knee", "within_limits",
}  # fmt: skip


def test_the_report_is_these_files(report):
    assert {path.name for path in report.folder.iterdir()} == FILES
    assert (report.folder / "front.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_the_keys_that_tools_read(report):
    content = report.json
    assert list(content) == [
        "name", "front", "within_one_point", "dense", "controls", "minimize", "limits", "versions", "seed", "seconds", "score_name", "machine", "command",
    ]  # fmt: skip
    assert set(content["dense"]) == {"params", "macs", "score_validation", "score_test", "latency_ms", "timings"}
    assert all(set(row) == FRONT_KEYS | {"timings"} for row in content["front"])
    assert content["seconds"] == {**report.record.seconds, "total": sum(report.record.seconds.values())}


def test_json_says_what_the_record_says(report):
    front = report.record.front
    rows = report.json["front"]
    assert len(front) == len(rows) > 3
    for trial, row in zip(front, rows, strict=True):
        assert (row["trial"], row["ratio"], row["params"]) == (trial.number, trial.ratio, trial.params)
        assert row["score_validation"] == trial.finalist.score_validation
        assert row["score_test"] == trial.finalist.score_test
        assert row["latency_ms"] == trial.finalist.latency_ms
        assert row["epochs"] == trial.finalist.curve[-1].epochs
        assert Plan.from_dict({"format": FORMAT, "layers": row["plan"]}) == trial.plan


def test_exactly_one_knee(report):
    assert sum(row["knee"] for row in report.json["front"]) == 1


def test_csv_equals_json(report):
    for flat, row in zip(report.rows("front.csv"), report.json["front"], strict=True):
        assert set(flat) == FRONT_KEYS
        assert json.loads(flat["plan"]) == row["plan"]
        for key in FRONT_KEYS - {"plan"}:
            assert flat[key] == ("" if row[key] is None else str(row[key]))


def test_page_and_markdown_show_the_figures_of_the_json(report):
    page, markdown = report.page.text, report.text("report.md").replace("\\", "")
    for row in report.json["front"]:
        figures = [
            text.ratio(row["ratio"]),
            text.count(row["params"]),
            text.count(row["macs"]),
            text.score(row["score_validation"], "accuracy"),
            text.score(row["score_test"], "accuracy"),
            text.milliseconds(row["latency_ms"]),
        ]
        for words in (page, markdown):
            assert all(figure in words for figure in figures)
        assert row["plan_text"] in markdown
        assert row["plan_text"].replace(",", "") in page


def test_every_trial_is_in_its_table(report):
    rows = report.rows("trials.csv")
    assert [int(row["trial"]) for row in rows] == [trial.number for trial in report.record.trials]
    assert {row["outcome"] for row in rows} == {outcome.value for outcome in Outcome}
    for row, trial in zip(rows, report.record.trials, strict=True):
        assert row["score"] == ("" if trial.score is None else str(trial.score))
        assert bool(row["finalist_score_test"]) == (trial.finalist is not None)
        assert json.loads(row["curve"]) == [[curve_point.epochs, curve_point.score] for curve_point in trial.curve]


def test_markdown_names_all_that_is_needed_to_make_it_again(report):
    words = report.text("report.md")
    facts = report.record.facts
    assert f"    {facts.command}\n" in words
    assert "finetune.learning\\_rate" in words or "finetune.learning_rate" in words
    assert all(version in words for version in facts.versions.values())
    assert f"seed {facts.seed}" in words


def test_equal_records_give_equal_bytes(report, written):
    again = written(study_record())
    for name in FILES:
        here, there = ((each.folder / name).read_bytes().replace(bytes(each.folder), b"") for each in (again, report))
        assert here == there, name


@pytest.mark.parametrize("trials", [0, 1, 2, 12])
def test_a_study_has_a_report_before_its_finalists(written, trials):
    report = written(study_record(trials=trials, finalists=0))
    rows = report.json["front"]
    assert len(rows) == len(report.record.front)
    assert sum(row["knee"] for row in rows) == bool(rows)
    assert all(row["score_test"] is None and row["latency_ms"] is None for row in rows)
    assert len(report.rows("trials.csv")) == trials
    assert summary.headline(report.record) in report.page.text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_study_of_failures_only_has_a_report(written):
    record = study_record()
    record = replace(record, trials=tuple(t for t in record.trials if t.outcome is not Outcome.DONE))
    report = written(record)
    assert report.json["front"] == []
    assert "No trial has a score." in report.text("report.md")


def test_an_unknown_latency_is_null(written):
    record = study_record()

    def untimed(costed):
        return {name: value for name, value in costed.costs.items() if name != "latency"}

    facts = replace(record.facts, dense=replace(record.facts.dense, costs=untimed(record.facts.dense), timings=()))
    trials = tuple(replace(t, costs=untimed(t), finalist=t.finalist and replace(t.finalist, timings=())) for t in record.trials)
    report = written(replace(record, facts=facts, trials=trials))
    assert report.json["dense"]["latency_ms"] is None
    assert all(row["latency_ms"] is None for row in report.json["front"])
    assert "nan ms" not in report.page.text


def test_a_report_replaces_the_one_before(written):
    written(study_record(trials=3, finalists=0))
    assert written(study_record()).json["front"][-1]["score_test"] is not None


@pytest.mark.slow
def test_a_report_needs_no_torch(tmp_path):
    code = (
        "import sys, pathlib; from tests.report_study import study_record; from ranksearch.report import write_report; "
        "write_report(study_record(), pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)
