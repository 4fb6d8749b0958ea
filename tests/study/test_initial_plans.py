"""The user's initial plans: from files, from Python; bad ones are refused before anything is trained."""

from __future__ import annotations

import re

import pytest

import ranksearch
from ranksearch.compress.inventory import inventory
from ranksearch.data import example
from ranksearch.errors import PlanError, SpecError, StudyError
from ranksearch.methods import RankConstraints
from ranksearch.plan import CP, CP4, SVD, Plan, Tucker2
from ranksearch.strategy.space import check_plan, make_space
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nets
from tests.conftest import essence, refuse, small_spec, snapshot

pytestmark = pytest.mark.usefixtures("bare")

FOUND = inventory(nets.small(), example(nets.few_digits().train))
MINE = [Plan.of({"conv2": Tucker2(4, 5), "fc1": SVD(6)}), Plan.of({"conv1": CP(2)})]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of two plans in the folder in which the command runs."""
    monkeypatch.chdir(tmp_path)
    for name, plan in zip(("one.json", "other.json"), MINE, strict=True):
        (tmp_path / name).write_text(plan.to_json())
    return ["one.json", "other.json"]


def run(first, out, *, trials=3, given=()):
    spec = small_spec("dense.epochs=1", f"search.trials={trials}", "finalists.count=1", f"search.first={first}")
    return run_study(spec, out, Options(Local(0)), first=given)


@pytest.mark.slow
def test_the_users_plans_are_the_first_trials_however_they_are_given(files, tmp_path):
    found = run(files, tmp_path / "small")
    assert [(trial.origin, trial.plan) for trial in found.trials[:2]] == [("user", plan) for plan in MINE]
    assert found.trials[2].origin == "frontier"
    again = run([], tmp_path / "python", given=MINE)
    assert essence(again.trials) == essence(found.trials)


@pytest.mark.slow
def test_a_study_goes_on_with_the_same_plans_whatever_their_files_are_called(files, tmp_path):
    whole = run(files, tmp_path / "whole" / "small")
    run(files, tmp_path / "small", trials=1)
    for name in files:
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = [f"moved-{name}" for name in files]
    message = "The initial plans of a study cannot change, but search.first now names others; change it back"
    for other in ([], moved[:1], moved[::-1]):
        with pytest.raises(StudyError, match=message):
            run(other, tmp_path / "small")
    found = run(moved, tmp_path / "small")
    assert [trial[:9] for trial in essence(found.trials)] == [trial[:9] for trial in essence(whole.trials)]


def test_from_python(trained, tmp_path):
    options = {"search": ranksearch.Search(trials=1), "finetune": ranksearch.Recipe(1), "finalists": ranksearch.Finalists(1)}
    out = tmp_path / "mine"
    with pytest.raises(SpecError, match=r"^first must hold plans, but got 'plan.json'; make one with Plan.of or"):
        ranksearch.search(trained, out=out, first=["plan.json"], **options)
    with pytest.raises(
        SpecError, match=r"^search.first, plan 2: A plan must name layers of the search space, but got 'fc'. Did"
    ):
        ranksearch.search(trained, out=out, first=[MINE[0], Plan.of({"fc": SVD(2)})], **options)
    assert not out.exists()
    record = ranksearch.search(trained, out=out, first=MINE[:1], engine=Local(0), **options)
    assert (record.trials[0].origin, record.trials[0].plan) == ("user", MINE[0])


def test_the_plan_of_a_finished_study_can_be_tried_first(finished, tmp_path):
    folder, record = finished
    best = record.front[0]
    found = run([str(folder / "models" / str(best.number) / "plan.json")], tmp_path / "small", trials=1)
    assert (found.trials[0].origin, found.trials[0].plan) == ("user", best.plan)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "search.first must name plan files, but 'plan.json' cannot be read: No such file or directory; check the path."),
        (b"\xff\xfe", "search.first must name plan files, but 'plan.json' cannot be read: it is not UTF-8 text; check the path."),
        (b"{", "search.first, plan.json: A plan must be JSON, but line 1 is not: Expecting property name enclosed in double quotes."),
        (b"[]", 'search.first, plan.json: A plan needs "format": "ranksearch-plan/1" and a "layers" object, but got \'list\'.'),
        (Plan.of({"conv9": CP(1)}), "search.first, plan.json: A plan must name layers of the search space, but got 'conv9'. Did you mean 'conv2'?"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_before_anything_is_written(content, message, study_file, tmp_path, capsys):
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content.to_json().encode() if isinstance(content, Plan) else content)
    before = snapshot(tmp_path)
    assert refuse(capsys, "study", "small.toml", "--set", "search.first=['plan.json']") == message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ({}, {}, "A plan must decompose at least one layer, but this one leaves all layers dense."),
        ({"fc3": SVD(2)}, {}, "A plan must name layers of the search space, but got 'fc3'. Did you mean 'fc2'?"),
        ({"fc1": SVD(2)}, {"skip": ["fc*"]}, "A plan must name layers of the search space, but got 'fc1'. This study leaves it dense."),
        ({"conv2": CP4(2)}, {}, "Layer 'conv2' may not be stored as CP-4 in this study; add it to space.methods."),
        ({"conv2": SVD(2)}, {}, "Layer 'conv2' of shape (16, 8, 3, 3) cannot be stored as SVD."),
        ({"fc1": SVD(33)}, {}, "Layer 'fc1': rank of SVD must be at most 32, but got 33."),
        ({"fc1": SVD(30)}, {}, "Layer 'fc1': rank of SVD must be at most 28 in this study, but got 30."),
        ({"fc1": SVD(6)}, {"constraints": RankConstraints(4)}, "Layer 'fc1': rank of SVD must be a multiple of 4 and at most 28 in this study, but got 6."),
        ({"conv2": Tucker2(8, 14)}, {}, "Layer 'conv2' must become smaller in params (space.smaller_in), but Tucker-2 8x14 does not shrink it."),
        ({"fc1": Tucker2(2, 2, kernel=(2, 8))}, {}, "Layer 'fc1' must have kernel=(4, 4) in this study, but got (2, 8)."),
    ],
)  # fmt: skip
def test_a_plan_that_the_space_does_not_offer_is_refused(layers, options, message):
    space = make_space(FOUND, ("tucker2", "cp", "svd"), **options)
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        check_plan(Plan.of(layers), space, FOUND)
