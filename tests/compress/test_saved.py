"""Saved models come back with the same outputs; models that cannot be saved and loaded are refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import ranksearch
from ranksearch.compress.saved import check_reloading, load_model, write_model
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.errors import ModelError, PlanError, StudyError
from ranksearch.plan import CP, SVD, Plan
from ranksearch.task.task import Task
from tests import nets
from tests.compress.conftest import PLAN


def test_a_model_of_ones_own_is_saved_and_loaded(compressed, inputs, tmp_path):
    """Also after training, and over a model that the folder holds."""
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.mul_(1.1)
    for folder in (tmp_path / "a" / "model", str(tmp_path / "a" / "model")):
        ranksearch.save_model(compressed, dict(PLAN), folder)
        assert torch.equal(ranksearch.load_model(nets.small(), folder)(inputs), compressed(inputs))
    assert sorted(path.name for path in (tmp_path / "a" / "model").iterdir()) == ["plan.json", "weights.safetensors"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"conv1": CP(3)}, r"Layer 'conv1' must consist of the parts of CP 3, but is another Sequential; give the plan that the model was"),
        ({"conv9": CP(2)}, r"A plan must name layers of the model, but 'conv9' is none\. Did you mean 'conv2'\?"),
        (Plan.of({}, 0.5), r"A plan of width 0\.5 must hold its narrowing to be saved, but does not; set it"),
    ],
)  # fmt: skip
def test_a_plan_of_another_model_is_not_saved(plan, message, compressed, tmp_path):
    with pytest.raises(PlanError, match=message):
        ranksearch.save_model(compressed, plan, tmp_path / "model")
    with pytest.raises(PlanError, match="Layer 'conv1' must consist of the parts of CP 2, but is another Conv2d"):
        ranksearch.save_model(nets.small(), PLAN, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_cannot_be_written(compressed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        StudyError, match=r"The model in .*/file/model cannot be written: Not a directory; choose another folder"
    ):
        ranksearch.save_model(compressed, PLAN, tmp_path / "file" / "model")


def test_plan_and_weights_rebuild_on_the_plain_dense_class(compressed, inputs, tmp_path):
    write_model(tmp_path, PLAN, weights_of(compressed))
    torch.manual_seed(123)  # other initial weights than the trained ones
    model = load_model(nets.small(), str(tmp_path))
    assert torch.equal(model(inputs), compressed(inputs))


def test_an_older_plan_of_all_input_channels_is_loaded(trained, inputs, tmp_path):
    text = '{"format": "ranksearch-plan/1", "layers": {"conv1": {"method": "tucker2", "rank_in": 1, "rank_out": 5}}}'
    plan = Plan.from_json(text)
    compressed = factorize_(copy.deepcopy(trained.model), plan).eval()
    assert [name for name, _ in compressed.conv1.named_children()] == ["core", "expand"]
    write_model(tmp_path, plan, weights_of(compressed))
    model = load_model(nets.small(), tmp_path)
    assert torch.equal(model(inputs), compressed(inputs))
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan


def test_the_weights_of_the_dense_model_do_not_matter(compressed, inputs, tmp_path):
    write_model(tmp_path, PLAN, weights_of(compressed))
    dense = nets.small()
    with torch.no_grad():
        dense.conv1.weight.fill_(float("nan"))
    assert torch.equal(load_model(dense, tmp_path)(inputs), compressed(inputs))
    with pytest.raises(StudyError, match="The dense model must not be on the device meta, but is; build it on the CPU"):
        load_model(nets.small().to("meta"), tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(StudyError, match=r"A model's folder must hold plan.json and weights.safetensors, but .* does not"):
        load_model(nets.small(), tmp_path)


def test_a_model_of_another_dense_class(compressed, tmp_path):
    write_model(tmp_path, PLAN, weights_of(compressed))
    with pytest.raises(StudyError, match=r"must fit the given dense model, but do not: .*size mismatch"):
        load_model(nets.small(classes=20), tmp_path)
    with pytest.raises(PlanError, match="A plan must name layers of the model, but 'conv1' is none"):
        load_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path)


def check_loadable(model):
    """Check a model as a study does: with a copy from before its first pass. The model and the random state must not change."""
    fresh = copy.deepcopy(model)
    inputs = torch.rand(2, 1, 8, 8)
    model.eval()(inputs)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_reloading(model, fresh, Plan.of({"net.fc1": SVD(1)}), inputs)
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.training


def drawing(net, inputs):
    return net.net(inputs) + torch.rand(len(inputs), 1)


def counting(net, inputs):
    net.calls = getattr(net, "calls", 0) + 1
    return net.net(inputs) + net.calls


def frozen():
    net = nets.small()
    net.conv1.requires_grad_(False)
    return nets.Net(lambda net, x: net.net(x), net=net)


def renaming():
    """A model that removes a prefix from the names in its state dict, and adds it again when it loads."""
    model = nets.Net(lambda net, x: net.net(x), net=nets.small())

    def shorten(module, state, prefix, metadata):
        for name in list(state):
            state[name.removeprefix("net.")] = state.pop(name)

    def lengthen(module, state, prefix, *rest):
        for name in list(state):
            state[f"net.{name}"] = state.pop(name)

    model.register_state_dict_post_hook(shorten)
    model.register_load_state_dict_pre_hook(lengthen)
    return model


@pytest.mark.parametrize(
    "make",
    [
        nets.versioned,
        renaming,
        frozen,
        lambda: nets.Net(drawing, net=nets.small()),
        lambda: nets.Net(counting, net=nets.small()),
        lambda: nets.Net(lambda net, x: net.drop(net.net(x)), net=nets.small(), drop=torch.nn.Dropout(0.5)),
        lambda: nets.Net(lambda net, x: net.net(x) * torch.nan, net=nets.small()),
    ],
    ids=["versioned", "renaming", "frozen", "drawing", "counting", "dropout", "nan"],
)
def test_a_model_that_can_be_saved_and_loaded(make):
    check_loadable(make())


def lazy(net, inputs):
    if not hasattr(net, "scale"):
        net.register_buffer("scale", torch.ones(1))
    return net.net(inputs) * net.scale


def unkept(net, inputs):
    if net.training:
        net.shift = net.shift + inputs.mean()
    return net.net(inputs) + net.shift


def losing():
    model = nets.Net(lambda net, x: net.net(x), net=nets.small())
    model.register_state_dict_post_hook(lambda module, state, *rest: state.__delitem__("net.fc2.bias"))
    return model


def passing():
    model = nets.Net(unkept, net=nets.small())
    model.register_buffer("shift", torch.zeros(1), persistent=False)
    return model


def of_complex_numbers():
    model = nets.Net(lambda net, x: net.net(x), net=nets.small())
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    return model


def loading_anew():
    """A model that loads zeros instead of one bias in its state dict."""
    model = nets.Net(lambda net, x: net.net(x), net=nets.small())
    model.register_load_state_dict_pre_hook(lambda module, state, *rest: state.update({"net.fc2.bias": torch.zeros(10)}))
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: nets.Net(lazy, net=nets.small()),
            r'cannot be loaded: RuntimeError: Unexpected key\(s\) in state_dict: "scale"',
        ),
        (losing, r'cannot be loaded: RuntimeError: Missing key\(s\) in state_dict: "net.fc2.bias"'),
        (of_complex_numbers, "cannot be saved: "),
        (passing, "gave other outputs afterwards"),
        (loading_anew, "gave other outputs afterwards"),
    ],
    ids=["lazy", "losing", "complex", "passing", "anew"],
)
def test_a_model_that_cannot_be_saved_and_loaded(make, told):
    with pytest.raises(ModelError) as raised:
        check_loadable(make())
    assert re.fullmatch(
        rf"A compressed model must be the same after saving and loading, but a factorized copy {told}.*; keep in state_dict\(\) all "
        r"that a forward needs and training changes, and create buffers in __init__\.",
        str(raised.value),
    )


def test_a_model_that_cannot_be_loaded_is_refused_before_training(tmp_path):
    task = Task(nets.Net(lazy, net=nets.small()), nets.few_digits())
    with pytest.raises(
        ModelError, match="A compressed model must be the same after saving and loading, but a factorized copy cannot be"
    ):
        ranksearch.search(task, out=tmp_path / "mine", engine=ranksearch.Local(0))
    assert not list(tmp_path.iterdir())
