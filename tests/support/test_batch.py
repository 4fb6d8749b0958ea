"""Batches of any nesting: cutting and joining gives the same batch."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ranksearch.support.batch import batch_shapes, batch_size, batch_to, concatenate, run_model, split_batch, tensors_in

NESTED = {
    "tensor": torch.rand(7, 3),
    "pair": (torch.rand(7, 3), torch.arange(7)),
    "deep": {"image": torch.rand(7, 1, 2, 2), "meta": [torch.rand(7), (torch.tensor(3.0), 5, "name")]},
}


@pytest.mark.parametrize("batch", NESTED.values(), ids=NESTED)
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


def test_a_model_is_given_the_batch_as_one_argument():
    assert run_model(lambda both: both["a"] + both["b"][0], {"a": 1, "b": (2, 3)}) == 3
