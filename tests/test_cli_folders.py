"""Commands leave other folders unchanged, and --fresh deletes only files that a study wrote."""

from __future__ import annotations

import os

import pytest

from ranksearch.cli import main
from ranksearch.results.attributes import read_trials
from tests import nets
from tests.conftest import refuse, snapshot, stored


def test_a_folder_of_another_study_is_left_alone(copied, study_file, capsys):
    before = snapshot(copied)
    told = refuse(capsys, "study", "small.toml", "--set", "finetune.epochs=2")
    assert told == (
        "The folder runs/small is another study (finetune.epochs is 1 there and 2 here); choose another --out or name, or --fresh "
        "to start over."
    )
    assert snapshot(copied) == before


def test_a_folder_with_other_files_is_left_alone(study_file, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    told = refuse(capsys, "study", "small.toml", "--out", tmp_path / "mine", "--fresh")
    assert told.startswith("The output folder must belong to a study or be empty, but")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_users_own_project_is_never_emptied(study_file, tmp_path, capsys):
    (tmp_path / "spec.toml").write_text(nets.SMALL)
    (tmp_path / "nets.py").write_text("mine = 1")
    told = refuse(capsys, "study", "spec.toml", "--out", ".", "--fresh")
    assert told.startswith("The output folder must belong to a study or be empty, but . holds other files")
    assert (tmp_path / "nets.py").read_text() == "mine = 1"


@pytest.mark.slow
def test_fresh_starts_over_and_deletes_only_what_a_study_wrote(bare, copied, study_file):
    """Its exports too. The new study is another one."""
    (copied / "notes.txt").write_text("mine")
    (copied / "linked").symlink_to(copied.parent)
    assert main(["export", str(copied), "--knee"]) == 0
    assert list((copied / "export").iterdir())
    others = ["--trials", "2", "--workers", "0", "--set", "finetune.epochs=2", "--set", "dense.epochs=1"]
    assert main(["study", "small.toml", "--fresh", *others]) == 0
    assert (copied / "notes.txt").read_text() == "mine"
    assert (copied / "linked").is_symlink()
    assert not (copied / "export").exists()
    assert not (copied / "report.html").exists()
    assert len(read_trials(stored(copied))) == 2


def test_fresh_deletes_nothing_when_the_weights_are_missing(copied, study_file, capsys):
    before = snapshot(copied)
    told = refuse(capsys, "study", "small.toml", "--fresh", "--set", "dense.weights=nowhere.pt")
    assert told == "dense.weights must be a state dict of the model, but nowhere.pt does not exist."
    assert snapshot(copied) == before


def test_an_output_that_is_a_file(study_file, capsys):
    assert refuse(capsys, "study", "small.toml", "--out", "small.toml").startswith(
        "The output must be a folder, but small.toml is"
    )


def test_an_output_whose_name_is_no_text(study_file, tmp_path, capsys):
    told = refuse(capsys, "study", "small.toml", "--out", os.fsdecode(b"runs/\xff"))
    assert told == "The output folder's name must be UTF-8, but is 'runs/\\udcff'; choose another --out."
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use(copied, study_file, capsys):
    import filelock

    with filelock.FileLock(copied / ".lock"):
        told = refuse(capsys, "study", "small.toml")
    assert (
        told == "Only one run at a time may use a folder, but runs/small is in use; wait for that run or choose another --out."
    )


def test_fresh_does_not_empty_the_folder_when_the_storage_is_out_of_reach(copied, study_file, capsys):
    before = snapshot(copied)
    refuse(capsys, "study", "small.toml", "--fresh", "--storage", "sqlite:////no/such/folder/x.db")
    assert snapshot(copied) == before


def test_ctrl_c_before_the_old_study_is_gone_keeps_fresh(study_file, capsys, monkeypatch):
    def impatient(spec):
        raise KeyboardInterrupt

    monkeypatch.setattr("ranksearch.study.checking.load_task", impatient)
    assert main(["study", "small.toml", "--fresh"]) == 130
    assert capsys.readouterr().out.endswith("Stopped. Resume with:  ranksearch study small.toml --fresh\n")
