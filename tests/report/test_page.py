"""Laws of the page: it loads nothing, escapes every name, and shows the content of the record."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Difference, Outcome
from ranksearch.spec import FROM_PYTHON
from tests.report_study import study_record

NASTY = "</script><script>alert(1)</script><b>&`|\"'"


def nasty_record():
    """The made-up study with a hostile text in place of each text that a user can set."""
    record = study_record()
    facts = record.facts
    layers = tuple(replace(layer, name=layer.name + NASTY) for layer in facts.layers)
    facts = replace(
        facts, name=NASTY, spec={NASTY: {NASTY: NASTY}, "search": facts.spec["search"] | {NASTY: NASTY}}, layers=layers,
        skipped={NASTY: NASTY}, versions={NASTY: NASTY},
        machine=NASTY, command=NASTY, data=NASTY,
    )  # fmt: skip
    trials = tuple(
        replace(t, origin=t.origin + NASTY, plan=Plan.of({name + NASTY: value for name, value in t.plan}))
        for t in record.trials
    )
    return replace(record, facts=facts, trials=trials, seconds={NASTY: 1.0})


def test_the_page_asks_nothing_of_the_network(report):
    for tag, attrs in report.page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            assert not re.match(r"(\w+:)?//", attrs.get(name) or ""), (tag, attrs)
    (policy,) = [attrs["content"] for _, attrs in report.page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none';")
    style = re.findall(r"<style>(.*?)</style>", report.text("report.html"), re.DOTALL)
    assert not re.search(r"url\(|@import", "".join(style))


def test_every_link_leads_to_a_section_or_a_file(report):
    ids = {attrs.get("id") for _, attrs in report.page.tags}
    for href in [attrs["href"] or "" for tag, attrs in report.page.tags if tag == "a"]:
        assert href[1:] in ids if href.startswith("#") else (report.folder / href).is_file()


def test_every_chart_has_its_place(report):
    ids = {attrs.get("id") for _, attrs in report.page.tags}
    assert set(report.page.charts) == {"chart-front", "chart-front-latency", "chart-hypervolume", "chart-curves"} <= ids


def test_nasty_names_are_escaped(report, written):
    nasty = written(nasty_record())
    assert len(nasty.page.scripted) == len(report.page.scripted) == 3
    assert not any(script.strip() == "alert(1)" for script in nasty.page.scripts)
    assert "b" not in {tag for tag, _ in nasty.page.tags} - {tag for tag, _ in report.page.tags}
    assert nasty.page.text.count(NASTY) > 20
    rows = nasty.page.charts["chart-front"]["datasets"]["points"]
    assert any(f"conv1{NASTY}" in row["plan"] for row in rows)


def test_nasty_names_are_escaped_in_markdown(report, written):
    words = written(nasty_record()).text("report.md")
    prose = "\n".join(line for line in words.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<", prose)
    rows = [line for line in prose.splitlines() if line[:1] == "|" and "trial" in line.replace("search.trials", "")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {3, 12}


def test_the_page_names_every_layer_and_reason(report):
    facts = report.record.facts
    for layer in facts.layers:
        assert layer.name in report.page.text
        assert " x ".join(map(str, layer.weight)) in report.page.text
    for name, reason in facts.skipped.items():
        assert name in report.page.text
        assert reason in report.page.text


def test_the_page_says_how_trials_failed(report):
    for outcome in set(Outcome) - {Outcome.DONE}:
        assert outcome.value in report.page.text


def test_the_page_marks_the_knee(report):
    (knee,) = [row for row in report.json["front"] if row["knee"]]
    assert f"{knee['trial']} knee" in report.page.text


def test_each_finalist_of_the_front_has_its_export_command(report):
    for trial in report.record.front:
        command = f"ranksearch export {report.folder} --trial {trial.number} --format onnx"
        assert (command in report.page.text) == (trial.finalist is not None)
    near = next(row for row in report.json["front"] if row["trial"] == report.json["within_one_point"]["trial"])
    assert f"To take it home: ranksearch export {report.folder} --trial {near['trial']} --format onnx" in report.page.text


def test_a_study_from_python_shows_how_to_load_its_models(written):
    record = study_record()
    record = replace(record, facts=replace(record.facts, spec=record.facts.spec | {"task": {"model": FROM_PYTHON}}))
    page, trial = written(record), next(trial for trial in record.front if trial.finalist)
    assert f'ranksearch.load_model(model, "{page.folder.as_posix()}/models/{trial.number}")' in page.page.text
    assert "ranksearch export" not in page.page.text


def test_the_opening_says_size_time_and_interval(written):
    record, measured = study_record(), Difference(-0.005, -0.02, 0.01, 0.007)
    finals = [trial.finalist and replace(trial.finalist, difference_test=measured) for trial in record.trials]
    trials = tuple(replace(trial, finalist=final) for trial, final in zip(record.trials, finals, strict=True))
    opening = written(replace(record, trials=trials)).text("report.html").split('<p class="lead">')[1].split("</p>")[0]
    assert re.search(r"x smaller \(.*\) and [\d.]+x faster \([\d.]+ ms instead of [\d.]+ ms\), ", opening)
    assert re.search(r"on test \(dense [\d.]+.%; difference \S+ \[\S+, \S+\]\)", opening)


def test_without_a_model_that_is_sure_enough_the_headline_names_the_likeliest(written):
    record, unsure = study_record(), Difference(-0.012, -0.06, 0.03, 0.02)
    finals = [trial.finalist and replace(trial.finalist, difference_validation=unsure) for trial in record.trials]
    trials = tuple(replace(trial, finalist=final) for trial, final in zip(record.trials, finals, strict=True))
    words = written(replace(record, trials=trials)).text("report.md").replace("\\", "")
    assert re.search(
        r"No model is within one point of the dense net with a chance of 70 % yet\. The likeliest is trial \d+, with \d\d %: "
        r"[\d.]+x smaller \(.*\) and [\d.]+x faster \(.*\), [\d.]+ % accuracy on validation",
        words,
    )


@pytest.mark.parametrize(("share", "told"), [(0.2, False), (0.5, True)])
def test_a_note_says_that_fine_tuning_makes_models_worse(share, told):
    record = study_record()
    noise, scored = record.facts.dense.standard_error, [trial for trial in record.trials if trial.scored]
    worse = {trial.number for trial in scored[: int(share * len(scored))]}

    def curve(trial):
        fall = 2 * noise if trial.number in worse else -0.1
        return (CurvePoint(0, 0.9), CurvePoint(2, 0.9 - fall))

    trials = tuple(replace(trial, curve=curve(trial), finalist=None) if trial.scored else trial for trial in record.trials)
    note = f"{len(worse)} of {len(scored)} trials score lower after their fine-tuning than before it; lower finetune.learning_rate."
    assert (note in replace(record, trials=trials).notes) == told


def test_another_score_is_no_percentage(written):
    record = study_record()
    facts = replace(record.facts, score_name="1 - AUC")
    report = written(replace(record, facts=facts))
    assert f"{facts.dense.score_validation:.4f}" in report.page.text
    assert "98.6 %" not in report.page.text
    assert "within 0.01 of the dense net" in report.text("report.md")


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_the_headline_names_the_smallest_model_near_dense(written, drop):
    record = study_record()
    dense = record.facts.dense
    record = replace(record, facts=replace(record.facts, dense=replace(dense, score_validation=0.986 + drop)))
    near = [t for t in record.front if (t.score_validation or 0) >= 0.976 + drop]
    words = written(record).text("report.md").replace("\\", "")
    if near:
        assert f"within one point of the dense net is trial {near[-1].number}:" in words
    else:
        assert "No model is within one point of the dense net yet" in words
