"""Tasks: model, loss and score that fit together, and those that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ranksearch.compress.inventory import check_weights
from ranksearch.data import Batched
from ranksearch.errors import DataError, ModelError
from ranksearch.task import training
from ranksearch.task.checks import check_arguments, check_outputs
from ranksearch.task.task import Task, accuracy, evaluation_batch, predict
from tests import nested, nets

CPU = torch.device("cpu")


def test_a_loss_or_score_that_gives_no_number():
    data = nets.few_digits()
    with pytest.raises(ModelError, match=r"The loss must return one number for outputs of shape .* but raised"):
        check_outputs(Task(nets.small(), data, loss=nn.CrossEntropyLoss))
    with pytest.raises(ModelError, match=r"The score must return one number for outputs of shape .* but raised TypeError"):
        check_outputs(Task(nets.small(), data, score=lambda outputs, targets: None))


def test_a_model_that_gives_no_tensor():
    class Pair(nn.Module):
        def forward(self, inputs):
            return inputs, inputs

    with pytest.raises(
        ModelError, match="The model must return one tensor, in training mode too, but returns a tuple; wrap it"
    ):
        check_outputs(Task(Pair(), nets.few_digits()))
    auxiliary = nets.Net(lambda net, x: (net.net(x), x) if net.training else net.net(x), net=nets.small())
    with pytest.raises(
        ModelError, match="The model must return one tensor, in training mode too, but returns a tuple; wrap it"
    ):
        check_outputs(Task(auxiliary, nets.few_digits()))
    torn = nets.Net(lambda net, x: net.nothing if net.training else net.net(x), net=nets.small())
    with pytest.raises(ModelError, match="The model must run in training mode, but raised AttributeError: 'Net' object has no"):
        check_outputs(Task(torn, nets.few_digits()))


def test_outputs_of_any_nesting_need_a_loss_and_a_score_that_take_them():
    data = nested.splits(lambda image, vector, label: (image, label))
    for model, name in ((nested.TwoHeads(nested.as_dict), "dict"), (nested.TwoHeads(nested.as_model_output), "ModelOutput")):
        words = (
            f"The model must return one tensor, in training mode too, but returns a {name}; wrap it, or give a loss and a score"
        )
        with pytest.raises(ModelError, match=words):
            check_outputs(Task(model, data))
        with pytest.raises(ModelError, match=words):
            check_outputs(Task(model, data, score=nested.score_of_output))
    with pytest.raises(
        ModelError, match=r"The loss must return one number for outputs of shape {'label': \(2, 2\), .*KeyError: 'nothing'"
    ):
        check_outputs(Task(model, data, lambda outputs, targets: outputs["nothing"], nested.score_of_output))
    assert not check_outputs(Task(model, data, nested.loss_of_output, nested.score_of_output)).loss_in_training


def test_a_loss_is_of_the_outputs_of_training_mode_where_they_are_nested_otherwise():
    """Normalisation and dropout are as in eval mode then, so that the loss follows from the model alone."""

    def losses(net, x):
        label = net.net(net.dropout(x))
        return {"loss": label.square().mean()} if net.training else label

    split = nested.splits(lambda image, vector, label: (image, label))
    model = nets.Net(losses, net=nn.Sequential(nested.tower(), nn.Linear(12, 2)), dropout=nn.Dropout())
    task = check_outputs(Task(model, split, lambda outputs, targets: outputs["loss"], nested.share_right))
    assert task.loss_in_training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = training.loss_on(model, task, split.validation, seed=0, device=CPU)
    assert loss == training.loss_on(model, task, split.validation, seed=5, device=CPU)
    assert loss == pytest.approx(float(predict(model, split.validation)[0].square().mean()), rel=1e-4)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_that_do_not_fit_together():
    model = nets.Net(lambda net, x: x[:, :, : 2 + len(x) % 2])
    words = r"A score needs the outputs and targets of all batches in one, but those of two batches differ in nesting or shape \(Sizes of"
    with pytest.raises(DataError, match=words):
        predict(model, Fixed((1, 4096, 8), 256 + 1))


def test_a_dict_that_does_not_hold_the_arguments():
    data = nested.splits(lambda image, vector, label: ({"image": image, "vektor": vector}, label))
    with pytest.raises(
        DataError, match=r"A dict of inputs must hold the arguments of the model's forward \(image, vector\) by name"
    ):
        check_arguments(Task(nested.TwoInputs(), data))


def test_a_model_that_cannot_be_trained():
    frozen, without = nets.small().requires_grad_(False), nets.Net(torch.no_grad()(lambda net, x: net.net(x)), net=nets.small())
    for model in (frozen, without):
        with pytest.raises(
            ModelError, match=r"The model must be trainable, but its outputs depend on no trainable weight; call"
        ):
            check_outputs(Task(model, nets.few_digits()))
        check_outputs(Task(model, nets.few_digits()), trains=False)


def test_weights_that_cannot_be_trained():
    with torch.device("meta"):
        nowhere = nets.small()
    with torch.inference_mode():
        fixed = nets.small()
    with pytest.raises(ModelError, match=r"Weights must be loaded, but 'conv1.weight' is on the meta device; load the model's"):
        check_weights(nowhere)
    with pytest.raises(
        ModelError, match=r"Weights must be trainable, but 'conv1.weight' was created in inference mode; create"
    ):
        check_weights(fixed)


def test_a_score_may_need_more_than_two_inputs():
    def of_all_classes(outputs, targets):
        if len(targets.unique()) < 10:
            raise ValueError("some class is not there")
        return 0.5

    check_outputs(Task(nets.small(), nets.few_digits(), score=of_all_classes))


def test_accuracy_is_the_ratio_of_the_counts():
    for right, inputs in ((324, 360), (54, 100), (7, 7)):
        outputs, targets = torch.eye(2).repeat_interleave(torch.tensor([right, inputs - right]), 0), torch.zeros(inputs)
        assert accuracy(outputs, targets) == right / inputs


def test_nan_outputs_have_accuracy_nan():
    outputs = torch.tensor([[0.1, 0.2], [float("nan"), 0.0]])
    assert math.isnan(accuracy(outputs, torch.tensor([1, 1])))


def test_a_classifier_with_too_few_outputs():
    with pytest.raises(
        ModelError, match=r"The model must return 10 outputs for each input, one per class, but returns shape \(4,\)"
    ):
        check_outputs(Task(nets.small(classes=4), nets.few_digits()))


def test_accuracy():
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_bfloat16_trains_other_weights_that_stay_float32_and_learns():
    def train(precision):
        torch.manual_seed(0)
        kinds = set()
        task = Task(nets.small(), nets.few_digits(), lambda o, t: kinds.add(o.dtype) or nn.functional.cross_entropy(o, t))
        for _ in training.fit(task.model, task, training.Recipe(3, 64, 1e-2, precision=precision), seed=0, device=CPU):
            pass
        assert kinds == {torch.float32}
        assert {p.dtype for p in task.model.parameters()} == {torch.float32}
        return task

    plain, lower = train("float32"), train("bfloat16")
    weights = [torch.cat([p.detach().flatten() for p in task.model.parameters()]) for task in (plain, lower)]
    assert not torch.equal(*weights)
    scores = [training.score(task.model, task, task.data.validation, device=CPU) for task in (plain, lower)]
    assert abs(scores[0] - scores[1]) < 0.1


@pytest.mark.parametrize(("shape", "most"), [((1, 8, 8), 256), ((3, 224, 224), 55), ((1, 4096, 4096), 1)])
def test_large_inputs_are_scored_a_few_at_a_time(shape, most):
    held = []
    model = nets.Net(lambda net, x: held.append(len(x)) or x.flatten(1)[:, :2])
    split = Fixed(shape, most + 5)
    outputs, targets = predict(model, split)
    assert (max(held), sum(held)) == (most, len(split))
    assert len(outputs) == len(targets) == len(split)


class Fixed(Batched):
    """A split with inputs of a given shape that take no memory before they are read."""

    def __init__(self, shape, count):
        self.shape, self.count = shape, count

    def __len__(self):
        return self.count

    def batch(self, chosen, device):
        return torch.zeros(1, *self.shape).expand(len(chosen), *self.shape), chosen % 2

    def only(self, chosen):
        return self


def test_the_size_of_a_batch_draws_nothing_of_the_callers():
    class Drawing(Fixed):
        def batch(self, chosen, device):
            torch.rand(1)
            return super().batch(chosen, device)

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert evaluation_batch(Drawing((1, 8, 8), 4)) == 256
    assert torch.equal(torch.rand(2), expected)
