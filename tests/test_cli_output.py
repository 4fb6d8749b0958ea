"""Outputs that cannot encode a character, or are full: the command still prints its message and exits with the right code."""

from __future__ import annotations

import io
import sqlite3
import subprocess
import sys
from collections import OrderedDict
from contextlib import closing
from pathlib import Path

import pytest
from torch.nn import Flatten, Linear, Sequential

from ranksearch.cli import main
from ranksearch.study import database, storage
from tests import nets


def latin(monkeypatch):
    """Set outputs as in Windows' pipes; a function that returns their text. No fixture, since pytest sets its outputs later."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    return lambda name: streams[name].buffer.getvalue().decode("cp1252")


@pytest.mark.slow
def test_a_study_whose_folder_the_output_cannot_name_ends_well(bare, study_file, monkeypatch):
    told = latin(monkeypatch)
    words = ["--workers", "0", "--trials", "1", "--set", "finalists.count=1", "--set", "dense.epochs=1"]
    assert main(["study", "small.toml", "--out", "łódź", *words]) == 0
    assert told("stdout").rstrip().endswith("ranksearch export '\\u0142ód\\u017a' --knee --format onnx")
    assert main(["report", "łódź"]) == 0
    assert told("stdout").rstrip().endswith("\\u0142ód\\u017a/report.html")
    assert Path("łódź/report.html").exists()


def test_a_message_that_the_output_cannot_write_is_still_one(study_file, monkeypatch):
    told = latin(monkeypatch)
    assert main(["report", "łódź"]) == 2
    assert told("stderr").startswith("ranksearch: A study's folder must hold spec.toml, but \\u0142ód\\u017a does not")
    assert main(["study", "small.toml", "--set", "task.model=tests.nets:łódź"]) == 2


def test_a_table_goes_to_any_output(study_file, monkeypatch):
    monkeypatch.setattr(
        nets, "small", lambda: Sequential(OrderedDict(flat=Flatten(), łódź=Linear(64, 32), last=Linear(32, 10)))
    )
    told = latin(monkeypatch)
    assert main(["layers", "small.toml"]) == 0
    assert "\\u0142ód\\u017a" in told("stdout")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["layers", "small.toml"]) == 0
    assert "łódź" in sys.stdout.getvalue()


def test_ctrl_c_ends_any_command(copied, monkeypatch):
    def impatient(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("ranksearch.study.folder.open_study", impatient)
    assert main(["report", str(copied)]) == 130


def test_a_report_tells_that_it_waits(copied, monkeypatch, capsys):
    monkeypatch.setattr(storage, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.02)
    with closing(sqlite3.connect(copied / "study.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert main(["report", str(copied)]) == 2
    waits, ends = capsys.readouterr().err.splitlines()
    assert waits.startswith(
        f"ranksearch: the storage sqlite:///{copied}/study.db is locked by another program; trying again for"
    )
    assert ends.startswith(
        f"ranksearch: The storage sqlite:///{copied}/study.db must stay usable while a study runs, but has been"
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [["studies"], ["report", "runs/small"]])
def test_a_full_output_is_one_sentence(copied, study_file, words):
    code = f"import sys; from ranksearch.cli import main; sys.exit(main({words!r}))"
    with open("/dev/full", "w") as output:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == ("ranksearch: The disk is full: No space left on device; fix this and run the same command again.\n")
