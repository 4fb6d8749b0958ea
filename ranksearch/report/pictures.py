"""The pictures that a study drew of some test inputs and of what its models make of them, for the page."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from ranksearch.report import figures, summary, text
from ranksearch.results.costs import LATENCY
from ranksearch.results.record import StudyRecord
from ranksearch.results.trials import TrialRecord

PICTURES = "pictures"
"""The folder of the pictures, in the study's folder."""
INPUT, TARGET, DENSE = "input", "target", "dense"
"""What a picture shows, besides the outputs of trials, which are named by their numbers."""


@dataclass(frozen=True)
class Drawn:
    """One picture on the page: its title, a tag for each reason why the model was chosen, a line of figures, and its data."""

    title: str
    tags: tuple[str, ...]
    line: str
    data: str
    """The picture as a `data:` address, so that the page stays one file."""


@dataclass(frozen=True)
class Row:
    """The pictures of one test input; `number` counts the inputs of the split from 1."""

    number: int
    pictures: tuple[Drawn, ...]


def picture_name(index: int, content: str) -> str:
    """The name of a picture's file: `3-input.webp`, `3-dense.webp`, `3-17.webp` for trial 17."""
    return f"{index}-{content}.webp"


def rows(record: StudyRecord, folder: Path) -> list[Row]:
    """The pictures in a study's folder: input, target, the dense model's output and those of the chosen models.

    Chosen are the knee of the front, the smallest model near the dense one, and the smallest of all. Empty if the study drew
    none.
    """
    inside = folder / PICTURES
    found = (re.fullmatch(r"(\d+)-\w+\.webp", path.name) for path in inside.glob("*.webp"))
    none = tuple[str, ...]()
    contents = [(INPUT, INPUT, none, ""), (TARGET, TARGET, none, ""), (DENSE, DENSE, none, _dense_line(record))]
    contents += [(str(t.number), f"trial {t.number}", tags, _line(record, t)) for t, tags in chosen(record)]
    return [
        Row(index + 1, tuple(
            Drawn(title, tags, line, data)
            for content, title, tags, line in contents
            if (data := _data(inside / picture_name(index, content)))
        ))
        for index in sorted({int(match[1]) for match in found if match})
    ]  # fmt: skip


def chosen(record: StudyRecord) -> list[tuple[TrialRecord, tuple[str, ...]]]:
    """The models whose outputs are shown, the largest first, and why."""
    objectives, front = record.facts.objectives, record.shown
    smallest = "fastest" if objectives.minimize[0] == LATENCY.name else "smallest"
    near = f"within {text.margin(figures.NEAR_DENSE, record.facts.score_name)}"
    reasons = {"knee": figures.knee(front, objectives), near: figures.near_dense(record), smallest: [None, *front][-1]}
    tagged = [(trial, tuple(why for why, other in reasons.items() if other is trial)) for trial in front]
    return [(trial, tags) for trial, tags in tagged if tags]


def _line(record: StudyRecord, trial: TrialRecord) -> str:
    ratios = (f"{figure} {words}" for figure, words in summary.ratio_words(record, trial))
    test = trial.finalist.score_test if trial.finalist else None
    return ", ".join([*ratios, f"{text.score(test, record.facts.score_name)} on test"])


def _dense_line(record: StudyRecord) -> str:
    return f"{text.score(record.facts.dense.score_test, record.facts.score_name)} on test"


def _data(path: Path) -> str:
    """A picture as a `data:` address; empty if there is no such file."""
    if not path.exists():
        return ""
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"
