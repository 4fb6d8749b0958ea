"""Splits of data: checks, batches, and samples by a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from ranksearch.data import Splits, batches, check_splits, digits, example, sample, sample_inputs, size
from ranksearch.data.images import Images
from ranksearch.errors import DataError
from ranksearch.support.batch import batch_shapes, batch_size
from ranksearch.support.nesting import PerInput


def test_digits_are_split_once_for_all():
    first, second = digits(), digits()
    assert [size(part) for part in (first.train, first.validation, first.test)] == [1077, 360, 360]
    assert example(first.train).shape == (1, 1, 32, 32)
    for one, two in zip(
        (first.train, first.validation, first.test), (second.train, second.validation, second.test), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))
    images = torch.cat([part.tensors[0].flatten(1) for part in (first.train, first.validation, first.test)])
    assert len(images) == 1797
    labels = torch.bincount(first.test.tensors[1])
    assert labels.min() >= 34


class Plain(Dataset):
    """A map-style data set that is no TensorDataset."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index % 3


@pytest.mark.parametrize("split", [Plain(), TensorDataset(torch.arange(14.0).reshape(7, 2), torch.arange(7))])
def test_batches_hold_every_input_once(split):
    for generator in (None, torch.Generator().manual_seed(1)):
        seen = torch.cat([targets for _, targets in batches(split, 4, generator=generator)])
        assert sorted(seen.tolist()) == sorted(targets for _, targets in (split[i] for i in range(7)))


@pytest.mark.parametrize("split", [Plain(), TensorDataset(torch.arange(14.0).reshape(7, 2), torch.arange(7))])
def test_shuffled_batches_of_one_are_all_there(split):
    assert len(list(batches(split, 1, generator=torch.Generator().manual_seed(0)))) == 7


def test_a_last_shuffled_batch_of_one_is_left_out():
    split = TensorDataset(torch.arange(7.0), torch.arange(7))
    generator = torch.Generator().manual_seed(0)
    assert [len(targets) for _, targets in batches(split, 3, generator=generator)] == [3, 3]
    assert [len(targets) for _, targets in batches(Plain(), 3, generator=generator)] == [3, 3]
    assert [len(targets) for _, targets in batches(split, 3)] == [3, 3, 1]


def test_a_subclass_keeps_its_own_items():
    class Negated(TensorDataset):
        def __getitem__(self, index):
            inputs, targets = super().__getitem__(index)
            return -inputs, targets

    ((inputs, _),) = batches(Negated(torch.ones(3, 2), torch.arange(3)), 3)
    assert torch.equal(inputs, -torch.ones(3, 2))


@pytest.mark.parametrize("split", [Plain(), TensorDataset(torch.arange(14.0).reshape(7, 2), torch.arange(7) % 3)])
def test_a_sample_holds_some_inputs_once_with_their_targets(split):
    whole = {tuple(inputs.tolist()): int(target) for inputs, target in (split[i] for i in range(7))}
    for seed in range(5):
        found = [(tuple(inputs.tolist()), int(target)) for inputs, target in (sample(split, 4, seed=seed)[i] for i in range(4))]
        assert size(sample(split, 4, seed=seed)) == len(dict(found)) == 4
        assert dict(found).items() <= whole.items()
        assert found == sorted(found)
    assert sample(split, 7, seed=0) is sample(split, 99, seed=0) is split


def test_a_sample_follows_its_seed_and_leaves_out_nothing_for_good():
    split = TensorDataset(torch.arange(1000))

    def drawn(seed):
        return set(sample(split, 100, seed=seed).tensors[0].tolist())

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set().union(*(drawn(seed) for seed in range(100))) == set(range(1000))


