"""Studies whose task can draw: the pictures are made at the end, also by a resumed study, and lose nothing if they fail."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import ranksearch
from ranksearch.cli import main
from ranksearch.console import Silent
from ranksearch.errors import ModelError
from ranksearch.report.pictures import picture_name
from ranksearch.results.attributes import read_trials
from ranksearch.study.options import Local, Options
from ranksearch.study.pictures import MAX_SIDE
from ranksearch.study.study import run_study
from ranksearch.study_file import load_spec
from ranksearch.task.task import Task
from tests import ROOT, nets
from tests.conftest import essence, least_spec, refuse, stored
from tests.pictures import write_scenes
from tests.study.test_resume import finished_trials, wait_for

SHOW = "task.show=tests.study.test_pictures:show"


def show(kind, value):
    """Digits in gray, larger than a report needs; nothing for their classes."""
    if kind == "target":
        return None
    shades = value[0].numpy() if kind == "input" else value.softmax(0).numpy()[None]
    return np.repeat((255 * np.clip(shades, 0, 1)).astype(np.uint8).repeat(100, 0).repeat(100, 1)[..., None], 3, 2)


def failing(kind, value):
    raise ValueError("no ink")


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def names(out):
    return sorted(path.name for path in (out / "pictures").iterdir())


@pytest.mark.slow
def test_a_study_draws_inputs_and_outputs_of_the_dense_model_and_its_finalists(tmp_path, monkeypatch):
    out = tmp_path / "small"
    record = run_study(least_spec(SHOW), out, Options(Local(0)))
    (finalist,) = [trial.number for trial in record.trials if trial.finalist]
    shown = [16, 50, 83]
    assert names(out) == sorted(picture_name(i, name) for i in shown for name in ("input", "dense", finalist))
    for path in (out / "pictures").iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) <= MAX_SIDE
        assert path.stat().st_size < 50_000
    page = (out / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 9
    # The report is written again from the files, and --fresh deletes them.
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    monkeypatch.setattr("ranksearch.study.study.write_report", lambda record, folder: folder / "report.html")
    run_study(least_spec(), out, Options(Local(0), fresh=True))
    assert not (out / "pictures").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("bare")
def test_a_finished_study_gets_pictures_without_further_training(tmp_path):
    out = tmp_path / "small"
    before = run_study(least_spec(), out, Options(Local(0)))
    assert not (out / "pictures").exists()
    again = run_study(least_spec(SHOW), out, Options(Local(0)))
    assert essence(again.trials) == essence(before.trials)
    assert len(names(out)) == 9
    stale = out / "pictures" / "7-input.webp"
    shutil.copy(out / "pictures" / "16-input.webp", stale)
    run_study(least_spec(SHOW), out, Options(Local(0)))
    assert not stale.exists()


def test_a_function_that_returns_no_picture_is_refused_before_anything_is_written(study_file, capsys):
    message = refuse(capsys, "study", study_file, "--set", "task.show=tests.study.test_pictures:flat", "--out", "runs/flat")
    assert message == (
        "task.show must return a picture, uint8 of shape (height, width, 3), or None, but for 'input' it returned uint8 of shape "
        "(8, 8); correct the function."
    )
    assert not (study_file.parent / "runs").exists()


def flat(kind, value):
    return np.zeros((8, 8), np.uint8)


@pytest.mark.slow
def test_a_function_that_fails_at_the_end_loses_nothing(tmp_path, unreported, monkeypatch):
    out, view = tmp_path / "small", Notes()
    monkeypatch.setattr("ranksearch.study.checking.check_show", lambda task: None)
    record = run_study(least_spec("task.show=tests.study.test_pictures:failing"), out, Options(Local(0)), view=view)
    assert any(trial.finalist for trial in record.trials)
    assert view.notes[-1] == (
        "no pictures in the report: task.show must return a picture, or None where there is nothing to draw, but for 'input' and "
        "a value of shape (1, 8, 8) it raised ValueError: no ink; correct the function."
    )


@pytest.mark.slow
@pytest.mark.usefixtures("bare")
def test_from_python_and_with_workers_that_need_not_know_the_function(tmp_path):
    out, lock = tmp_path / "mine", threading.Lock()

    def draw(kind, value):
        with lock:  # a lock cannot be sent to a worker
            return show(kind, value)

    options = {"search": ranksearch.Search(trials=1), "finetune": ranksearch.Recipe(1), "engine": Local(1)}
    ranksearch.search(Task(nets.small(), nets.few_digits(), show=draw), out=out, finalists=ranksearch.Finalists(1), **options)
    assert len(names(out)) == 9
    with pytest.raises(ModelError, match=r"task\.show must return a picture, uint8 .*, but for 'input' it returned a int"):
        ranksearch.search(
            Task(nets.small(), nets.few_digits(), show=lambda kind, value: 3), out=tmp_path / "other",
            finalists=ranksearch.Finalists(1), **options,
        )  # fmt: skip


SCRIPT = """
import sys
from pathlib import Path
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests.study.test_pictures import depth_spec
run_study(depth_spec(Path(sys.argv[1]), 2), Path(sys.argv[2]), Options(Local(0)))
"""


def depth_spec(root, trials):
    """The study of depth on made-up pairs, with next to no training; named as the helpers for killed studies name theirs."""
    overrides = [
        "name=small", f"task.data_args.root='{root}'", "task.data_args.size=[64, 64]", "task.data_args.train_scenes=[1, 2]",
        "task.data_args.validation_scenes=[3, 3]", "task.data_args.test_scenes=[4, 4]", "dense.epochs=1", "finetune.epochs=1",
        "finalists.epochs=1", "finalists.count=1", f"search.trials={trials}", "space.layers=['decoder1.conv2']",
        "search.minimize=['params']", "space.smaller_in=['params']", "space.rank_multiple=4",
    ]  # fmt: skip
    spec = load_spec("pydnet", overrides=overrides)
    # Times differ from run to run, and with them which plans are tried.
    return replace(spec, search=replace(spec.search, max_latency_ms=None))


@pytest.mark.slow
def test_a_killed_study_of_depth_resumes_and_shows_its_pictures(tmp_path):
    write_scenes(tmp_path, shifts=(3, 7, 5, 4))
    out = tmp_path / "small"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: finished_trials(out) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    before = essence(read_trials(stored(out)))
    record = run_study(depth_spec(tmp_path, 2), out, Options(Local(0)))
    assert [trial[:9] for trial in essence(record.trials)][: len(before)] == [trial[:9] for trial in before]
    assert sum(trial.trained for trial in record.trials) == 2
    assert "delta < 1.25" in (out / "report.md").read_text().replace("\\", "")
    (finalist,) = [trial.number for trial in record.trials if trial.finalist]
    assert names(out) == sorted(picture_name(0, name) for name in ("input", "target", "dense", finalist))
    assert Image.open(io.BytesIO((out / "pictures" / "0-dense.webp").read_bytes())).size == (64, 64)
    assert (out / "report.html").read_text().count("data:image/webp;base64,") == 4
