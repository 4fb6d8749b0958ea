"""State dicts survive safetensors: tensors of every type, and the versions of modules."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from ranksearch.compress.saved import load_model, write_model
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import check_state, digest_of, load_, state_of, weights_of
from ranksearch.console import Silent
from ranksearch.errors import ModelError
from ranksearch.plan import SVD, Plan
from ranksearch.study.dense import load_weights, train_dense
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from ranksearch.task.task import Task
from tests import nets
from tests.conftest import small_spec

pytestmark = pytest.mark.usefixtures("bare")

PLAN = Plan.of({"net.fc1": SVD(2)})


def held(model):
    state = model.state_dict()
    return state._metadata, {name: tensor.clone() for name, tensor in state.items()}


def assert_same(model, other):
    (versions, state), (others, found) = held(model), held(other)
    assert versions == others
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) and state[name].dtype == found[name].dtype for name in state)


def odd_buffers():
    model = nets.small()
    for kind in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        model.register_buffer(f"of_{kind}".replace(".", "_"), torch.arange(4).to(kind))
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("scalar", torch.tensor(2.5))
    model.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    return model


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class Extra(nn.Linear):
    """A layer that adds a tensor to its state dict beside its weights."""

    def __init__(self):
        super().__init__(4, 4)
        self.seen = 0

    def get_extra_state(self):
        return torch.tensor(self.seen)

    def set_extra_state(self, state):
        self.seen = int(state)


@pytest.mark.parametrize("make", [nets.small, nets.versioned, odd_buffers, tied, Extra])
def test_a_state_comes_back(make):
    torch.manual_seed(1)
    model = make()
    state = state_of(weights_of(model))
    torch.manual_seed(2)
    assert_same(model, load_(make(), state))
    assert weights_of(model) == weights_of(copy.deepcopy(model))


def test_a_digest_is_of_tensors_alone():
    model = nets.versioned()
    before = digest_of(model)
    nets.Versioned._version, kept = 3, nets.Versioned._version
    try:
        assert digest_of(model) == before
    finally:
        nets.Versioned._version = kept
    model.net.fc2.bias.data += 1
    assert digest_of(model) != before


def test_the_version_that_wrote_a_state_is_told_to_the_module_that_loads_it(monkeypatch):
    model = nets.versioned()
    weights = weights_of(model)
    monkeypatch.setattr(nets.Versioned, "_version", 3)
    load_(model, state_of(weights))
    assert model.loaded == 2
    with monkeypatch.context() as patch:
        patch.setattr(nets.Versioned, "_version", 1)
        weights = weights_of(model)
    with pytest.raises(ValueError, match="version must be 2 or 3, but is 1"):
        load_(model, state_of(weights))


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.pt"])
def test_a_file_without_versions_is_read_as_a_current_one(tmp_path, name):
    model, path = nets.versioned(), tmp_path / name
    state = dict(model.state_dict())
    safetensors.torch.save_file(state, path) if name.endswith("tensors") else torch.save(state, path)
    other = nets.versioned()
    assert load_weights(other, path)
    assert_same(model, other)
    assert other.loaded == 2


def test_a_file_from_before_there_were_versions_is_read_too(tmp_path):
    model, path = nets.small(), tmp_path / "mine.safetensors"
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    safetensors.torch.save_file(state, path)
    assert load_weights(nets.small(), path)
    safetensors.torch.save_file({name: value for name, value in state.items() if name != "fc2.bias"}, path)
    with pytest.raises(ModelError, match=r"but it lacks norm1.num_batches_tracked and 1 more"):
        load_weights(nets.small(), path)


def test_a_file_that_the_models_own_loader_refuses_is_one_sentence(tmp_path):
    model, path = nets.versioned(), tmp_path / "mine.pt"
    state = OrderedDict(model.state_dict())
    state._metadata = {"": {"version": 1}}
    torch.save(state, path)
    with pytest.raises(ModelError, match=r"mine.pt must be a state dict of the model, but version must be 2 or 3, but is 1"):
        load_weights(model, path)


def test_a_state_dict_that_holds_more_than_tensors():
    class Stateful(torch.nn.Conv2d):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(
        ModelError, match=r"A model's state_dict\(\) must hold tensors only, but '0._extra_state' is a dict; keep it elsewhere"
    ):
        check_state(torch.nn.Sequential(Stateful(4, 4, 1)))


def test_versions_survive_saving_and_loading(tmp_path):
    model = factorize_(nets.versioned(), PLAN).eval()
    write_model(tmp_path, PLAN, weights_of(model))
    assert_same(model, load_model(nets.versioned(), tmp_path))


def test_a_trained_dense_net_keeps_its_versions(tmp_path):
    task = Task(nets.versioned(), nets.few_digits())
    train_dense(task, small_spec("dense.epochs=1"), torch.device("cpu"), Silent(), unfinished=tmp_path / "dense.pt")
    assert task.model.loaded == 2


@pytest.mark.slow
def test_a_study_of_a_net_with_a_version_runs_to_its_end_and_on(tmp_path):
    for trials in (1, 2):
        spec = small_spec("task.model=tests.nets:versioned", f"search.trials={trials}", "finalists.count=1", "dense.epochs=1")
        record = run_study(spec, tmp_path / "small", Options(Local(0)))
    assert record.front
    for trial in record.front:
        assert load_model(nets.versioned(), tmp_path / "small" / "models" / str(trial.number)).loaded == 2