def test_splits_that_are_no_pairs():
    three = TensorDataset(torch.zeros(2), torch.zeros(2).long(), torch.zeros(2))
    with pytest.raises(
        DataError, match=r"A split must hold pairs \(input, target\) of tensors or numbers, but 'train' does not"
    ):
        check_splits(Splits(three, three, three, 10, ""))
    with pytest.raises(DataError, match="Each split must be a map-style Dataset, but 'train' is a NoneType"):
        check_splits(Splits(None, three, three, 10, ""))
    with pytest.raises(DataError, match=r"classes must be the number of classes or None, but got \['cat', 'dog'\]"):
        check_splits(Splits(three, three, three, ["cat", "dog"], ""))
    pairs = TensorDataset(torch.zeros(2, 1), torch.zeros(2).long())
    check_splits(Splits(pairs, pairs, pairs, np.int64(10), ""))


def test_batches_follow_the_generator():
    split = TensorDataset(torch.arange(50.0), torch.arange(50))

    def order(seed):
        return torch.cat([t for _, t in batches(split, 8, generator=torch.Generator().manual_seed(seed))])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def splits(inputs=None, targets=None, classes=10):
    good = TensorDataset(torch.zeros(4, 2), torch.arange(4))
    inputs = torch.zeros(4, 2) if inputs is None else inputs
    return Splits(good, TensorDataset(inputs, torch.arange(4) if targets is None else targets), good, classes, "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (splits(torch.zeros(0, 2), torch.zeros(0).long()), "Each split must hold at least one input, but 'validation' is empty"),
        (splits(torch.full((4, 2), float("nan"))), "Inputs must be finite, but split 'validation' holds NaN or infinity"),
        (splits(targets=torch.tensor([0, 1, 2, 10])), r"Targets must lie in 0\.\.9, but split 'validation' holds 10; correct"),
        (splits(targets=torch.tensor([0, 1, -2, 3])), r"Targets must lie in 0\.\.9, but split 'validation' holds -2; correct"),
        (splits(targets=torch.zeros(4)), "Targets must be one integer class number per input, but split 'validation' holds torch.float32"),
    ],
)  # fmt: skip
def test_data_that_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        check_splits(data)


def test_targets_of_any_kind_without_classes():
    check_splits(splits(targets=torch.rand(4, 5), classes=None))


