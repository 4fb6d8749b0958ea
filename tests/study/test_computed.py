"""Studies of nets whose layers compute what they hand to torch in each pass."""

import pytest
import torch

from ranksearch import load_model
from ranksearch.cli import main
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nets
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
