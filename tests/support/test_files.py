"""A file that cannot be written gives a message of one sentence, leaves nothing half written, and the study can resume."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest

from ranksearch.errors import StudyError
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from ranksearch.support.files import write_whole, writing
from tests.conftest import essence, small_spec, snapshot

FILES = {
    "spec.toml": r"The study's .*/spec.toml",
    "dense.safetensors": r"The dense net's .*/dense.safetensors",
    "conv2-": r"The layer's factors .*/profile/conv2-.*",
    "weights.safetensors": r"The model .*/models/\d+",
    "plan.json": r"The model .*/models/\d+",
    "front.csv": r"The report's .*/front.csv",
}
"""For a file of each stage, in order: how its name begins, and its name in the message."""


def full(monkeypatch, name):
    """A disk that is full for files whose names begin with `name`."""
    opened = tempfile.mkstemp

    def mkstemp(dir, prefix):
        handle, beside = opened(dir=dir, prefix=prefix)
        if prefix.startswith(f".{name}"):
            os.close(handle)
            handle = os.open("/dev/full", os.O_WRONLY)
        return handle, beside

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_for_every_file(finished, tmp_path, monkeypatch):
    """The disk is full for one file after the other; then the last run equals an uninterrupted one."""
    out, spec = tmp_path / "small", small_spec("search.trials=2", "finalists.count=1")
    for name, words in FILES.items():
        kept = {path: bytes_ for path, bytes_ in snapshot(out).items() if path.suffix == ".safetensors"}
        with monkeypatch.context() as patch:
            full(patch, name)
            with pytest.raises(StudyError, match=f"{words} cannot be written: No space left on device; fix this and "):
                run_study(spec, out, Options(Local(0)))
        now = snapshot(out)
        assert not [path for path in now if path.name.startswith(f".{name}")], "nothing half written"
        assert {path: now[path] for path in kept} == kept, "nothing is made again"
    record = run_study(spec, out, Options(Local(0)))
    assert [trial[:9] for trial in essence(record.trials)] == [trial[:9] for trial in essence(finished[1].trials[:2])]
    assert sum(trial.finalist is not None for trial in record.trials) == 1
    assert (out / "report.html").exists()


def test_what_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")
    full(monkeypatch, "file")
    with (
        pytest.raises(StudyError, match=r"^The file cannot be written: No space left on device; make room\.$"),
        writing("The file", "make room"),
    ):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(path, "new")
    assert caught.value.errno == errno.ENOSPC
