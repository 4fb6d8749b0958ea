"""Exported models compute the outputs of the trial's model."""

from __future__ import annotations

import copy
import logging
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from ranksearch.compress.export import _strip, export_model, export_onnx, export_pt2
from ranksearch.compress.surgery import factorize_
from ranksearch.errors import StudyError
from ranksearch.plan import Plan
from tests import nets
from tests.compress.conftest import PLAN


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """By form, the export of the factorized net, written once, and the largest difference of outputs."""
    model = factorize_(copy.deepcopy(trained.model), PLAN).eval()
    folder, inputs = tmp_path_factory.mktemp("exported"), nets.few_digits().validation.tensors[0][:40]

    def write(form):
        target = folder / f"model.{form}"
        return target, export_model(model, nets.small(), PLAN, inputs, target, form=form)

    return {form: write(form) for form in ("plan", "onnx", "pt2")}


@pytest.mark.parametrize("form", ["plan", "onnx", "pt2"])
def test_every_form_gives_the_same_outputs(form, exported):
    target, difference = exported[form]
    assert difference < 1e-4
    assert target.exists()


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


def test_onnx_takes_any_batch(exported, compressed, inputs):
    session = onnxruntime.InferenceSession(exported["onnx"][0])
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


def test_an_archive_of_a_single_input_is_of_any_number(tmp_path):
    model = nets.small().eval()
    export_pt2(model, torch.rand(1, 1, 8, 8), tmp_path / "one.pt2")
    reloaded = torch.export.load(tmp_path / "one.pt2").module()
    assert reloaded(torch.rand(5, 1, 8, 8)).shape == (5, 10)


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_an_export_tells_nothing_of_the_machine_that_made_it(form, exported):
    target, _ = exported[form]
    files = [target.read_bytes()]
    if form == "pt2":
        with zipfile.ZipFile(target) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    for content in files:
        for trace in (b".py", b"line ", str(Path.cwd()).encode(), sys.prefix.encode(), b"forward("):
            assert trace not in content


def test_an_onnx_file_is_not_much_more_than_its_weights(exported, compressed):
    weights = sum(4 * parameter.numel() for parameter in compressed.parameters())
    assert exported["onnx"][0].stat().st_size < weights + 6_000


def test_an_archive_keeps_no_inputs_and_unflattens_to_the_modules(exported, compressed, inputs):
    program = torch.export.load(exported["pt2"][0])
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
def test_an_onnx_file_is_of_the_opset_that_is_asked_for(compressed, inputs, tmp_path):
    assert export_onnx(compressed, inputs, tmp_path / "model.onnx", 22) < 1e-4
    assert [(known.domain, known.version) for known in onnx.load(tmp_path / "model.onnx").opset_import] == [("", 22)]


@pytest.mark.slow
def test_an_opset_that_the_exporter_does_not_reach_leaves_nothing(compressed, inputs, tmp_path, capfd):
    level = logging.root.manager.disable
    with pytest.raises(StudyError, match=r"can write, but it could not convert this model from 18 to 7; choose 18 to \d+\."):
        export_onnx(compressed, inputs, tmp_path / "model.onnx", 7)
    assert not list(tmp_path.iterdir())
    assert not capfd.readouterr().err
    assert logging.root.manager.disable == level
