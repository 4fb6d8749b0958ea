"""Batches of any nesting: cutting and joining gives the same batch."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ranksearch.data import Batched
from ranksearch.errors import DataError
from ranksearch.support.batch import (
    batch_shapes,
    batch_size,
    batch_to,
    concatenate,
    input_shapes,
    join_outputs,
    run_model,
    split_batch,
)
from ranksearch.support.nesting import PerInput, tensors_in

NESTED = {
    "tensor": torch.rand(7, 3),
    "pair": (torch.rand(7, 3), torch.arange(7)),
    "deep": {"image": torch.rand(7, 1, 2, 2), "meta": [torch.rand(7), (torch.tensor(3.0), 5, "name")]},
}


@pytest.mark.parametrize("batch", NESTED.values(), ids=NESTED)
@settings(deadline=None)
@given(size=st.integers(1, 9))
def test_parts_of_a_batch_join_to_it(batch, size):
    parts = list(split_batch(batch, size))
    assert [batch_size(part) for part in parts] == [min(size, 7 - start) for start in range(0, 7, size)]
    joined = concatenate(parts)
    assert batch_shapes(joined) == batch_shapes(batch)
    assert_close(tensors_in(joined), tensors_in(batch), rtol=0, atol=0)


@pytest.mark.parametrize("batch", NESTED.values(), ids=NESTED)
def test_a_batch_moves_whole(batch):
    moved = batch_to(batch, torch.device("meta"))
    assert all(tensor.is_meta for tensor in tensors_in(moved))
    assert batch_shapes(moved) == batch_shapes(batch)


@pytest.mark.parametrize("batch", [(torch.rand(2), torch.rand(3)), {}, [torch.tensor(1.0)]], ids=["differ", "empty", "scalar"])
def test_a_batch_has_one_size(batch):
    message = f"The tensors of a batch must all have the same first size, but have shapes {batch_shapes(batch)}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        batch_size(batch)


@pytest.mark.parametrize(
    ("function", "inputs", "result"),
    [
        (lambda a, b: a - b, (3, 1), 2),
        (lambda a, b: a - b, {"b": 1, "a": 3}, 2),
        (lambda a, b=1: a - b, {"a": 3}, 2),
        (lambda *all: sum(all), (3, 1), 4),
        (lambda **all: all["x"], {"x": 3}, 3),
        (lambda pair: pair[0] - pair[1], (3, 1), 2),
        (lambda pair: pair[0] - pair[1], [3, 1], 2),
        (lambda a, b=5: a[0] - b, [3, 1], -2),
        (lambda both: both["a"] + both["b"][0], {"a": 1, "b": (2, 3)}, 3),
        (lambda both, flag=False: both["a"], {"a": 1}, 1),
        (lambda both: both[0], {0: 1}, 1),
    ],
)
def test_how_a_model_is_called(function, inputs, result):
    assert run_model(function, inputs) == result


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (1, 2, 3),
            r"A tuple of inputs must hold the arguments of the model's forward \(image, vector\), but holds 3 values; change the data set, or wrap the model\.",
        ),
        (
            {"image": 1, "vektor": 2},
            r"A dict of inputs must hold the arguments of the model's forward \(image, vector\) by name, but has the keys image, vektor; rename its keys, or wrap the model\.",
        ),
        ({"image": 1}, r"but has the keys image; rename"),
    ],
)
def test_inputs_that_are_not_the_arguments_of_the_model(inputs, message):
    with pytest.raises(DataError, match=message):
        run_model(lambda image, vector: None, inputs)


def test_a_list_per_input_is_cut_and_joined_with_the_tensors():
    batch = {"images": PerInput([torch.zeros(3, size, 5) for size in (4, 5, 6)]), "scale": torch.rand(3)}
    assert batch_size(batch) == 3
    parts = list(split_batch(batch, 2))
    assert [len(part["images"]) for part in parts] == [2, 1]
    assert isinstance(parts[0]["images"], PerInput)
    assert batch_shapes(concatenate(parts)) == batch_shapes(batch)
    assert input_shapes(batch) == {"images": [(3, 4, 5), (3, 5, 5), (3, 6, 5)], "scale": ()}


def test_a_split_that_makes_nested_batches_gives_single_inputs():
    class Both(Batched):
        def __len__(self):
            return 5

        def batch(self, chosen, device):
            return {"image": chosen[:, None].float().expand(-1, 3), "index": (chosen,)}, chosen

        def only(self, chosen):
            raise NotImplementedError

    inputs, target = Both()[-1]
    assert (inputs["image"].tolist(), int(inputs["index"][0]), int(target)) == ([4, 4, 4], 4, 4)


def found(*counts):
    return [{"boxes": torch.zeros(count, 4)} for count in counts]


def test_outputs_of_several_batches():
    """A list with an entry for each input is joined to a longer list, one of several scales entry by entry."""
    joined = join_outputs([found(1, 2), found(7), found(3, 0)], [2, 1, 2])
    assert [len(each["boxes"]) for each in joined] == [1, 2, 7, 3, 0]
    scales = join_outputs([[torch.zeros(2, 3), torch.zeros(2, 5)], [torch.ones(1, 3), torch.ones(1, 5)]], [2, 1])
    assert batch_shapes(scales) == [(3, 3), (3, 5)]
    boxes = join_outputs([[torch.zeros(1, 4)], [torch.ones(1, 4)]], [1, 1], per_input=True)
    assert isinstance(boxes, PerInput)
    assert len(boxes) == 2
    nested = join_outputs(
        [{"found": found(1, 2), "score": torch.zeros(2)}, {"found": found(3), "score": torch.zeros(1)}], [2, 1]
    )
    assert (len(nested["found"]), len(nested["score"])) == (3, 3)
    with pytest.raises(ValueError, match="Batches must have the same nesting to be joined, but differ"):
        join_outputs([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], [1, 1])
