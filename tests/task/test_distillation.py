"""Losses and scores without labels, which compare with the outputs of the dense net."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
from torch.utils.data import TensorDataset

import ranksearch
from ranksearch.cli import main
from ranksearch.errors import ModelError
from ranksearch.study import folder
from ranksearch.study.narrowing import _losses
from ranksearch.study_file import load_spec
from ranksearch.task import training
from ranksearch.task.checks import check_outputs
from ranksearch.task.distillation import agreement, explained_variance, kl_divergence, mean_squared_error
from ranksearch.task.task import Task
from tests import nested, nets
from tests.conftest import refuse

CPU = torch.device("cpu")
ONE = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
OTHER = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 3.0]])


def test_equal_outputs_lose_nothing_and_agree():
    for outputs in (ONE, {"a": ONE, "b": (OTHER, 3)}, torch.randn(2, 4, 5, 5)):
        assert float(kl_divergence(outputs, outputs)) == pytest.approx(0, abs=1e-6)
        assert float(mean_squared_error(outputs, outputs)) == 0
        assert agreement(outputs, outputs) == explained_variance(outputs, outputs) == 1


def test_other_outputs():
    assert agreement(OTHER, ONE) == 0.5
    assert agreement((OTHER, ONE), (ONE, ONE)) == 0.75
    assert float(mean_squared_error(OTHER, ONE)) == pytest.approx(18 / 6)
    assert explained_variance(OTHER, ONE) == pytest.approx(1 - 3 / float(ONE.var(correction=0)))
    probabilities, others = ONE.softmax(1), OTHER.softmax(1)
    assert float(kl_divergence(OTHER, ONE)) == pytest.approx(
        float((probabilities * (probabilities / others).log()).sum(1).mean())
    )
    assert math.isnan(agreement(torch.full((2, 3), math.nan), ONE))


@pytest.mark.parametrize("function", [kl_divergence, mean_squared_error, agreement, explained_variance])
def test_outputs_of_other_shapes(function):
    with pytest.raises(
        ValueError, match=r"outputs must have the shapes of the dense net's, but have \[\(2, 2\)\] where those have"
    ):
        function(ONE[:, :2], ONE)


def task(loss=kl_divergence, score=agreement, model=None):
    """The small net with labels that are all 0."""
    data = nets.few_digits()
    blank = (TensorDataset(split.tensors[0], torch.zeros(len(split))) for split in (data.train, data.validation, data.test))
    return Task(model or nets.small(), ranksearch.Splits(*blank, None, "digits without labels"), loss, score)


def test_one_output_has_no_classes():
    with pytest.raises(
        ModelError, match=r"The score must return one number for .* outputs must be of two classes or more, along the"
    ):
        check_outputs(task(mean_squared_error, model=nets.small(classes=1)))
    check_outputs(task(mean_squared_error, explained_variance, model=nets.small(classes=1)))


def test_the_dense_net_agrees_with_itself_and_teaches_another():
    given = check_outputs(task())
    assert training.score(given.model, given, given.data.test, device=CPU) == 1
    assert training.loss_on(given.model, given, given.data.validation, seed=0, device=CPU) == pytest.approx(0, abs=1e-6)
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    torch.manual_seed(7)
    pupil = nets.small()
    first = training.score(pupil, given, given.data.validation, device=CPU)
    for _ in training.fit(pupil, given, training.Recipe(8, 32, 1e-2), seed=0, device=CPU):
        pass
    assert training.score(pupil, given, given.data.validation, device=CPU) > max(0.5, first)
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


@pytest.mark.parametrize(("loss", "score"), [(kl_divergence, agreement), (mean_squared_error, explained_variance)])
def test_channels_are_chosen_by_a_loss_with_a_gradient_at_the_dense_net(loss, score, trained):
    given = task(loss, score, trained.model.eval())
    for each, zero in (
        (lambda model: loss(model(given.data.train.tensors[0]), model(given.data.train.tensors[0]).detach()), True),
        (_losses(given, 0)[0], False),
    ):
        model = training.copied(given.model)
        each(model).backward()
        assert (float(model.conv1.weight.grad.abs().max()) < 1e-6) is zero


def blank_digits():
    return task().data


STUDY = """
name = "blank"
[task]
model = "tests.nets:small"
data = "tests.task.test_distillation:blank_digits"
loss = "ranksearch.task.distillation:kl_divergence"
score = "ranksearch.task.distillation:agreement"
[dense]
weights = "dense.safetensors"
epochs = 0
[search]
trials = 2
[finetune]
epochs = 1
[finalists]
epochs = 1
count = 1
"""


@pytest.mark.slow
def test_a_study_without_labels(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.toml").write_text(STUDY)
    safetensors.torch.save_file(trained.model.state_dict(), "dense.safetensors")
    assert main(["study", "blank.toml", "--workers", "0"]) == 0
    assert "100.0 %" in capsys.readouterr().out
    assert "agreement with the dense net" in (tmp_path / "runs/blank/report.md").read_text()
    assert folder.read_spec(tmp_path / "runs/blank") == load_spec("blank.toml")


@pytest.mark.parametrize("override", ["dense.weights=''", "dense.epochs=3"])
@pytest.mark.parametrize("key", ["task.loss", "task.score"])
def test_a_dense_net_that_is_yet_to_be_trained(key, override, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.toml").write_text(STUDY)
    other = {
        "task.loss": "task.score='tests.nested:share_right'",
        "task.score": "task.loss='torch.nn.functional:cross_entropy'",
    }
    message = refuse(capsys, "study", "blank.toml", "--set", override, "--set", other[key])
    assert message.startswith(
        f"dense.weights must name trained weights and dense.epochs must be 0 where {key} compares with the dense net's outputs, but"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("bare")
def test_nested_outputs_and_narrower_nets_without_labels(tmp_path):
    data = nested.splits(lambda image, vector, label: (image, 0))
    given = Task(nested.TwoHeads(nested.as_model_output), data, mean_squared_error, explained_variance)
    record = ranksearch.search(
        given, out=tmp_path / "mine", search=ranksearch.Search(trials=1), finetune=ranksearch.Recipe(1),
        space=ranksearch.Space(widths=(1.0, 0.5)), narrow=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1),
        engine=ranksearch.Local(0),
    )  # fmt: skip
    assert record.facts.dense.score_validation == 1
    assert record.facts.score_name == "explained variance of the dense net's outputs"
    assert len(record.facts.narrow) == 1
