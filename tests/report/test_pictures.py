"""Pictures on the page: of the named models, inside the file, and none where a study drew none."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ranksearch.report import figures
from ranksearch.report.pictures import chosen, picture_name, rows
from ranksearch.results.objectives import Objectives
from tests.report.conftest import write
from tests.report_study import study_record


def draw(folder, names):
    (folder / "pictures").mkdir(parents=True)
    for shade, name in enumerate(names):
        Image.fromarray(np.full((4, 8, 3), 8 * shade, np.uint8)).save(folder / "pictures" / name, lossless=True)


@pytest.fixture
def drawn(tmp_path):
    """The made-up study with pictures of two test inputs."""
    record = study_record()
    finalists = [str(trial.number) for trial in figures.finalists(record)]
    folder = tmp_path / "report"
    draw(folder, [picture_name(index, name) for index in (12, 3) for name in ("input", "target", "dense", *finalists)])
    return write(record, folder)


def test_the_named_models_are_shown_beside_the_dense_one(drawn):
    record, objectives = drawn.record, drawn.record.facts.objectives
    named = {
        "knee": figures.knee(record.front, objectives),
        "within one point": figures.near_dense(record),
        "smallest": max(record.front, key=objectives.ratio),
    }
    for row, number in zip(rows(record, drawn.folder), (4, 13), strict=True):
        assert row.number == number
        first, models = row.pictures[:3], row.pictures[3:]
        assert [(picture.title, picture.tags) for picture in first] == [("input", ()), ("target", ()), ("dense", ())]
        for tag, trial in named.items():
            (picture,) = [each for each in models if tag in each.tags]
            assert picture.title == f"trial {trial.number}"
        assert {picture.title for picture in models} == {f"trial {trial.number}" for trial in named.values()}
        assert "on test" in models[0].line


def test_the_pictures_are_inside_the_page(drawn):
    images = [attrs for tag, attrs in drawn.page.tags if tag == "img"]
    found = [picture for row in rows(drawn.record, drawn.folder) for picture in row.pictures]
    assert [image["src"] for image in images] == [picture.data for picture in found]
    assert len({image["alt"] for image in images}) == len(images)
    for image in images:
        kind, _, content = image["src"].partition(";base64,")
        assert kind == "data:image/webp"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (8, 4)
    assert "Test input 4" in drawn.page.text
    assert any(attrs.get("href") == "#pictures" for tag, attrs in drawn.page.tags if tag == "a")


def test_a_study_without_pictures_has_no_section_for_them(report):
    assert rows(report.record, report.folder) == []
    assert "pictures" not in {attrs.get("id") for _, attrs in report.page.tags}


def test_what_was_not_drawn_is_left_out(tmp_path):
    record = study_record()
    draw(tmp_path / "report", [picture_name(0, "dense"), "notes.webp", "1-input.webp"])
    shown = rows(record, tmp_path / "report")
    assert [[picture.title for picture in row.pictures] for row in shown] == [["dense"], ["input"]]


def test_in_a_study_of_the_latency_the_smallest_is_the_fastest():
    record = study_record()
    spec = record.facts.spec | {"search": {"trials": 45, "minimize": ["latency"]}}
    record = replace(record, facts=replace(record.facts, spec=spec))
    assert Objectives.of(spec["search"], record.facts.dense) == record.facts.objectives
    trial, tags = chosen(record)[-1]
    assert "fastest" in tags
    assert trial is record.front[-1]


def test_before_the_first_trial_there_is_nothing_to_choose():
    assert chosen(study_record(trials=0)) == []
