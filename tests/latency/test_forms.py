"""Layers are merged where they are faster dense, and only if the whole model is then no slower."""

from __future__ import annotations

import copy

import pytest
import torch

from ranksearch.compress.inventory import inventory
from ranksearch.compress.surgery import factorize_
from ranksearch.data import example
from ranksearch.errors import ModelError, StudyError
from ranksearch.latency.forms import Forms, time_forms
from ranksearch.latency.runtimes import OnnxRuntime, Torch, UserFunction
from ranksearch.plan import CP, SVD, Plan
from ranksearch.support.batch import repeat_batch
from tests import nets
from tests.conftest import PLAN


def by_parameters(module, inputs):
    """Factors are always faster."""
    return sum(parameter.numel() for parameter in module.parameters())


def by_layers(module, inputs):
    """A dense layer is always faster."""
    assert not module.training
    assert module(inputs).isfinite().all()
    return sum(1 for child in module.modules() if hasattr(child, "weight"))


def slower_whole(module, inputs):
    """A dense layer is always faster by itself, and never in the whole model."""
    layers = by_layers(module, inputs)
    return 100 - layers if hasattr(module, "conv1") else layers


def not_a_time(module, inputs):
    return None


def timed(trained, runtime, plan=PLAN, count=3):
    model = factorize_(copy.deepcopy(trained.model), plan).eval()
    state = copy.deepcopy(model.state_dict())
    one = example(trained.data.validation)
    found = time_forms(model, plan, inventory(trained.model, one), runtime, repeat_batch(one, count))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return found


@pytest.mark.parametrize(
    ("function", "plan", "merged", "words"),
    [
        (by_parameters, PLAN, (), "no layer merged: none is faster dense in mine"),
        (
            by_layers,
            PLAN,
            ("conv1", "conv2", "fc1"),
            "merged conv1 (3 -> 1 ms), conv2 (3 -> 1 ms), fc1 (2 -> 1 ms); the whole model 10 -> 5 ms, in mine",
        ),
        (
            slower_whole,
            Plan.of({"fc1": SVD(6)}),
            (),
            "no layer merged: fc1 (2 -> 1 ms) alone, but the whole model 94 -> 95 ms, in mine",
        ),
        (by_layers, Plan(), (), "no layer merged: none is faster dense in mine"),
    ],
)
def test_what_is_merged_and_why(trained, function, plan, merged, words):
    found = timed(trained, UserFunction(function, "mine"), plan)
    assert found.layers.keys() == dict(plan).keys()
    assert found.to_merge == merged
    assert found.words("mine") == words


def test_times_that_differ_little_count_as_equal():
    found = Forms({"a": (1.0, 0.96), "b": (1.0, 0.94), "c": (1.0, 1.5)}, (3.0, 2.9))
    assert found.to_merge == ("b",)


@pytest.mark.parametrize("runtime", [Torch(torch.device("cpu")), OnnxRuntime()], ids=lambda runtime: runtime.name)
def test_both_forms_are_timed_where_the_model_runs(trained, runtime):
    found = timed(trained, runtime, Plan.of({"conv2": CP(16)}), count=1)
    assert all(ms > 0 for ms in found.layers["conv2"])
    assert (found.whole is None) == (not found.faster_dense)


def test_a_runtime_that_gives_no_time_is_refused(trained):
    with pytest.raises(StudyError, match="must return milliseconds, a finite number above 0, but returned nan"):
        timed(trained, UserFunction(lambda module, inputs: float("nan"), "mine"))


def test_a_model_that_the_runtime_refuses(trained):
    model = nets.Net(lambda net, x: net.fc(x.flatten(1)) if len(x.tolist()) else x, fc=torch.nn.Linear(64, 10)).eval()
    one = example(trained.data.validation)
    plan = Plan.of({"fc": SVD(2)})
    layers = inventory(model, one)
    factorize_(model, plan)
    model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ModelError, match=r"latency\.runtime onnxruntime must take the model, but ZeroDivisionError"):
        time_forms(model, plan, layers, OnnxRuntime(), one)
