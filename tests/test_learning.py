"""Data, tasks and training: seeds that are used, splits that are checked, statistics that are measured again."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from ranksearch import training
from ranksearch.data import Batched, Splits, batches, check_splits, digits, example, sample, size
from ranksearch.errors import DataError, ModelError
from ranksearch.layers import check_weights
from ranksearch.models import lenet
from ranksearch.tasks import Task, accuracy, check_outputs
from tests import nets

CPU = torch.device("cpu")


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
    with pytest.raises(DataError, match=r"must be None or how many there are, a whole number, but got \['cat', 'dog'\]"):
        check_splits(Splits(three, three, three, ["cat", "dog"], ""))
    pairs = TensorDataset(torch.zeros(2, 1), torch.zeros(2).long())
    check_splits(Splits(pairs, pairs, pairs, np.int64(10), ""))


def test_a_loss_or_score_that_gives_no_number():
    data = nets.few_digits()
    with pytest.raises(ModelError, match=r"The loss must give one number for outputs of shape .* but raised"):
        check_outputs(Task(nets.small(), data, loss=nn.CrossEntropyLoss))
    with pytest.raises(ModelError, match=r"The score must give one number for outputs of shape .* but raised TypeError"):
        check_outputs(Task(nets.small(), data, score=lambda outputs, targets: None))


def test_a_model_that_gives_no_tensor():
    class Pair(nn.Module):
        def forward(self, inputs):
            return inputs, inputs

    with pytest.raises(ModelError, match="The model must give one tensor, in training too, but gives a tuple; wrap it"):
        check_outputs(Task(Pair(), nets.few_digits()))
    auxiliary = nets.Net(lambda net, x: (net.net(x), x) if net.training else net.net(x), net=nets.small())
    with pytest.raises(ModelError, match="The model must give one tensor, in training too, but gives a tuple; wrap it"):
        check_outputs(Task(auxiliary, nets.few_digits()))
    torn = nets.Net(lambda net, x: net.nothing if net.training else net.net(x), net=nets.small())
    with pytest.raises(ModelError, match="The model must run in training mode, but raised AttributeError: 'Net' object has no"):
        check_outputs(Task(torn, nets.few_digits()))


def test_a_model_that_cannot_be_trained():
    frozen, without = nets.small().requires_grad_(False), nets.Net(torch.no_grad()(lambda net, x: net.net(x)), net=nets.small())
    for model in (frozen, without):
        with pytest.raises(
            ModelError, match=r"must be one that can be trained, but its outputs depend on no weight that is; call"
        ):
            check_outputs(Task(model, nets.few_digits()))
        check_outputs(Task(model, nets.few_digits()), trains=False)


def test_weights_that_cannot_be_trained():
    with torch.device("meta"):
        nowhere = nets.small()
    with torch.inference_mode():
        fixed = nets.small()
    with pytest.raises(ModelError, match=r"Weights must be there, but 'conv1.weight' is on the meta device; load the model's"):
        check_weights(nowhere)
    with pytest.raises(ModelError, match=r"Weights must be ones to train, but 'conv1.weight' was made in inference mode; make"):
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


def test_the_accuracy_of_what_is_no_number_is_none():
    outputs = torch.tensor([[0.1, 0.2], [float("nan"), 0.0]])
    assert math.isnan(accuracy(outputs, torch.tensor([1, 1])))


class Noisy(Dataset):
    """Inputs that numpy and `random` change."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((1, 4, 4), np.random.rand() + random.random()), index % 2


