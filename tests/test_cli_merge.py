"""`ranksearch export --merge` writes dense layers where they are faster, with the same outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ranksearch
from ranksearch.cli import main
from ranksearch.plan import Plan
from tests import nets
from tests.conftest import refuse


@pytest.fixture
def timed_by(copied):
    """Lets a finished study time models by a function of `tests.latency.test_forms`."""

    def change(function):
        spec = copied / "spec.toml"
        text = spec.read_text()
        assert 'runtime = "auto"' in text
        spec.write_text(text.replace('runtime = "auto"', f'runtime = "tests.latency.test_forms:{function}"'))
        return copied

    return change


@pytest.mark.parametrize("form", ["plan", pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_an_export_with_merged_layers(timed_by, finished, capsys, form):
    folder, trial = timed_by("by_layers"), finished[1].front[0]
    assert main(["export", str(folder), "--trial", str(trial.number), "--merge", "--format", form]) == 0
    target, merged, words = capsys.readouterr().out.splitlines()
    assert target == str(folder / "export" / f"{trial.number}-merged{'' if form == 'plan' else f'.{form}'}")
    layers = ", ".join(rf"{name} \(. -> 1 ms\)" for name, _ in trial.plan)
    assert re.match(rf"merged {layers}; the whole model \d+ -> 5 ms, in", merged)
    assert words.startswith(f"trial {trial.number}, 1.0x smaller than dense; largest difference of outputs on 64 real inputs")
    assert float(words.split()[-1]) < 1e-4
    if form == "plan":
        assert Plan.from_json((Path(target) / "plan.json").read_text()) == Plan()
        inputs = nets.few_digits().validation.tensors[0]
        model, original = (
            ranksearch.load_model(nets.small(), each) for each in (target, folder / "models" / str(trial.number))
        )
        torch.testing.assert_close(model(inputs), original(inputs), rtol=1e-4, atol=1e-4)
        assert repr(model) == repr(nets.small().eval())


def test_an_export_in_which_no_layer_is_faster_dense(timed_by, finished, capsys):
    folder, trial = timed_by("by_parameters"), finished[1].front[0]
    assert main(["export", str(folder), "--trial", str(trial.number), "--merge"]) == 0
    target, merged, words = capsys.readouterr().out.splitlines()
    assert merged == "no layer merged: none is faster dense in tests.latency.test_forms:by_parameters on 1 thread, batch 1"
    assert words.startswith(f"trial {trial.number}, {trial.ratio:.1f}x smaller than dense; ")
    assert Plan.from_json((Path(target) / "plan.json").read_text()) == trial.plan


def test_a_merged_model_may_lie_outside_of_the_limits(bare, timed_by, finished, capsys):
    folder, trial = timed_by("by_layers"), finished[1].front[0]
    spec = folder / "spec.toml"
    spec.write_text(spec.read_text().replace("[search]\n", "[search]\nmin_ratio = 1.5\n"))
    assert main(["study", str(spec), "--out", str(folder), "--workers", "0"]) == 0
    capsys.readouterr()
    assert main(["export", str(folder), "--trial", str(trial.number), "--merge"]) == 0
    assert "1.0x smaller than dense, outside the study's limits (min_ratio 1.5);" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device", "cpu"],
            "--device is for --merge, which times the layers, but --merge was not given; leave --device out.",
        ),
        (["--merge", "--device", "gpu"], "--device must be one that torch finds on this machine (cpu"),
    ],
)
def test_a_device_on_which_nothing_is_timed(copied, capsys, arguments, message):
    assert refuse(capsys, "export", copied, "--knee", *arguments).startswith(message)
    assert not (copied / "export").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "latency.runtime: module 'tests.latency.test_forms' has no 'nothing'."),
        (
            "not_a_time",
            "latency.runtime 'tests.latency.test_forms:not_a_time' must return milliseconds, a finite number above 0",
        ),
    ],
)
def test_a_runtime_that_gives_no_time(timed_by, capsys, function, message):
    folder = timed_by(function)
    assert refuse(capsys, "export", folder, "--knee", "--merge").startswith(message)
    assert not (folder / "export").exists()
