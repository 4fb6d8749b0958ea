"""Exported models compute the outputs of the trial's model; models that cannot be saved and loaded are refused."""

from __future__ import annotations

import copy
import logging
import re
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

import ranksearch
from ranksearch.compress.export import _strip, check_reloading, export_model, export_onnx, export_pt2, load_model, save_model
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import weights_of
from ranksearch.errors import ModelError, PlanError, StudyError
from ranksearch.plan import CP, SVD, Plan, Tucker2
from ranksearch.task.task import Task
from tests import nets

PLAN = Plan.of({"conv1": CP(2), "conv2": Tucker2(4, 8), "fc1": CP(8, kernel=(4, 4)), "fc2": SVD(6)})


@pytest.fixture
def compressed(trained):
    return factorize_(copy.deepcopy(trained.model), PLAN).eval()


@pytest.fixture
def inputs():
    return nets.few_digits().validation.tensors[0][:40]


@pytest.mark.parametrize("form", ["plan", "onnx", "pt2"])
def test_every_form_gives_the_same_outputs(form, compressed, inputs, tmp_path):
    target = tmp_path / "model"
    assert export_model(compressed, nets.small(), PLAN, inputs, target, form=form) < 1e-4
    assert target.exists()


def test_plan_and_weights_rebuild_on_the_plain_dense_class(compressed, inputs, tmp_path):
    save_model(tmp_path, PLAN, weights_of(compressed))
    torch.manual_seed(123)  # other initial weights than the trained ones
    model = load_model(nets.small(), str(tmp_path))
    assert torch.equal(model(inputs), compressed(inputs))


def test_an_older_plan_of_all_input_channels_is_loaded(trained, inputs, tmp_path):
    text = '{"format": "ranksearch-plan/1", "layers": {"conv1": {"method": "tucker2", "rank_in": 1, "rank_out": 5}}}'
    plan = Plan.from_json(text)
    compressed = factorize_(copy.deepcopy(trained.model), plan).eval()
    assert [name for name, _ in compressed.conv1.named_children()] == ["core", "expand"]
    save_model(tmp_path, plan, weights_of(compressed))
    model = load_model(nets.small(), tmp_path)
    assert torch.equal(model(inputs), compressed(inputs))
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_model_that_cannot_be_traced(form, inputs, tmp_path):
    model = nets.Net(lambda net, x: net.fc(x.flatten(1)) * (2 if x.max() > 100 else 1), fc=torch.nn.Linear(64, 10)).eval()
    with pytest.raises(
        StudyError, match=rf"torch must be able to write the model as {form}, but raised .*; export it by --format plan"
    ):
        export_model(model, model, Plan(), inputs, tmp_path / "model", form=form)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_model_that_onnxruntime_does_not_run(inputs, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten()).double().eval()
    with pytest.raises(
        StudyError, match=r"torch must be able to write the model as onnx, but raised .*; export it by --format plan"
    ):
        export_model(model, model, Plan(), inputs.double(), tmp_path / "model", form="onnx")
    assert not (tmp_path / "model").exists()


def test_the_weights_of_the_dense_model_do_not_matter(compressed, inputs, tmp_path):
    save_model(tmp_path, PLAN, weights_of(compressed))
    dense = nets.small()
    with torch.no_grad():
        dense.conv1.weight.fill_(float("nan"))
    assert torch.equal(load_model(dense, tmp_path)(inputs), compressed(inputs))
    with pytest.raises(StudyError, match="The dense model must not be on the device meta, but is; build it on the CPU"):
        load_model(nets.small().to("meta"), tmp_path)


