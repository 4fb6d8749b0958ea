"""Pictures that a task's own function draws, and functions that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranksearch.data import Splits, confidence
from ranksearch.errors import ModelError, SpecError
from ranksearch.models import ccnn
from ranksearch.study_file import parse_spec
from ranksearch.support.batch import one_input
from ranksearch.support.nesting import PerInput
from ranksearch.task.showing import check_show, drawn_inputs, drawn_outputs, shown_inputs
from ranksearch.task.task import Task, load_task
from tests import detection, nested, nets

GRAY = np.full((4, 6, 3), 128, np.uint8)


def digits(show):
    return Task(nets.small(), nets.few_digits(), show=show)


@pytest.mark.parametrize(("count", "chosen"), [(20, [3, 10, 16]), (3, [0, 1, 2]), (2, [0, 1]), (1, [0])])
def test_three_inputs_spread_over_the_test_split(count, chosen):
    data = nets.few_digits()
    few = torch.utils.data.TensorDataset(*(tensor[:count] for tensor in data.test.tensors))
    assert shown_inputs(Task(nets.small(), Splits(data.train, data.validation, few, 10, ""))) == chosen


def test_the_function_gets_one_input_of_each_kind_and_draws_what_it_likes():
    seen = {}

    def show(kind, value):
        seen.setdefault(kind, []).append(value)
        return torch.from_numpy(GRAY) if kind == "input" else GRAY if kind == "output" else None

    task = digits(show)
    drawn = list(drawn_inputs(task, [5, 7]))
    assert [(index, kind) for index, kind, _ in drawn] == [(5, "input"), (7, "input")]
    assert all((picture == GRAY).all() for *_, picture in drawn)
    assert [index for index, _ in drawn_outputs(task, task.model, [5, 7])] == [5, 7]
    inputs, targets = task.data.test.tensors
    assert torch.equal(torch.stack(seen["input"]), inputs[[5, 7]])
    assert [int(target) for target in seen["target"]] == targets[[5, 7]].tolist()
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(seen["output"]), task.model.eval()(inputs[[5, 7]]))


def test_one_input_of_nested_batches():
    batch = {"maps": (torch.arange(6).view(3, 2), torch.ones(3)), "boxes": PerInput(["a", "b", "c"]), "step": torch.tensor(4)}
    found = one_input(batch, 1)
    assert found["maps"][0].tolist() == [2, 3]
    assert (found["maps"][1], found["boxes"], found["step"]) == (1, "b", 4)


def test_boxes_of_pictures_of_several_sizes():
    seen = {}

    def show(kind, value):
        seen.setdefault(kind, []).append(value)
        return GRAY

    task = Task(detection.small_ssd(), detection.squares(), detection.summed, detection.recall, show=show)
    check_show(task)
    ((image, _),) = seen["input"]
    assert image.shape == task.data.test[0][0][0].shape
    assert set(seen["output"][0]) == {"boxes", "scores", "labels"}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (np.zeros((4, 6), np.uint8), "uint8 of shape (4, 6)"),
        (np.zeros((3, 4, 6), np.uint8), "uint8 of shape (3, 4, 6)"),
        (np.zeros((4, 6, 3)), "float64 of shape (4, 6, 3)"),
        (np.zeros((0, 6, 3), np.uint8), "uint8 of shape (0, 6, 3)"),
        (torch.zeros(4, 6, 3), "float32 of shape (4, 6, 3)"),
        ("no picture", "a str"),
    ],
)
def test_a_function_that_returns_no_picture(returned, words):
    with pytest.raises(ModelError) as caught:
        check_show(digits(lambda kind, value: GRAY if kind == "input" else returned))
    assert str(caught.value) == (
        f"task.show must return a picture, uint8 of shape (height, width, 3), or None, but for 'target' it returned {words}; "
        "correct the function."
    )


def test_a_function_that_fails():
    with pytest.raises(ModelError) as caught:
        check_show(digits(lambda kind, value: GRAY if kind != "output" else value["depth"]))
    assert str(caught.value).startswith(
        "task.show must return a picture, or None where there is nothing to draw, but for 'output' and a value of shape (10,) it "
        "raised IndexError: too many indices for tensor of dimension 1"
    )


def test_a_task_that_draws_nothing_is_not_asked():
    check_show(digits(None))


def test_a_study_file_names_the_function():
    spec = parse_spec(nets.SMALL, source="small.toml", overrides=["task.show=tests.task.test_showing:gray"])
    assert load_task(spec).show is gray
    assert load_task(parse_spec(nets.SMALL, source="small.toml")).show is None
    with pytest.raises(SpecError, match=r"task\.show must be 'package\.module:name', but got 'gray'"):
        parse_spec(nets.SMALL, source="small.toml", overrides=["task.show=gray"])
    with pytest.raises(
        SpecError, match=r"task\.show: module 'tests\.task\.test_showing' has no 'grey'\. Did you mean 'gray'\?"
    ):
        load_task(parse_spec(nets.SMALL, source="small.toml", overrides=["task.show=tests.task.test_showing:grey"]))


def gray(kind, value):
    return GRAY


def test_pictures_of_confidences():
    disparities, targets = torch.rand(1, 16, 20), torch.tensor([[[1.0, 0.0, torch.nan]]])
    assert confidence.show("input", disparities).shape == (16, 20, 3)
    assert confidence.show("target", targets).tolist() == [[[255, 255, 255], [214, 51, 51], [0, 0, 0]]]
    with torch.no_grad():
        logits = ccnn()(disparities[None])[0]
    picture = confidence.show("output", logits)
    assert picture.shape == (8, 12, 3)
    assert (picture == picture[..., :1]).all()
    assert abs(int(picture[0, 0, 0]) - 255 * float(logits[0, 0, 0].sigmoid())) <= 1
    assert confidence.show("input", torch.zeros(1, 2, 2)).tolist() == [[[68, 1, 84]] * 2] * 2


def test_nested_values():
    data = nested.splits(lambda image, vector, label: ((image, vector), label), classes=2)
    kinds = []
    check_show(Task(nested.TwoInputs(), data, show=lambda kind, value: kinds.append((kind, type(value).__name__))))
    assert kinds == [("input", "tuple"), ("target", "Tensor"), ("output", "Tensor")]
