"""Training: seeds, convergence, divergence, devices and memory formats."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import ranksearch
from ranksearch.console import Silent
from ranksearch.data import Batched, Splits, digits
from ranksearch.models import lenet
from ranksearch.results.messages import Job, Outcome, Stage
from ranksearch.spec import Finalists, Recipe, Search, Space
from ranksearch.study.dense import train_dense
from ranksearch.study.options import Local
from ranksearch.support.seeds import seeded
from ranksearch.task import training
from ranksearch.task.task import Task
from tests import nets
from tests.conftest import PLAN, small_spec

CPU = torch.device("cpu")


class Noisy(Dataset):
    """A data set whose inputs change at random, by numpy and `random`."""

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
            np.random.rand()  # drawn by the caller
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    first = trained(1)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


class Large(Batched):
    """A split whose batches hold one input."""

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


def test_a_seed_decides_everything():
    def weights(seed):
        torch.manual_seed(0)
        task = Task(lenet(channels=1), nets_32())
        for _ in training.fit(task.model, task, training.Recipe(1, batch_size=16), seed=seed, device=CPU):
            torch.rand(3)  # random numbers drawn by the caller must not change the next run
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


def test_a_loss_with_weights_of_its_own_follows_the_model_and_stays_as_it_was():
    moved = []

    class Weighted(nn.CrossEntropyLoss):
        def to(self, device):
            moved.append((self, device))
            return super().to(device)

    loss = Weighted(torch.linspace(0.5, 1.5, 10))
    task = Task(nets.small(), nets.few_digits(), loss)
    for _ in training.fit(task.model, task, training.Recipe(1), seed=0, device=CPU):
        pass
    ((copied, device),) = moved
    assert copied is not loss
    assert device == CPU


def test_fitting_learns(trained):
    task = Task(nets.small(), trained.data)
    before = training.score(task.model, task, task.data.validation, device=CPU)
    for _ in training.fit(task.model, task, training.Recipe(3, learning_rate=1e-2), seed=0, device=CPU):
        pass
    assert training.score(task.model, task, task.data.validation, device=CPU) > before + 0.2


def test_divergence_is_told():
    task = Task(nets.small(), nets.few_digits())
    with pytest.raises(training.Diverged, match="the loss became NaN or infinite"):
        list(training.fit(task.model, task, training.Recipe(2, learning_rate=1e30), seed=0, device=CPU))


def test_memory_of_a_gpu_goes_back_after_every_job(evaluator, monkeypatch):
    told = []
    monkeypatch.setattr(training, "release", lambda device: told.append(device.type))
    for stage in Stage:
        list(replace(evaluator(), controls=Recipe(0))(Job(0, PLAN, 0, stage)))
    assert told == ["cpu"] * len(Stage)


def test_only_a_gpu_has_memory_in_reserve(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    training.release(CPU)
    assert not emptied
    training.release(torch.device("cuda:1"))
    assert emptied
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(2))
    training.release(torch.device("mps"))
    assert emptied == [1, 2]


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_random_numbers_of_a_gpu_follow_the_seed_and_are_given_back(monkeypatch, name):
    device = torch.device(name)
    module = torch.get_device_module(device)
    states, current = {"cuda:0": 5, "cuda:1": 7, "mps": 9}, ["cuda:0" if name != "mps" else "mps"]

    class On:
        def __init__(self, device):
            self.device, self.before = str(device), current[0]

        def __enter__(self):
            current[0] = self.device

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(module, "manual_seed", lambda seed: states.update({current[0]: seed}))
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states.update({str(device): state}))
    before = dict(states)
    with seeded(3, device):
        assert states == before | {name: 3}
    assert states == before


class Viewing(nn.Module):
    """The net of many tutorials: `view` needs contiguous rows, behind a 3x3 and behind a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv1, self.point, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3)
        self.fc = nn.Linear(16 * 4 * 4, 10)

    def forward(self, inputs):
        inner = self.point(self.conv1(inputs)).view(-1, 8, 6, 6)
        return self.fc(self.conv2(inner).relu().view(inputs.size(0), -1))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["decomposed", "scratch"])
def test_a_net_that_views_rows_as_they_lie_is_searched(unreported, tmp_path, start):
    task = Task(Viewing(), nets.few_digits())
    assert not training.takes_channels_last(task)
    record = ranksearch.search(
        task, out=tmp_path / "mine", search=Search(trials=3, sampler="random"),
        space=Space(methods=["tucker2", "cp", "svd", "spatial"], start=start), finetune=Recipe(1), finalists=Finalists(1, count=2),
        engine=Local(0),
    )  # fmt: skip
    assert {trial.outcome for trial in record.trials} == {Outcome.DONE}
    assert record.front
    assert all(trial.finalist.latency_ms for trial in record.front)


def test_a_net_that_flattens_has_its_channels_last():
    assert training.takes_channels_last(Task(nets.small(), nets.few_digits()))


def test_a_dense_net_that_keeps_what_it_computed_can_be_copied(tmp_path):
    def keeping(net, inputs):
        outputs = net.net(inputs)
        if net.training:
            net.kept = outputs.mean()
        return outputs

    task = Task(nets.Net(keeping, net=nets.small()), nets.few_digits())
    before = task.model.net.conv1.weight.clone()
    train_dense(task, small_spec("dense.epochs=1"), CPU, Silent(), unfinished=tmp_path / "dense.pt")
    assert not torch.equal(copy.deepcopy(task.model).net.conv1.weight, before)
