"""The whitening of a profile: read from the cache unchanged, measured again if its inputs differ, kept when a study resumes."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from ranksearch import plan
from ranksearch.compress import whitening as whitening
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.whitening import source, whitenings
from ranksearch.data import sample_inputs
from ranksearch.errors import PlanError
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nets
from tests.conftest import essence, small_spec
from tests.geometries import fitting
from tests.nets import normal


def small_profile(model=None, inputs=None, **options):
    model = model or seeded()
    inputs = nets.few_digits().train.tensors[0][:60] if inputs is None else inputs
    found = inventory(model, inputs[:1])
    return profile(model, found, {layer.name: fitting(layer) for layer in found.layers}, inputs=inputs, **options)


def seeded():
    torch.manual_seed(0)
    return nets.small().eval()


def assert_same(one, other):
    for name, mine in one.layers.items():
        theirs = other.layers[name]
        assert mine.groups[0].whitening.roots.keys() == theirs.groups[0].whitening.roots.keys()
        values = [candidate.value for candidate in mine.candidates()][::5]
        # CP at a rank between two prepared ones is fitted again, from the whitened kernel.
        values += [type(v)(v.rank - 1, kernel=v.kernel) for v in values if type(v) in (plan.CP, plan.CP4) and v.rank > 2]
        for value in values:
            assert all(torch.equal(a, b) for a, b in zip(mine.factors(value), theirs.factors(value), strict=True))
            assert torch.equal(
                mine.bias_correction(value, mine.factors(value)), theirs.bias_correction(value, theirs.factors(value))
            )


@pytest.fixture
def measurements(monkeypatch):
    """A list that records, for each call, the layers whose moments are measured."""
    calls = []

    def noting(model, holds, inputs):
        calls.append([layer.name for layer in holds])
        return whitenings(model, holds, inputs)

    monkeypatch.setattr("ranksearch.compress.profile.whitenings", noting)
    return calls


def files(cache):
    return sorted(cache.iterdir())


@pytest.mark.slow
def test_from_the_cache_as_made_anew(tmp_path, measurements):
    first = small_profile(cache=tmp_path)
    written = {path: path.read_bytes() for path in files(tmp_path)}
    again = small_profile(cache=tmp_path)
    assert measurements == [["conv1", "conv2", "fc1", "fc2"]]
    assert {path: path.read_bytes() for path in files(tmp_path)} == written
    assert_same(first, again)
    assert_same(first, small_profile())


@pytest.mark.slow
def test_a_torn_file_is_made_again_as_it_was(tmp_path, measurements):
    first = small_profile(cache=tmp_path)
    torn = files(tmp_path)[1]
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    assert_same(first, small_profile(cache=tmp_path))
    assert measurements[1:] == [["conv2"]]
    assert torn.read_bytes() == whole


@pytest.mark.slow
def test_every_input_of_a_whitening_changes_the_file(tmp_path):
    small_profile(cache=tmp_path)
    names = [path.name for path in files(tmp_path)]
    found = inventory(seeded(), torch.ones(1, 1, 8, 8))
    profile(seeded(), found, {layer.name: fitting(layer) for layer in found.layers}, cache=tmp_path)
    assert len(files(tmp_path)) == 8
    other = seeded()
    other.norm1.running_mean += 1e-3
    small_profile(other, cache=tmp_path)
    assert len(files(tmp_path)) == 12
    small_profile(inputs=nets.few_digits().train.tensors[0][1:61], cache=tmp_path)
    assert len(files(tmp_path)) == 16
    small_profile(cache=tmp_path)
    assert len(files(tmp_path)) == 16
    assert set(names) <= {path.name for path in files(tmp_path)}


def test_layers_of_equal_weights_and_alike_names_keep_their_own_whitening(tmp_path):
    model = nn.Sequential(OrderedDict([("a b", nn.Linear(5, 5)), ("act", nn.ReLU()), ("a_b", nn.Linear(5, 5))]))
    model.a_b.load_state_dict(getattr(model, "a b").state_dict())
    inputs = normal(50, 5, dtype=torch.float32)
    found = small_profile(model, inputs, cache=tmp_path)
    again = small_profile(model, inputs, cache=tmp_path)
    assert len(files(tmp_path)) == 2
    for name in ("a b", "a_b"):
        assert torch.equal(found.layers[name].groups[0].whitening.mean, again.layers[name].groups[0].whitening.mean)
    assert not torch.equal(again.layers["a b"].groups[0].whitening.mean, again.layers["a_b"].groups[0].whitening.mean)


def test_a_source_reads_what_a_model_does_not_keep():
    def digest(mean):
        model = nn.Sequential(nn.Conv2d(1, 2, 3))
        with torch.no_grad():
            model[0].weight.fill_(0.5)
            model[0].bias.fill_(0.5)
        model.register_buffer("mean", torch.tensor(mean), persistent=False)
        return source(model, torch.ones(1, 1, 4, 4))

    assert digest(0.0) == digest(0.0) != digest(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_source_reads_every_type(dtype):
    model, inputs = nn.Linear(3, 3).to(dtype), torch.ones(2, 3, dtype=dtype)
    before = source(model, inputs)
    assert before == source(copy.deepcopy(model), inputs.clone())
    with torch.no_grad():
        model.bias[0] += 0.5
    assert source(model, inputs) != before


def test_the_bias_corrections_of_a_plan(trained):
    found = small_profile(trained.model)
    chosen = plan.Plan.of({"conv2": plan.CP(3), "fc1": plan.SVD(4)})
    bias_corrections = found.bias_corrections(chosen, found.factors(chosen))
    assert bias_corrections.keys() == {"conv2", "fc1"}
    assert all(
        torch.equal(bias_corrections[name], found.layers[name].bias_correction(value, found.layers[name].factors(value)))
        for name, value in chosen
    )
    small = factorize_(copy.deepcopy(trained.model), chosen, factors=found.factors(chosen), bias_corrections=bias_corrections)
    torch.testing.assert_close(small.fc1.expand.bias, trained.model.fc1.bias + bias_corrections["fc1"])
    torch.testing.assert_close(small.conv2.expand.bias, trained.model.conv2.bias + bias_corrections["conv2"])


def test_a_bias_correction_must_fit():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7, bias=False))
    for name, message in (
        (
            "0",
            r"Layer '0': a bias correction of shape \(3,\) needs a bias of that shape, but the layer has a bias of shape \(6,\)\.$",
        ),
        ("1", r"Layer '1': a bias correction of shape \(3,\) needs a bias of that shape, but the layer has no bias\.$"),
    ):
        with pytest.raises(PlanError, match=message):
            factorize_(model, {name: plan.SVD(2)}, bias_corrections={name: torch.zeros(3)})
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


def test_inputs_are_drawn_by_a_seed():
    split = nets.few_digits().train
    one, same, other = sample_inputs(split, 30, seed=1), sample_inputs(split, 30, seed=1), sample_inputs(split, 30, seed=2)
    assert one.shape == (30, 1, 8, 8)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(sample_inputs(split, 10**6, seed=0)) == 200
    assert len({row.numpy().tobytes() for row in sample_inputs(split, 200, seed=0)}) == len(
        {row.numpy().tobytes() for row in split.tensors[0]}
    )


# --- in a study ---


@pytest.mark.slow
def test_a_data_aware_study_resumes_as_if_uninterrupted(bare, finished, tmp_path):
    folder, whole = finished
    assert small_spec() == small_spec("space.data_aware=true")
    for trials in (2, 5):
        spec = small_spec(f"search.trials={trials}", "finalists.count=1")
        parts = run_study(spec, tmp_path / "parts", Options(Local(0)))
    assert essence(replace(t, finalist=None) for t in parts.trials) == essence(
        replace(t, finalist=None) for t in whole.trials[:5]
    )
    assert "space.data_aware" in (folder / "report.md").read_text()
    plain = run_study(
        small_spec("space.data_aware=false", "search.trials=8", "finalists.count=1"), tmp_path / "plain", Options(Local(0))
    )
    # VBMF uses the weights alone, so its plans are equal; the predicted front depends on the errors.
    vbmf = [[trial for trial in study.trials if trial.origin.startswith("vbmf")] for study in (whole, plain)]
    pairs = list(zip(*vbmf, strict=True))
    assert pairs
    assert all(aware.plan == other.plan for aware, other in pairs)
    assert any(aware.curve[0] != other.curve[0] for aware, other in pairs)


def test_only_what_feeds_a_normalisation_is_centred_without_a_bias():
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(first=nn.Linear(6, 8, bias=False), norm=nn.BatchNorm1d(8), relu=nn.ReLU(), last=nn.Linear(8, 5, bias=False))
    ).eval()
    inputs = normal(64, 6, seed=1).float() + 3
    holds = {layer: [(1,)] for layer in inventory(model, inputs[:1]).layers}
    roots = {name: found.roots[(1,)] for name, (found,) in whitenings(model, holds, inputs).items()}
    seen = torch.relu(model.norm(model.first(inputs))).double()
    for name, rows, centred in (("first", inputs.double(), True), ("last", seen, False)):
        around = rows - rows.mean(0) if centred else rows
        moments = around.T @ around / len(rows)
        scaled = moments / moments.diagonal().mean()
        wanted = (1 - whitening.SHRINKAGE) * scaled + whitening.SHRINKAGE * torch.eye(len(scaled), dtype=torch.float64)
        torch.testing.assert_close((roots[name] @ roots[name].T).double(), wanted.double(), rtol=1e-4, atol=1e-4)
