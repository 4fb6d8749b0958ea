"""A registered cost reaches limits, fronts, reports and the screen."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from ranksearch import console
from ranksearch.errors import StudyError
from ranksearch.report import write_report
from ranksearch.results.choosing import choose
from ranksearch.results.costs import COSTS, PARAMS, Cost, costs_of, register_cost
from ranksearch.results.limits import Limits
from tests.report_study import study_record

RECORD = study_record()


@pytest.fixture
def memory(monkeypatch):
    """Bytes on disk: a cost that is measured for finalists, so other trials have no value of it."""
    monkeypatch.setattr("ranksearch.results.costs.COSTS", COSTS)
    cost = register_cost(Cost("bytes", title="size on disk", ratio="disk ratio", fewer="on disk", suffix=" disk", unit="KB"))
    yield cost
    del COSTS["bytes"]


def weighed(search):
    """The made-up study, with bytes for the dense model and the finalists, and with this section `search`."""

    def bytes_of(trial):
        return {"bytes": 3.5 + trial.params / 1000 * (1 + trial.number % 7)} if trial.finalist else {}

    dense = replace(RECORD.facts.dense, costs={**RECORD.facts.dense.costs, "bytes": 4000.0})
    facts = replace(RECORD.facts, dense=dense, spec={"search": {"trials": 45} | search})
    trials = [replace(trial, costs={**trial.costs, **bytes_of(trial)}) for trial in RECORD.trials]
    return replace(RECORD, facts=facts, trials=tuple(trials))


def test_a_cost_has_a_name_of_its_own():
    assert register_cost(PARAMS) is COSTS["params"]
    with pytest.raises(StudyError, match="A cost must have a unique name, but 'params' is registered for parameters"):
        register_cost(replace(PARAMS, title="weights"))


def test_numbers_read_as_people_read_them(memory):
    assert PARAMS.text(1250282) == "1,250,282"
    assert memory.text(3.14159) == "3.14 KB"
    assert memory.text(None) == "\N{EN DASH}"


def test_the_front_is_of_models_that_have_the_cost(memory):
    record = weighed({"minimize": ["bytes"]})
    assert record.front
    assert all(trial.finalist and "bytes" in trial.costs for trial in record.front)
    best = min((t for t in record.trials if "bytes" in t.costs), key=lambda trial: trial.costs["bytes"])
    assert record.front[-1] == best
    ratio = record.facts.objectives.ratio
    assert [ratio(trial) for trial in record.front] == sorted(ratio(trial) for trial in record.front)
    assert (
        choose(record.trials, record.facts.objectives, dense_score=record.facts.dense.score_validation, min_score=0.0) == best
    )


def test_limits_are_of_the_cost_and_spare_what_has_no_number(memory):
    all_of_them = weighed({"minimize": ["params"]})
    most = sorted(trial.costs["bytes"] for trial in all_of_them.front)[len(all_of_them.front) // 2]
    record = weighed({"minimize": ["params"], "max_bytes": most})
    assert record.facts.limits == Limits(max_costs={"bytes": most})
    assert "max_bytes" in Limits.names()
    assert 0 < len(record.front) < len(all_of_them.front)
    assert all(trial.costs["bytes"] <= most for trial in record.front)
    unweighed = next(trial for trial in record.trials if "bytes" not in trial.costs)
    assert not record.facts.limits.excess(unweighed)


def test_the_report_shows_the_cost(memory, tmp_path):
    record = weighed({"minimize": ["bytes", "params"], "max_bytes": 900.0})
    page = write_report(record, tmp_path).read_text()
    front = json.loads((tmp_path / "front.json").read_text())
    assert front["minimize"] == ["bytes", "params"]
    assert front["limits"]["max_bytes"] == 900.0
    assert front["dense"]["bytes"] == 4000.0
    assert [row["bytes"] for row in front["front"]] == [trial.costs["bytes"] for trial in record.front]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    assert [row["bytes"] for row in rows] == [str(trial.costs.get("bytes", "")) for trial in record.trials]
    shown = memory.text(record.front[0].costs["bytes"])
    for text in (page, (tmp_path / "report.md").read_text()):
        assert all(words in text for words in ("size on disk", "disk ratio", "x on disk", shown))
    assert (tmp_path / "front.png").exists()
    assert (tmp_path / "front-params.png").exists()


def test_the_screen_shows_the_cost(memory):
    record = weighed({"minimize": ["bytes"]})
    out = io.StringIO()
    screen = Console(file=out, width=250)
    screen.print(console.front_table(record.front, record.facts))
    screen.print(console.dense_line(record.facts.dense, "accuracy"))
    screen.print(console.short_outcome(record.front[0], record.facts))
    assert all(words in out.getvalue() for words in ("disk ratio", "size on disk", "4.00e+03 KB size on disk", "x disk, "))
    assert costs_of(record.facts.dense)[-1] == memory