def test_training_on_a_users_random_inputs_follows_its_seed_alone():
    def trained(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
        task = Task(model, Splits(Noisy(), Noisy(), Noisy(), 2, ""))
        training.recalibrate(model, task, seed=seed, device=CPU)
        for _ in training.fit(model, task, training.Recipe(2, batch_size=8), seed=seed, device=CPU):
            np.random.rand()  # the caller's own
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    first = trained(1)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


class Large(Batched):
    """Inputs that come one at a time."""

    at_once = 1

    def __len__(self):
        return 12

    def batch(self, chosen, device):
        return torch.ones(len(chosen), 1, 4, 4) * chosen[:, None, None, None], chosen % 2

    def only(self, chosen):
        return self


def test_the_learning_rate_falls_to_nothing_whatever_a_batch_holds():
    def trained(batch_size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        task = Task(model, Splits(Large(), Large(), Large(), 2, ""))
        for _ in training.fit(model, task, training.Recipe(2, batch_size=batch_size), seed=0, device=CPU):
            pass
        return torch.cat([weights.flatten() for weights in model.parameters()])

    assert torch.equal(trained(1), trained(8))


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
        (splits(targets=torch.tensor([0, 1, 2, 10])), r"Targets must lie in 0\.\.9, but split 'validation' holds 10; mend"),
        (splits(targets=torch.tensor([0, 1, -2, 3])), r"Targets must lie in 0\.\.9, but split 'validation' holds -2; mend"),
        (splits(targets=torch.zeros(4)), "Targets must be whole class numbers, one an input, but split 'validation' holds torch.float32"),
    ],
)  # fmt: skip
def test_data_that_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        check_splits(data)


def test_targets_of_any_kind_without_classes():
    check_splits(splits(targets=torch.rand(4, 5), classes=None))


def test_a_classifier_with_too_few_outputs():
    with pytest.raises(ModelError, match=r"The model must give 10 outputs an input, one a class, but gives shape \(4,\)"):
        check_outputs(Task(nets.small(classes=4), nets.few_digits()))


def test_accuracy():
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_a_seed_decides_everything():
    def weights(seed):
        torch.manual_seed(0)
        task = Task(lenet(channels=1), nets_32())
        for _ in training.fit(task.model, task, training.Recipe(1, batch_size=16), seed=seed, device=CPU):
            torch.rand(3)  # what the caller draws in between makes no difference to the next run
        return torch.cat([p.detach().flatten() for p in task.model.parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def nets_32():
    data = digits()

    def few(split):
        return TensorDataset(*(tensor[:48] for tensor in split.tensors))

    return Splits(few(data.train), few(data.validation), few(data.test), 10, "")


def test_fitting_leaves_the_callers_random_numbers_alone(trained):
    task = Task(copy.deepcopy(trained.model), trained.data)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    for _ in training.fit(task.model, task, training.Recipe(1), seed=0, device=CPU):
        pass
    assert torch.equal(torch.rand(4), expected)


def test_fitting_learns(trained):
    task = Task(nets.small(), trained.data)
    before = training.score(task.model, task, task.data.validation, device=CPU)
    for _ in training.fit(task.model, task, training.Recipe(3, learning_rate=1e-2), seed=0, device=CPU):
        pass
    assert training.score(task.model, task, task.data.validation, device=CPU) > before + 0.2


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


def test_divergence_is_told():
    task = Task(nets.small(), nets.few_digits())
    with pytest.raises(training.Diverged, match="the loss became NaN or infinite"):
        list(training.fit(task.model, task, training.Recipe(2, learning_rate=1e30), seed=0, device=CPU))


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
    """A split as a folder of images gives it: sorted by class, each class of its own mean."""
    targets = torch.arange(count) * 10 // count
    return TensorDataset(targets[:, None, None, None] + torch.randn(count, 1, 2, 2), targets)


class Shuffling(TensorDataset):
    """Changes its inputs at random, as augmentation does."""

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
    assert var == pytest.approx(8.25 + 1, rel=0.1)  # of the ten means, and within a class


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
    assert len(seen) == len(set(seen)) == 300


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (256, 1), (257, 2), (300, 2), (1030, 5)])
def test_recalibration_counts_all_inputs_alike(count, batches):
    """A last batch of a few would count as much as a full one; and normalisation of one value a channel would raise."""
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


def test_latencies_are_measured_for_each_model(trained):
    times = training.latencies_ms([trained.model, nn.Flatten()], example(trained.data.train))
    assert len(times) == 2
    assert all(time > 0 for time in times)
