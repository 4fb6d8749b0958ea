"""Every built-in study starts, resumes and reports, in a reduced form on made-up pictures and stereo pairs."""

from __future__ import annotations

import json

import pytest

from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from ranksearch.study_file import builtin_studies, load_spec
from tests.conftest import make_bare
from tests.pictures import write_pictures, write_scenes

LAYERS = {"vgg16": "conv1_2", "resnet20": "stage1_1.conv1", "nin": "conv4", "pydnet": "decoder1.conv2"}
"""The layer that a reduced study decomposes; conv2 for the other studies."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_pictures(root / "cifar10" / "train", each=6)
    write_pictures(root / "cifar10" / "test", each=2)
    write_scenes(root)
    return root


def reduced(name, root, trials):
    """The study with one epoch of each training, one layer, one method and little data."""
    overrides = [
        "dense.epochs=1", "finetune.epochs=1", "finalists.epochs=1", "finalists.count=1", f"search.trials={trials}",
        f"space.layers=['{LAYERS.get(name, 'conv2')}']",
    ]  # fmt: skip
    overrides += [f"{section}.batch_size=20" for section in ("dense", "finetune", "finalists")]
    whole = load_spec(name)
    overrides.append(f"space.methods=['{whole.space.methods[0]}']")
    data = whole.task.data.partition(":")[2]
    if data == "cifar10":
        overrides += [f"task.data_args.root='{root}'", "task.data_args.validation=20"]
    if data in ("stereo", "depth"):
        spans = {"train_scenes": [1, 1], "validation_scenes": [2, 2], "test_scenes": [3, 3]}
        overrides += [f"task.data_args.{key}={value}" for key, value in spans.items()]
        small = {"stereo": {"patches": 200, "disparities": 16}, "depth": {"size": [64, 64]}}[data]
        overrides += [f"task.data_args.root='{root}'", *(f"task.data_args.{key}={value}" for key, value in small.items())]
    return load_spec(name, overrides=[*overrides, "search.min_ratio=1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in builtin_studies() if name != "lenet"])
def test_a_study_starts_resumes_and_reports(name, root, tmp_path, monkeypatch):
    """`lenet` is left out: it runs as a whole, in the first command of the README. Finalists are not timed."""
    monkeypatch.setattr("ranksearch.study.study.time_finalists", lambda *args: None)
    with pytest.MonkeyPatch.context() as patch:
        make_bare(patch)
        first = run_study(reduced(name, root, 1), tmp_path / name, Options(Local(0)))
    again = run_study(reduced(name, root, 2), tmp_path / name, Options(Local(0)))
    assert len(again.trials) == 2
    assert again.trials[0].plan == first.trials[0].plan
    assert again.trials[0].curve == first.trials[0].curve
    front = json.loads((tmp_path / name / "front.json").read_text())
    assert [point["params"] for point in front["front"]] == [trial.params for trial in again.front]
    assert front["front"][0]["score_test"] is not None
    page = (tmp_path / name / "report.html").read_text()
    assert again.facts.data in page
    assert ("data:image/webp;base64," in page) == (name in ("ccnn", "ccnn-design", "pydnet"))
