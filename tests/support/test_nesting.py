"""Nested values: what is taken apart is put together again, in the same types."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from ranksearch.support.nesting import (
    PerInput,
    as_plain,
    is_plain,
    map_tensors,
    named_tensors,
    nesting,
    parts_of,
    rebuilt,
    tensors_in,
)
from tests.nested import ModelOutput

Pair = namedtuple("Pair", ["first", "second"])
ONE, TWO = torch.zeros(1), torch.ones(2)


@dataclass(frozen=True)
class Found:
    boxes: torch.Tensor
    scores: torch.Tensor


VALUES = [
    (ONE, TWO), [ONE, TWO], {"a": ONE, "b": TWO}, OrderedDict(a=ONE, b=TWO), ModelOutput(a=ONE, b=TWO), UserDict(a=ONE, b=TWO),
    Pair(ONE, TWO), Found(ONE, TWO), PerInput([ONE, TWO]), torch.max(torch.eye(2), 0),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_parts_make_the_value_again(value):
    again = rebuilt(value, parts_of(value))
    assert type(again) is type(value)
    assert len(tensors_in(again)) == 2
    assert all(one is other for one, other in zip(tensors_in(again), tensors_in(value), strict=True))
    doubled = map_tensors(lambda tensor: tensor + 1, value)
    assert type(doubled) is type(value)
    assert [tensor.tolist() for tensor in tensors_in(doubled)] == [(tensor + 1).tolist() for tensor in tensors_in(value)]


def test_attributes_follow_the_entries():
    moved = map_tensors(lambda tensor: tensor + 5, ModelOutput(logits=ONE))
    assert moved.logits is moved["logits"]
    assert float(moved.logits) == 5


def test_words_and_names():
    value = {"image": ONE, "boxes": PerInput([(ONE, 3)]), "other": [TWO, Pair(ONE, None)]}
    assert nesting(value) == "{'image': tensor, 'boxes': list of (tensor, int), 'other': [tensor, (tensor, NoneType)]}"
    assert list(named_tensors(value, "x")) == ["x.image", "x.boxes.0.0", "x.other.0", "x.other.1.0"]
    assert list(named_tensors(ONE, "x")) == ["x"]


def test_plain_dicts():
    value = (ModelOutput(found=Found(ONE, TWO)), Pair(ONE, TWO))
    assert not is_plain(value)
    plain = as_plain(value)
    assert is_plain(plain)
    assert plain == ({"found": {"boxes": ONE, "scores": TWO}}, Pair(ONE, TWO))