@pytest.mark.slow
def test_onnx_takes_any_batch(compressed, inputs, tmp_path):
    export_onnx(compressed, inputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 7):
        (got,) = session.run(None, {"input": inputs[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), compressed(inputs[:count]).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_export_that_differs_is_not_kept(compressed, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("ranksearch.compress.export.MAX_RELATIVE_DIFFERENCE", -1.0)
    for form in ("plan", "onnx", "pt2"):
        with pytest.raises(
            StudyError, match=r"The exported model's outputs must equal the trial's, but differ by .*nothing was written"
        ):
            export_model(compressed, nets.small(), PLAN, inputs, tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


def test_folders_without_a_model(tmp_path):
    with pytest.raises(StudyError, match=r"A model's folder must hold plan.json and weights.safetensors, but .* does not"):
        load_model(nets.small(), tmp_path)


def test_a_model_of_another_dense_class(compressed, tmp_path):
    save_model(tmp_path, PLAN, weights_of(compressed))
    with pytest.raises(StudyError, match=r"must fit the given dense model, but do not: .*size mismatch"):
        load_model(nets.small(classes=20), tmp_path)
    with pytest.raises(PlanError, match="A plan must name layers of the model, but 'conv1' is none"):
        load_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path)


def test_an_archive_of_a_single_input_is_of_any_number(tmp_path):
    model = nets.small().eval()
    export_pt2(model, torch.rand(1, 1, 8, 8), tmp_path / "one.pt2")
    reloaded = torch.export.load(tmp_path / "one.pt2").module()
    assert reloaded(torch.rand(5, 1, 8, 8)).shape == (5, 10)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_an_export_tells_nothing_of_the_machine_that_made_it(form, compressed, inputs, tmp_path):
    target = tmp_path / f"model.{form}"
    export_model(compressed, nets.small(), PLAN, inputs, target, form=form)
    files = [target.read_bytes()]
    if form == "pt2":
        with zipfile.ZipFile(target) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    for content in files:
        for trace in (b".py", b"line ", str(Path.cwd()).encode(), sys.prefix.encode(), b"forward("):
            assert trace not in content


@pytest.mark.slow
def test_an_onnx_file_is_not_much_more_than_its_weights(compressed, inputs, tmp_path):
    export_onnx(compressed, inputs, tmp_path / "model.onnx")
    weights = sum(4 * parameter.numel() for parameter in compressed.parameters())
    assert (tmp_path / "model.onnx").stat().st_size < weights + 6_000


def test_an_archive_keeps_no_inputs_and_unflattens_to_the_modules(compressed, inputs, tmp_path):
    export_pt2(compressed, inputs + 1, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert not any(tensor.any() for tensor in program.example_inputs[0])
    modules = torch.export.unflatten(program)
    for count in (1, 7):
        torch.testing.assert_close(modules(inputs[:count]), compressed(inputs[:count]))
    assert {name for name, _ in compressed.named_children()} <= {name for name, _ in modules.named_modules()}


def test_notes_are_stripped_at_every_depth():
    def noted(graph):
        graph.doc_string = "File /home/me/net.py"
        for node in graph.node:
            node.metadata_props.add(key="trace", value="File /home/me/net.py")
            node.doc_string = "line 3"
        return graph

    one = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1], doc_string="net.py")
    inner = noted(onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "inner", [], [one]))
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    start = onnx.helper.make_tensor("x", onnx.TensorProto.FLOAT, [1], [1.0])
    start.doc_string = "net.py"
    model = onnx.helper.make_model(noted(onnx.helper.make_graph([node], "outer", [one], [one], [start])), doc_string="net.py")
    function = model.functions.add(name="f", domain="d", doc_string="net.py")
    function.node.add(op_type="Identity", doc_string="net.py")
    _strip(model)
    data = model.SerializeToString()
    assert b".py" not in data
    assert b"Identity" in data


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 22])
def test_an_onnx_file_is_of_the_opset_that_is_asked_for(opset, compressed, inputs, tmp_path):
    assert export_onnx(compressed, inputs, tmp_path / "model.onnx", opset) < 1e-4
    assert [(known.domain, known.version) for known in onnx.load(tmp_path / "model.onnx").opset_import] == [("", opset)]


@pytest.mark.slow
def test_an_opset_that_the_exporter_does_not_reach_leaves_nothing(compressed, inputs, tmp_path, capfd):
    level = logging.root.manager.disable
    with pytest.raises(StudyError, match=r"can write, but it could not convert this model from 18 to 7; choose 18 to \d+\."):
        export_onnx(compressed, inputs, tmp_path / "model.onnx", 7)
    assert not list(tmp_path.iterdir())
    assert not capfd.readouterr().err
    assert logging.root.manager.disable == level


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
