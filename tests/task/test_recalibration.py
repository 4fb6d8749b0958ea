"""Recalibration: the statistics of normalisation layers are measured again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from ranksearch.data import Splits, batches
from ranksearch.task import training
from ranksearch.task.task import Task
from tests import nets

CPU = torch.device("cpu")


def test_recalibration_measures_the_statistics_of_the_training_split(trained):
    model = copy.deepcopy(trained.model)
    norm = model.norm1
    norm.running_mean.fill_(100.0)
    momentum = norm.momentum
    training.recalibrate(model, trained, seed=0, device=CPU)
    with torch.no_grad():
        maps = model.conv1(trained.data.train.tensors[0])
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == momentum


def by_class(count=3000):
    """A split like that of a folder of images: sorted by class, and each class has its own mean."""
    targets = torch.arange(count) * 10 // count
    return TensorDataset(targets[:, None, None, None] + torch.randn(count, 1, 2, 2), targets)


class Shuffling(TensorDataset):
    """A data set with random inputs, as after augmentation."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + torch.rand(()), target


def statistics(split, seed, **options):
    model = nn.Sequential(nn.BatchNorm2d(1))
    task = Task(model, Splits(split, split, split, 10, ""))
    training.recalibrate(model, task, seed=seed, device=CPU, **options)
    return float(model[0].running_mean), float(model[0].running_var)


@pytest.mark.parametrize("count", [500, 3000])
def test_recalibration_sees_every_class_of_a_sorted_split(count):
    torch.manual_seed(0)
    mean, var = statistics(by_class(count), seed=0, inputs=1000)
    assert mean == pytest.approx(4.5, abs=0.4)
    assert var == pytest.approx(8.25 + 1, rel=0.1)  # variance of the ten means plus variance within a class


@pytest.mark.parametrize("kind", [TensorDataset, Shuffling])
def test_recalibration_follows_its_seed_alone(kind):
    split = kind(*by_class(400).tensors)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one = statistics(split, seed=1, inputs=300)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    assert statistics(split, seed=1, inputs=300) == one
    assert statistics(split, seed=2, inputs=300) != one


def test_recalibration_reads_no_more_inputs_than_it_says():
    class Counting(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen = []
    statistics(Counting(*by_class(3000).tensors), seed=0, inputs=300)
    assert len(set(seen)) == 300
    assert len(seen) == 301, "the first once more, for its size"


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (256, 1), (257, 2), (300, 2), (1030, 5)])
def test_recalibration_counts_all_inputs_alike(count, batches):
    """Batches are of equal size: a small last batch would count as much as a full one, or fail with one value a channel."""
    split = TensorDataset(10 * torch.randn(count, 3, 2), torch.zeros(count).long())
    model = nn.Sequential(nn.BatchNorm1d(3))
    training.recalibrate(model, Task(model, Splits(split, split, split, 10, "")), seed=0, device=CPU)
    torch.testing.assert_close(model[0].running_mean, split.tensors[0].mean((0, 2)), atol=0.02, rtol=0)
    assert int(model[0].num_batches_tracked) == batches


def test_recalibration_without_normalisation_changes_nothing(trained):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = copy.deepcopy(model.state_dict())
    training.recalibrate(model, trained, seed=0, device=CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_recalibration_leaves_what_is_not_called_as_it_is(trained):
    """One normalisation is in another branch; of another the forward itself uses the statistics."""

    def forward(net, inputs):
        inner = F.batch_norm(net.conv(inputs), net.taken.running_mean, net.taken.running_var, training=net.taken.training)
        return net.last(net.called(inner).flatten(1))

    torch.manual_seed(0)
    model = nets.Net(
        forward, conv=nn.Conv2d(1, 4, 3), taken=nn.BatchNorm2d(4), called=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4),
        last=nn.Linear(4 * 6 * 6, 10),
    )  # fmt: skip
    for norm in (model.taken, model.called, model.other):
        norm.running_mean.fill_(3.0)
        norm.num_batches_tracked.fill_(7)
    before = copy.deepcopy(model.state_dict())
    training.recalibrate(model, Task(model, trained.data), seed=0, device=CPU)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"called.running_mean", "called.running_var", "called.num_batches_tracked"}
    with torch.no_grad():
        inner = F.batch_norm(
            model.conv(next(batches(trained.data.train, 2000))[0]), model.taken.running_mean, model.taken.running_var
        )
    torch.testing.assert_close(after["called.running_mean"], inner.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
