"""Studies that search from narrower nets too: `space.widths`."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch import Finalists, Recipe, Search, Space, Task, load_model
from ranksearch.cli import main
from ranksearch.compress.inventory import count_macs, count_params
from ranksearch.compress.saved import read_plan
from ranksearch.console import Silent
from ranksearch.data import example
from ranksearch.errors import ModelError, SpecError
from ranksearch.plan import Plan
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nets
from tests.conftest import refuse, small_spec, time_once

WIDTHS = "space.widths=[1.0, 0.5]", "narrow.epochs=12", "narrow.learning_rate=0.01", "finalists.count=8"
IMAGE = example(nets.few_digits().train)


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory):
    """The folder and the record of a finished study of two widths."""
    folder = tmp_path_factory.mktemp("narrowed") / "small"
    with pytest.MonkeyPatch.context() as patch:
        time_once(patch)
        return folder, run_study(small_spec(*WIDTHS), folder, Options(Local(0)))


@pytest.mark.slow
def test_both_nets_are_searched_and_every_finalist_loads_onto_the_plain_model(narrowed):
    out, record = narrowed
    assert {trial.plan.width for trial in record.trials} == {1.0, 0.5}
    assert "width" in {trial.origin for trial in record.trials}
    for trial in record.trials:
        if trial.finalist:
            model = load_model(nets.small(), out / "models" / str(trial.number))
            assert count_params(model) == trial.params
            assert count_macs(model, IMAGE) == trial.macs
            assert (read_plan(out / "models" / str(trial.number)).narrowing is None) == (trial.plan.width == 1)


@pytest.mark.slow
def test_the_narrower_net_has_at_most_its_share_of_the_multiply_accumulates(narrowed):
    out, record = narrowed
    (facts,) = record.facts.narrow
    assert facts.width == 0.5
    assert facts.costs["macs"] <= 0.5 * record.facts.dense.macs
    model = load_model(nets.small(), out / "narrow" / "0.5")
    assert count_params(model) == facts.params
    assert count_macs(model, IMAGE) == facts.macs


@pytest.mark.slow
def test_report_and_files_name_the_net(narrowed):
    out, record = narrowed
    rows = json.loads((out / "front.json").read_text())["front"]
    assert [row["width"] for row in rows] == [trial.plan.width for trial in record.front]
    assert "width" in (out / "trials.csv").read_text().splitlines()[0].split(",")
    assert "Narrower nets" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_study_of_several_widths_resumes_as_if_it_had_not_stopped(bare, narrowed, tmp_path):
    _, whole = narrowed
    for trials in (1, 3, 8):
        record = run_study(small_spec(*WIDTHS, f"search.trials={trials}"), tmp_path / "small", Options(Local(0)))
    fields = [(trial.index, trial.plan, trial.score) for trial in record.trials]
    assert fields == [(trial.index, trial.plan, trial.score) for trial in whole.trials]


@pytest.mark.slow
def test_workers_give_what_this_process_gives(bare, narrowed, tmp_path):
    _, here = narrowed
    there = run_study(small_spec(*WIDTHS, "search.trials=2", "finalists.count=1"), tmp_path / "small", Options(Local(1)))
    assert [(trial.plan, trial.score) for trial in there.trials] == [(trial.plan, trial.score) for trial in here.trials[:2]]
    assert there.facts.narrow == here.facts.narrow


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plan", "onnx"])
def test_a_model_of_a_narrower_net_is_exported(narrowed, tmp_path, capsys, form):
    out, record = narrowed
    trial = next(trial for trial in record.trials if trial.finalist and trial.plan.width == 0.5)
    arguments = ["export", out, "--trial", trial.number, "--format", form, "--to", tmp_path / "to", "--merge"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "largest difference of outputs" in capsys.readouterr().out
    if form == "plan":
        assert read_plan(tmp_path / "to").width == 0.5
        load_model(nets.small(), tmp_path / "to")


class FixedWidth(nn.Sequential):
    """A net whose forward knows the number of its channels."""

    def forward(self, x):
        x = self[0](x)
        return self[1](x.view(-1, 8, 64).mean(2))


@pytest.mark.slow
def test_a_model_that_cannot_be_pruned_is_searched_at_full_width(bare, tmp_path):
    told = []

    class View(Silent):
        def note(self, text):
            told.append(text)

    task = Task(FixedWidth(nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 10)), nets.few_digits())
    record = ranksearch.search(
        task, out=tmp_path / "fixed", space=Space(widths=(1.0, 0.5)), search=Search(trials=2), finetune=Recipe(0),
        finalists=Finalists(0, count=1), engine=Local(0), view=View(),
    )  # fmt: skip
    assert {trial.plan.width for trial in record.trials} == {1.0}
    assert any(note.startswith("searching at full width only: ") for note in told)


@pytest.mark.slow
def test_a_narrower_net_that_diverges_ends_the_study_in_a_sentence(bare, tmp_path):
    with pytest.raises(ModelError, match=r"The narrower net of width 0.5 must train, but its loss became NaN or infinite"):
        run_study(small_spec(*WIDTHS, "narrow.learning_rate=1e30"), tmp_path / "small", Options(Local(0)))


@pytest.mark.parametrize("widths", ["[]", "[0.5]", "[1.0, 0.5, 0.5]", "[1.0, 0.2, 0.5]", "[1.0, 0.0]", "[1.0, -0.5]"])
def test_widths_out_of_range_or_order_are_refused(widths):
    with pytest.raises(SpecError, match=r"space.widths must be shares that begin with 1 and fall, each above 0, but got"):
        small_spec(f"space.widths={widths}")


def test_widths_need_weights_to_prune():
    with pytest.raises(SpecError, match=r"space.widths must be \[1.0\] where space.start is scratch"):
        small_spec("space.widths=[1.0, 0.5]", "space.start='scratch'")


def test_widths_are_numbers():
    with pytest.raises(SpecError, match=r"space.widths must be a list of numbers, but got \['a'\]"):
        small_spec("space.widths=['a']")


def test_a_plan_of_a_narrower_net_cannot_be_tried_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(Plan.of({}, 0.5).to_json())
    (tmp_path / "small.toml").write_text(nets.SMALL)
    message = refuse(capsys, "study", "small.toml", "--set", "search.first=['plan.json']")
    assert message.startswith(
        "search.first, plan.json: A plan to try first must be one of the dense net, but this one has width 0.5"
    )


def test_a_width_that_is_too_small_is_refused_before_any_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(nets.SMALL)
    message = refuse(capsys, "study", "small.toml", "--set", "space.widths=[1.0, 0.0001]", "--set", "narrow.epochs=1")
    assert message.startswith("A width in space.widths must leave each layer a channel")
    assert not (tmp_path / "runs").exists()


def test_recipes_of_narrower_nets_count_only_where_there_are_any():
    assert small_spec("narrow.epochs=3").identity() == small_spec().identity()
    assert small_spec(*WIDTHS, "narrow.epochs=3").identity() != small_spec(*WIDTHS).identity()
    assert torch.tensor(small_spec(*WIDTHS).space.widths).tolist() == [1.0, 0.5]


@pytest.mark.slow
def test_the_command_trains_narrower_nets_before_it_knows_the_scores_name(bare, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(nets.SMALL)
    settings = [part for setting in (*WIDTHS, "search.trials=1") for part in ("--set", setting)]
    assert main(["study", "small.toml", "--workers", "0", *settings]) == 0
    assert "training narrower nets: 1 step" in capsys.readouterr().out
