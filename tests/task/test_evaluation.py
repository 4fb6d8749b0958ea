"""The start of a plan's training: weights decomposed at once, layer by layer as in the thesis, or drawn at random."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ranksearch
from ranksearch.compress.scratch import scratch_
from ranksearch.compress.surgery import factorize_
from ranksearch.data import example
from ranksearch.errors import ModelError, SpecError
from ranksearch.plan import CP, SVD, Plan, Tucker2
from ranksearch.results.messages import Job, Result, Stage
from ranksearch.spec import Finalists
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nets
from tests.conftest import PLAN, essence, tiny_spec


def result(evaluator, stage=Stage.FINALIST, plan=PLAN, seed=0):
    *_, last = evaluator(Job(0, plan, seed, stage))
    assert isinstance(last, Result)
    return last


def test_layerwise_trains_after_each_layer(evaluator):
    """The learning curve continues through all layers, and training before a layer is decomposed is kept."""
    found = result(evaluator(schedule="layerwise"))
    assert [curve_point.epochs for curve_point in found.curve] == [0, 1, 2, 3, 4, 5, 6]
    at_once = result(evaluator())
    assert [curve_point.epochs for curve_point in at_once.curve] == [0, 1, 2]
    assert found.weights != at_once.weights
    assert result(evaluator(schedule="layerwise")).weights == found.weights
    # fc1 is decomposed first and alone, from the dense weights.
    first = result(evaluator(), plan=Plan.of({"fc1": SVD(6)}))
    assert first.curve[0].score == pytest.approx(found.curve[0].score, abs=0.02)
    assert found.score_test > 0.5


def test_layerwise_at_full_rank_is_training_the_dense_net(evaluator, trained):
    """Each layer is decomposed from its current weights, so at full rank nothing is lost."""
    full = Plan.of({"conv2": Tucker2(8, 16), "fc1": SVD(32)})
    model = copy.deepcopy(trained.model)
    runs = evaluator(schedule="layerwise")._steps(model, Job(0, full, 0, Stage.FINALIST))
    inputs = example(trained.data.validation)
    with torch.no_grad():
        for _ in range(2):
            for parameter in model.parameters():
                parameter.mul_(1.1)  # in place of training
            before = model.eval()(inputs)
            next(runs)
            torch.testing.assert_close(model.eval()(inputs), before, rtol=1e-3, atol=1e-3)


def test_only_finalists_are_layerwise(evaluator):
    trial = result(evaluator(schedule="layerwise"), Stage.TRIAL)
    assert [curve_point.epochs for curve_point in trial.curve] == [0, 1]


def test_a_net_from_scratch_knows_nothing_of_the_dense_one(trained):
    def weights(seed, scale):
        dense = copy.deepcopy(trained.model)
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.mul_(scale)
        torch.manual_seed(9)
        before = torch.random.get_rng_state()
        model = scratch_(dense, PLAN, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    one, other, next_seed = weights(0, 1.0), weights(0, 3.0), weights(1, 1.0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["conv1.reduce.weight"], next_seed["conv1.reduce.weight"])
    assert not torch.equal(one["fc2.weight"], next_seed["fc2.weight"])
    expected = factorize_(copy.deepcopy(trained.model), PLAN).state_dict()
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert one["norm1.running_mean"].abs().max() == 0


class Gained(nn.Module):
    """A block whose own `reset_parameters` also resets the layer in it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        self.conv.reset_parameters()
        nn.init.ones_(self.gain)

    def forward(self, inputs):
        return self.gain * self.conv(inputs)


def test_blocks_and_statistics_start_anew():
    model = nn.Sequential(Gained(), nn.BatchNorm2d(16, affine=False))
    nn.init.zeros_(model[0].gain)
    model(torch.randn(4, 3, 8, 8) + 5)
    fresh = scratch_(model, Plan.of({"0.conv": CP(2)}), seed=0)
    assert fresh[0].gain == 1
    assert fresh[1].running_mean.abs().max() == 0


def test_a_net_from_scratch_learns(evaluator):
    found = result(replace(evaluator(scratch=True), finalists=Finalists(8, 32, 1e-2)))
    assert found.curve[0].score < 0.4
    assert found.curve[-1].score > found.curve[0].score + 0.3


def test_a_model_that_cannot_be_drawn_anew():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.net = nets.small()

        def forward(self, inputs):
            return self.scale * self.net(inputs)

    with pytest.raises(
        ModelError,
        match=r"each module that holds parameters has reset_parameters\(\), but 'the model', a Scaled, does not; add that method, or use space.start = 'decomposed'",
    ):
        scratch_(Scaled(), Plan(), seed=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finalists.schedule=layerwise"], "finalists.schedule must be one-shot and finalists.sweeps 0 where space.start is scratch, which decomposes no weights, but got layerwise and 0"),
        (["finalists.sweeps=2"], "but got one-shot and 2"),
        (["space.start=decomposed", "finalists.schedule=layerwise", "finalists.epochs=0"], "finalists.epochs must be at least 1 where finalists.schedule is layerwise, but got 0"),
    ],
)  # fmt: skip
def test_starts_and_schedules_that_exclude_each_other(overrides, message):
    with pytest.raises(SpecError, match=message):
        tiny_spec("space.start=scratch", *overrides)


def test_weights_that_are_computed_are_not_drawn_anew():
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(1, 2, 3)), torch.nn.Conv2d(2, 2, 3))
    prune.random_unstructured(model[1], "weight", amount=0.5)
    for inner in (model, torch.nn.Sequential(model[1])):
        with pytest.raises(
            ModelError, match="if its layers store their weights directly, but '0' computes its weight from other"
        ):
            scratch_(inner, Plan(), seed=0)


def test_a_model_that_cannot_be_copied(trained, tmp_path):
    with pytest.raises(
        ModelError,
        match=r"It must be possible to copy the model, but copy.deepcopy raised TypeError: .*; keep open files and the like outside",
    ):
        ranksearch.search(replace(trained, model=nets.uncopyable()), out=tmp_path / "mine")


@pytest.mark.slow
@pytest.mark.parametrize("override", ["space.start=scratch", "finalists.schedule=layerwise"])
def test_studies_from_scratch_or_layerwise_resume(bare, override, tmp_path):
    def study(trials, out):
        return run_study(tiny_spec(override, f"search.trials={trials}"), out, Options(Local(0)))

    whole = study(3, tmp_path / "whole" / "small")
    study(2, tmp_path / "small")
    resumed = study(3, tmp_path / "small")
    assert [trial[:9] for trial in essence(resumed.trials)] == [trial[:9] for trial in essence(whole.trials)]
    assert whole.front


def test_a_net_with_frozen_weights_does_not_start_from_scratch():
    model = nets.small()
    model.conv1.requires_grad_(False)
    words = (
        "A net can only start from scratch if all its weights are trainable, but 'conv1.weight' is frozen; call requires_grad_"
    )
    with pytest.raises(ModelError, match=words):
        scratch_(model, PLAN, seed=0)
