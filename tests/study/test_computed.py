"""Studies of nets whose layers compute what they hand to torch in each pass."""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch import Task, load_model
from ranksearch.cli import main
from ranksearch.console import Silent
from ranksearch.errors import ModelError
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import layers, nets
from tests.conftest import small_spec

COMPUTED = "task.model=tests.nets:computed"


@pytest.mark.slow
def test_a_study_of_computed_weights_gives_models_that_load_onto_the_dense_net(bare, tmp_path):
    out = tmp_path / "computed"
    record = run_study(small_spec(COMPUTED, "search.trials=4", "dense.epochs=4"), out, Options(Local(1)))
    assert {layer.name for layer in record.facts.layers} == {"conv1", "conv2", "conv3", "fc1", "fc2"}
    assert record.notes[:2] == [
        "Made permanent where decomposed: the weight computed in each pass (conv1, conv3, fc1 and 1 more).",
        "Made permanent where decomposed: the padding of inputs of this size, ((0, 1), (0, 1)) (conv2).",
    ]
    for trial in record.trials:
        if trial.finalist:
            model = load_model(nets.computed(), out / "models" / str(trial.number))
            inputs, targets = nets.few_digits().test.tensors
            with torch.no_grad():
                score = float((model(inputs).argmax(1) == targets).double().mean())
            assert score == trial.finalist.score_test
            assert sum(parameter.numel() for parameter in model.parameters()) == trial.params


def test_layers_names_what_becomes_permanent(study_file, capsys):
    assert main(["layers", str(study_file), "--set", COMPUTED]) == 0
    out = capsys.readouterr().out
    for words in (
        "made permanent where decomposed, conv1: the weight computed in each pass\n",
        "made permanent where decomposed, conv2: the padding of inputs of this size, ((0, 1), (0, 1))\n",
    ):
        assert words in out
    assert "skipped" not in out


def test_a_padding_by_size_needs_inputs_of_one_size(tmp_path):
    model = nn.Sequential(
        OrderedDict(conv=layers.Same(1, 4, 3, stride=2), pool=nn.AdaptiveAvgPool2d(1), row=nn.Flatten(), fc=nn.Linear(4, 10))
    )
    message = (
        "Inputs must have one size if a layer pads by it, as 'conv' does, but those of 'train' have the shape (1, 1, 8, 8) and "
        "those of 'test' (1, 1, 16, 16); give them one size, or leave the layer out by space.skip."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        ranksearch.search(Task(model, nets.larger_test()), out=tmp_path / "sizes", engine=Local(0))


@pytest.mark.slow
def test_narrower_nets_of_computed_weights_are_searched_too_or_the_user_is_told_why_not(bare, tmp_path):
    told = []

    class View(Silent):
        def note(self, text):
            told.append(text)

    spec = small_spec(COMPUTED, "search.trials=2", "dense.epochs=2", "space.widths=[1.0, 0.5]", "narrow.epochs=1")
    record = run_study(spec, tmp_path / "narrow", Options(Local(0)), view=View())
    assert {trial.plan.width for trial in record.trials} == {1.0, 0.5} or any("full width only" in note for note in told)
