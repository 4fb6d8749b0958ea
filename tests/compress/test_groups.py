"""Nets with groups: found, priced, profiled, saved, merged, narrowed and started from scratch as those without."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress.export import export_model, load_model
from ranksearch.compress.inventory import count_macs, count_params, inventory
from ranksearch.compress.merging import merge_
from ranksearch.compress.narrowing import narrow_, narrowing_of
from ranksearch.compress.preparing import joint_vbmf_ranks, kernel, vbmf_ranks
from ranksearch.compress.profile import profile
from ranksearch.compress.saved import write_model
from ranksearch.compress.scratch import scratch_
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.latency.forms import time_forms
from ranksearch.latency.runtimes import UserFunction
from ranksearch.methods.groups import joint_errors
from ranksearch.plan import CP, CP4, SVD, TT, Plan, Spatial, Tucker2
from ranksearch.spec import Finalists, Recipe, Search
from ranksearch.strategy.space import make_space, size_of
from ranksearch.study.options import Local
from ranksearch.task.task import Task
from tests import nets
from tests.compress.test_inventory_skipped import SMALL_DEPTHWISE
from tests.geometries import BY_NAME, alone, fitting
from tests.nets import normal

EXAMPLE = torch.ones(1, 1, 8, 8)
PLAN = Plan.of({"point": SVD(4), "block": Tucker2(3, 4), "wide": Spatial(2), "fc": SVD(3)})


def grouped(seed=0):
    torch.manual_seed(seed)
    return nets.grouped().eval()


def pictures(count=40):
    return nets.few_digits().validation.tensors[0][:count]


# --- layers and costs ---


def test_a_layer_is_described_by_the_kernel_of_one_group():
    found = inventory(grouped(), EXAMPLE)
    assert found.skipped == {"small": SMALL_DEPTHWISE}
    assert {layer.name: (layer.groups, layer.weight) for layer in found.layers} == {
        "stem": (1, (16, 1, 3, 3)),
        "point": (2, (12, 8, 1, 1)),
        "block": (4, (8, 6, 3, 3)),
        "wide": (32, (1, 1, 5, 5)),
        "fc": (1, (10, 32)),
    }
    for layer in found.layers:
        assert layer.params == count_params(grouped().get_submodule(layer.name))
    assert found.macs == sum(layer.macs for layer in found.layers) + 32 * 9 * 16


def test_the_size_of_a_plan_is_the_counted_one():
    found, draw = inventory(grouped(), EXAMPLE), random.Random(0)
    space = make_space(found, list(BY_NAME))
    methods = {axis.layer.name: {method.kind.method for method in axis.methods} for axis in space.axes}
    assert methods["block"] == {"spatial", "tucker2", "cp", "cp4", "tt"}
    assert methods["wide"] == {"spatial"}
    for _ in range(20):
        values = {axis.layer.name: (axis, draw.choice(axis.methods)) for axis in space.axes}
        plan = Plan.of({name: m.value(a.layer, draw.choice(m.rank_grid(a.layer))) for name, (a, m) in values.items()})
        model, size = factorize_(grouped(), plan), size_of(plan, found)
        assert (size.params, size.macs) == (count_params(model), count_macs(model, EXAMPLE))


# --- profiles ---


def profiled(model, **options):
    found = inventory(model, EXAMPLE)
    return profile(model, found, {layer.name: fitting(layer) for layer in found.layers}, **options)


@pytest.mark.parametrize("data_aware", [True, False])
def test_from_the_cache_as_made_anew(data_aware, tmp_path):
    inputs = pictures() if data_aware else None
    first, again = (profiled(grouped(), inputs=inputs, cache=tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 5
    for name, value in PLAN:
        one, other = first.layers[name], again.layers[name]
        factors = one.factors(value, sweeps=1)
        assert all(torch.equal(a, b) for a, b in zip(factors, other.factors(value, sweeps=1), strict=True))
        correction = one.bias_correction(value, factors)
        assert (correction is None) == (not data_aware or name == "point")
        assert correction is None or torch.equal(correction, other.bias_correction(value, factors))
        assert list(one.candidates()) == list(other.candidates())
        assert one.vbmf == other.vbmf


def test_a_group_has_the_factors_that_it_has_alone():
    """A convolution of the group's channels, for the group's inputs."""
    torch.manual_seed(0)
    whole, inputs = alone(nn.Conv2d(6, 10, 3, groups=2)), normal(60, 6, 7, 7, dtype=torch.float32).cumsum(-1)
    found = profile(whole, inventory(whole, inputs[:1]), {"layer": list(BY_NAME.values())[1:]}, inputs=inputs).layers["layer"]
    for group in range(2):
        part = alone(nn.Conv2d(3, 5, 3))
        part.layer.weight = nn.Parameter(whole.layer.weight[5 * group :][:5].detach().clone())
        few = inputs[:, 3 * group :][:, :3]
        single = profile(part, inventory(part, few[:1]), {"layer": list(BY_NAME.values())[1:]}, inputs=few).layers["layer"]
        for value in (Spatial(4), Tucker2(2, 3), CP(4), CP4(3), TT(2, 4, 3)):
            factors = found.factors(value)
            for factor, wanted in zip(factors, single.factors(value), strict=True):
                torch.testing.assert_close(factor.tensor_split(2)[group], wanted, rtol=1e-3, atol=1e-4)
            correction = found.bias_correction(value, factors).tensor_split(2)[group]
            torch.testing.assert_close(correction, single.bias_correction(value, single.factors(value)), rtol=1e-3, atol=1e-4)


def test_a_trained_layer_is_decomposed_anew():
    model, value = grouped(), Tucker2(2, 3)
    found, other = profiled(model, inputs=pictures()).layers["block"], grouped(seed=1)
    anew = found.of(kernel(other, found.layer), value)
    assert torch.equal(anew.kernel, other.block.weight.detach())
    assert [group.whitening for group in anew.groups] == [group.whitening for group in found.groups]
    full = Tucker2(6, 8)
    rebuilt = BY_NAME["tucker2"].reconstruct(found.of(anew.kernel, full).factors(full), (8, 6, 3, 3), 4)
    torch.testing.assert_close(rebuilt, other.block.weight.detach(), rtol=1e-4, atol=1e-5)


def test_the_vbmf_rank_of_a_layer_is_the_median_of_its_groups():
    draw = torch.Generator().manual_seed(0)

    def of_rank(rank):
        planted = torch.randn(12, rank, generator=draw) @ torch.randn(rank, 90, generator=draw)
        return (planted + 0.01 * torch.randn(12, 90, generator=draw)).reshape(12, 10, 3, 3)

    kernels = [of_rank(rank) for rank in (1, 4, 2, 3)]
    assert [vbmf_ranks(one)[1] for one in kernels] == [1, 4, 2, 3]
    assert joint_vbmf_ranks(kernels)[1] == 3
    zeros = torch.zeros(12, 10, 3, 3)
    assert joint_vbmf_ranks([*kernels, zeros, zeros])[1] == 2
    assert joint_vbmf_ranks([*kernels[:2], *[zeros] * 3])[1] is None


def test_the_error_of_several_kernels_is_that_of_all_their_numbers():
    kernels, rebuilt = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    errors = [[float((b - a).norm() / a.norm())] for a, b in zip(kernels, rebuilt, strict=True)]
    wanted = float((rebuilt - kernels).norm() / kernels.norm())
    assert joint_errors(errors, [float(one.norm()) for one in kernels]) == pytest.approx([wanted])
    assert joint_errors([[0.0], [0.0]], [0.0, 0.0]) == [0.0]


def test_a_group_whose_inputs_never_change_costs_no_error():
    model = alone(nn.Conv2d(4, 6, 1, groups=2)).double()
    inputs = normal(50, 4, 3, 3)
    inputs[:, 2:] = 1.0
    found = profile(model, inventory(model, inputs[:1]), {"layer": [BY_NAME["svd"]]}, inputs=inputs).layers["layer"]
    value = SVD(1)
    (candidate,) = found.candidates()
    factors = found.factors(value)
    small = factorize_(copy.deepcopy(model), {"layer": value}, factors={"layer": factors})
    with torch.no_grad():
        outputs, got = (net(inputs) - net(inputs).mean((0, 2, 3), keepdim=True) for net in (model, small))
    assert candidate.error == pytest.approx(float((got - outputs).norm() / outputs.norm()), abs=0.02)


# --- files ---


def test_a_plan_says_nothing_of_groups_and_rebuilds_them(tmp_path):
    model = factorize_(grouped(), PLAN).eval()
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert [part.groups for part in model.block] == [4, 4, 4]
    assert [part.groups for part in model.wide] == [32, 32]
    write_model(tmp_path, PLAN, weights_of(model))
    assert torch.equal(load_model(grouped(seed=1), tmp_path)(pictures()), model(pictures()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plan", "onnx", "pt2"])
def test_every_form_gives_the_same_outputs(form, tmp_path):
    plan = Plan.of({**dict(PLAN), "block": CP(5)})
    model = factorize_(grouped(), plan).eval()
    assert export_model(model, grouped(seed=1), plan, pictures(), tmp_path / "model", form=form) < 1e-4


def test_a_merged_net_has_the_grouped_layers_again(tmp_path):
    model = factorize_(grouped(), PLAN).eval()
    outputs = model(pictures())
    left = merge_(model, PLAN, ["block", "wide", "fc"])
    torch.testing.assert_close(model(pictures()), outputs)
    assert {name for name, _ in left} == {"point"}
    assert repr(model.block) == repr(grouped().block)
    write_model(tmp_path, left, weights_of(model))
    assert torch.equal(load_model(grouped(seed=1), tmp_path)(pictures()), model(pictures()))


# --- latency, narrower nets, nets from scratch ---


def test_both_forms_of_a_grouped_layer_are_timed():
    def macs(module, inputs):
        return count_macs(module, inputs) / len(inputs)

    layers = inventory(grouped(), EXAMPLE)
    found = time_forms(factorize_(grouped(), PLAN).eval(), PLAN, layers, UserFunction(macs, "clock"), pictures(3))
    wanted = {name: (BY_NAME[value.method].macs(layers[name], value.ranks), layers[name].macs) for name, value in PLAN}
    assert found.layers == wanted


def test_a_narrower_net_with_groups_is_factorized_and_loaded(tmp_path):
    losses = [lambda model: model(pictures(8)).square().mean()]
    narrowing = narrowing_of(grouped(), EXAMPLE, 0.5, losses)
    narrow = narrow_(grouped(), narrowing)
    found = inventory(narrow, EXAMPLE)
    assert found["block"].groups == 4
    assert found["block"].params < inventory(grouped(), EXAMPLE)["block"].params
    plan = Plan.of({"block": Tucker2(2, 2), "wide": Spatial(1)}, 0.5, narrowing)
    model = factorize_(narrow, plan).eval()
    write_model(tmp_path, plan, weights_of(model))
    assert torch.equal(load_model(grouped(seed=1), tmp_path)(pictures()), model(pictures()))


@pytest.mark.parametrize("value", [Tucker2(16, 12), CP(24), CP4(24), TT(16, 24, 16), Spatial(24)], ids=str)
def test_a_net_from_scratch_keeps_the_variance_of_its_inputs(value):
    model = scratch_(
        alone(nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular", groups=4)), Plan.of({"layer": value}), seed=0
    )
    outputs = model(normal(8, 128, 12, 12, dtype=torch.float32))
    assert 1.4 < float(outputs.detach().var()) < 2.8  # twice, since half of it is lost in a ReLU


# --- a search ---


@pytest.mark.slow
def test_a_search_chooses_ranks_of_grouped_layers(bare, tmp_path):
    task = Task(grouped(), nets.few_digits())
    record = ranksearch.search(
        task,
        out=tmp_path / "mine",
        search=Search(trials=4),
        finetune=Recipe(1),
        finalists=Finalists(1, count=1),
        engine=Local(0),
    )
    assert {layer.name: layer.shape for layer in record.facts.layers}["block"] == "4 of 8 x 6 x 3 x 3"
    assert {"point", "block"} <= {name for trial in record.trials for name, _ in trial.plan}
