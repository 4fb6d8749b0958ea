"""Files of weights that a study names: what is refused, in one sentence, and that none of their code runs."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ranksearch.plan import Plan
from tests import nets
from tests.conftest import refuse

NESTED = "but is a training checkpoint, with a state dict under 'state_dict'; save only that."


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, NESTED),
        (lambda state: {"state_dict": state, "best_acc": np.float64(0.9)}, NESTED),
        (lambda state: {"epoch": np.arange(3), "args": argparse.Namespace(lr=0.1), "state_dict": state, "out": Path("runs")}, NESTED),
        (lambda state: {"model": nets.small(), "best_acc": np.float64(0.9)},
         "but is a training checkpoint, with a whole model under 'model'; save only the state_dict() of that model."),
        (lambda state: {"epoch": 3, "lr": 0.1}, "but its entry 'epoch' is not a named tensor; save only the state dict."),
        (lambda state: {name: value.numpy() for name, value in state.items()}, "but its entry 'conv1.weight' is not a named tensor; save"),
        (lambda state: {0: torch.zeros(1)}, "but its entry 0 is not a named tensor; save only the state dict."),
        (lambda state: state | {"aux.fc2.bias": torch.zeros(3)}, "but it holds aux.fc2.bias, which the model lacks; use the model"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "all its names begin with 'module.'; remove that prefix."),
        (lambda state: state | {"fc2.bias": torch.zeros(3)}, "fc2.bias is (3,) there and (10,) in the model; use the model and the"),
        (lambda state: {n: v for n, v in state.items() if "norm" not in n}, "but it lacks norm1.weight and "),
        (lambda state: state | {"fc3.bias": torch.zeros(3)}, "but it holds fc3.bias, which the model lacks; use the model"),
        (lambda state: nets.small(), "but is a whole model, a Sequential; save model.state_dict()."),
        (lambda state: Plan(), "but is a Plan; save model.state_dict()."),
        (lambda state: [1, 2], "must be a state dict, but is a list; save model.state_dict()."),
        (None, "cannot be read: it is damaged, or was not written by torch.save; write it by torch.save(model.state_dict(), ...)."),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_models(study_file, tmp_path, capsys, made, message):
    path = tmp_path / "mine.pt"
    torch.save(made(nets.small().state_dict()), path) if made else path.write_text("hello")
    told = refuse(capsys, "study", "small.toml", "--set", "dense.weights=mine.pt")
    assert told.startswith("mine.pt must be a state dict")
    assert message in told
    assert not (tmp_path / "runs").exists()


class Hostile:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("small.toml", "ran.toml")


@pytest.mark.parametrize("function", [shutil.copy, os.link], ids=["copy", "link"])
def test_no_code_of_a_weights_file_runs(study_file, tmp_path, capsys, function):
    torch.save({"state_dict": nets.small().state_dict(), "best": Hostile(function)}, "mine.pt")
    told = refuse(capsys, "study", "small.toml", "--set", "dense.weights=mine.pt")
    assert told.startswith("mine.pt must be a state dict, but ")
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml", "mine.pt"}


@pytest.mark.parametrize(
    "made", [lambda: nets.small(), lambda: {"state_dict": nets.small().state_dict(), "best": np.float64(1)}]
)
def test_a_weights_file_that_is_cut_is_damaged(study_file, capsys, made):
    torch.save(made(), "mine.pt")
    data = Path("mine.pt").read_bytes()
    for length in (len(data) - 30, len(data) // 2, 0):
        Path("mine.pt").write_bytes(data[:length])
        told = refuse(capsys, "study", "small.toml", "--set", "dense.weights=mine.pt")
        assert told.startswith(
            "mine.pt must be a state dict, but cannot be read: it is damaged, or was not written by torch.save;"
        )


@pytest.mark.parametrize(
    ("made", "held"),
    [
        (lambda: nets.small(), "torch.nn.modules.container.Sequential"),
        (lambda: {"state_dict": {}, "best": np.float64(1)}, "numpy._core.multiarray.scalar"),
    ],
)
def test_old_files_of_torch_that_hold_more_than_tensors(study_file, capsys, made, held):
    torch.save(made(), "mine.pt", _use_new_zipfile_serialization=False)
    told = refuse(capsys, "study", "small.toml", "--set", "dense.weights=mine.pt")
    assert told.startswith(
        f"mine.pt must be a state dict, but cannot be read: it holds a {held}; write it by torch.save(model.sta"
    )
