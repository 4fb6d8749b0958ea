"""Fixtures: the made-up study with its report, written once, and a parser of the page."""

from __future__ import annotations

import csv
import html.parser
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from ranksearch.report import write_report
from ranksearch.results.record import StudyRecord
from tests.report_study import study_record


@dataclass(frozen=True)
class Report:
    """A study and its report."""

    record: StudyRecord
    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.text("front.json"), parse_constant=pytest.fail)

    @cached_property
    def page(self) -> Page:
        page = Page()
        page.feed(self.text("report.html"))
        page.close()
        return page


@dataclass
class Page(html.parser.HTMLParser):
    """A parsed page: tags with their attributes, visible text, and the data of its charts."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    hidden: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.hidden = ""

    def handle_data(self, data: str) -> None:
        if self.hidden == "script":
            self.scripts.append(data)
        elif not self.hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> dict[str, Any]:
        (at,) = [i for i, (_, attrs) in enumerate(self.scripted) if attrs.get("type") == "application/json"]
        return json.loads(self.scripts[at])

    @property
    def scripted(self) -> list[tuple[str, dict[str, str | None]]]:
        return [entry for entry in self.tags if entry[0] == "script"]


def write(record: StudyRecord, folder: Path) -> Report:
    assert write_report(record, folder) == folder / "report.html"
    return Report(record, folder)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a finished study."""
    return write(study_record(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def written(tmp_path: Path):
    """A function that writes a record's report."""
    return lambda record: write(record, tmp_path / "report")