class Broken(Plain):
    """A data set some of whose inputs cannot be read."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "error", [OSError("cannot identify image file 'x.png'"), KeyError("label"), IndexError("out of range")]
)
def test_inputs_that_cannot_be_read(error):
    good = TensorDataset(torch.zeros(4, 2), torch.arange(4))
    data = Splits(good, Broken(error), good, None, "")
    words = rf"A split must be readable in batches, but 'validation' raised {type(error).__name__}: .*{error.args[0]}"
    with pytest.raises(DataError, match=words):
        check_splits(data)


def test_an_iterable_data_set_is_not_map_style():
    class Counted(IterableDataset):
        def __len__(self):
            return 4

        def __iter__(self):
            return iter([(torch.zeros(2), 0)] * 4)

    good = TensorDataset(torch.zeros(4, 2), torch.arange(4))
    with pytest.raises(DataError, match="Each split must be a map-style Dataset, but 'test' is a Counted"):
        check_splits(Splits(good, good, Counted(), None, ""))


class Nested(Plain):
    """Samples that a function makes of an index."""

    def __init__(self, make, count=7):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.make(index)


def test_tuples_of_inputs_stay_tuples():
    split = Nested(lambda i: ((torch.zeros(2), [i, 2.0]), {"label": i, "more": (torch.ones(3),)}))
    inputs, targets = next(batches(split, 4))
    assert batch_shapes((inputs, targets)) == (((4, 2), [(4,), (4,)]), {"label": (4,), "more": ((4, 3),)})
    check_splits(Splits(split, split, split, None, ""))


def boxes(index):
    return torch.zeros(3, 4, 4 + index), {"boxes": torch.zeros(index, 4)}


def as_lists(samples):
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def test_a_collate_function_gives_lists_with_an_entry_for_each_input():
    data = Splits(*[Nested(boxes)] * 3, None, "", as_lists)
    check_splits(data)
    images, targets = next(batches(data.train, 3))
    assert [image.shape[2] for image in images] == [4, 5, 6]
    assert isinstance(targets, PerInput)
    assert batch_size(example(data.validation)) == 1
    assert len(sample_inputs(data.train, 5, seed=0)) == 5
    assert sorted(len(each["boxes"]) for _, each in (sample(data.test, 4, seed=0)[i] for i in range(4))) != []
    assert size(replace(data, train=Nested(boxes, 3)).train) == 3
    assert replace(data, train=Nested(boxes, 3)).validation is data.validation


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda samples: 1 / 0, r"Splits.collate must make a batch of any samples, but of 7 it raised ZeroDivisionError: division by zero; correct the function\."),
        (lambda samples: {"x": 1}, r"Splits.collate must return a pair \(inputs, targets\), but returned a dict; correct"),
        (lambda samples: (1, 2, 3), r"must return a pair \(inputs, targets\), but returned a tuple of 3; correct"),
        (lambda samples: ([torch.zeros(7), torch.zeros(7)], torch.zeros(7)), r"A list that Splits.collate returns must have an entry for each input, but has 2 for 7 inputs; return a tuple or a dict to nest tensors"),
        (lambda samples: ((torch.zeros(7), torch.zeros(3)), torch.zeros(7)), r"The first dimension of each tensor must count the inputs of a batch, but a batch of split 'train' has the shapes \(\(\(7,\), \(3,\)\), \(7,\)\); correct"),
    ],
)  # fmt: skip
def test_collate_functions_that_are_refused(collate, message):
    data = Splits(*[Nested(boxes)] * 3, None, "", collate)
    with pytest.raises(DataError, match=message):
        check_splits(data)


def test_a_collate_function_of_splits_that_make_their_batches():
    images = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4), torch.zeros(1), torch.ones(1))
    with pytest.raises(
        DataError, match=r"Splits.collate is for splits that give one input at a time, but 'train' is a Images, which"
    ):
        check_splits(Splits(images, images, images, None, "", as_lists))


def test_nestings_that_change():
    def sample(index):
        return {"image": torch.zeros(2)} if index < 512 else {"picture": torch.zeros(2)}, 0

    good = Nested(lambda i: (torch.zeros(2), 0))
    words = r"All batches must be nested alike, but one of split 'train' is \({'picture': tensor}, tensor\) and the first of 'train' is \({'image': tensor}, tensor\); let every sample"
    with pytest.raises(DataError, match=words):
        check_splits(Splits(Nested(sample, 600), good, good, None, ""))
    with pytest.raises(
        DataError, match=r"but one of split 'validation' is \(tensor, tensor\) and the first of 'train' is \({'image"
    ):
        check_splits(Splits(Nested(sample, 5), good, good, None, ""))
    with pytest.raises(DataError, match=r"must be readable in batches, but 'train' raised KeyError"):
        check_splits(Splits(Nested(lambda i: ({str(i): torch.zeros(2)}, 0)), good, good, None, ""))


def test_targets_that_are_no_numbers():
    words = Nested(lambda i: (torch.zeros(2), f"name {i}"))
    with pytest.raises(
        DataError, match=r"A split must hold pairs \(input, target\) of tensors or numbers, but 'train' does not"
    ):
        check_splits(Splits(words, words, words, None, ""))
    nested = Nested(lambda i: (torch.zeros(2), {"label": i}))
    with pytest.raises(
        DataError, match=r"Targets must be one integer class number per input, but split 'train' holds {'label': tensor}; for"
    ):
        check_splits(Splits(nested, nested, nested, 3, ""))


def test_a_first_look_reads_one_batch():
    class Long(Plain):
        read = 0

        def __len__(self):
            return 5000

        def __getitem__(self, index):
            Long.read += 1
            return torch.zeros(2), 0

    check_splits(Splits(Long(), Long(), Long(), None, ""), every_batch=False)
    assert Long.read == 3 * 512
