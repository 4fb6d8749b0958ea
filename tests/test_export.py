"""Models taken home compute what the trial's model computed."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch

from ranksearch.errors import ModelError, PlanError, StudyError
from ranksearch.export import export_model, export_onnx, export_pt2, load_model, save_model
from ranksearch.plan import CP, SVD, Plan, Tucker2
from ranksearch.surgery import factorize_
from ranksearch.weights import check_state, weights_of
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


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_model_that_cannot_be_traced(form, inputs, tmp_path):
    model = nets.Net(lambda net, x: net.fc(x.flatten(1)) * (2 if x.max() > 100 else 1), fc=torch.nn.Linear(64, 10)).eval()
    with pytest.raises(
        StudyError, match=rf"A model must be one that torch can write as {form}, but .*; take it home by --format plan"
    ):
        export_model(model, model, Plan(), inputs, tmp_path / "model", form=form)
    assert not (tmp_path / "model").exists()


def test_a_model_that_onnxruntime_does_not_run(inputs, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten()).double().eval()
    with pytest.raises(StudyError, match=r"must be one that torch can write as onnx, but .*; take it home by --format plan"):
        export_model(model, model, Plan(), inputs.double(), tmp_path / "model", form="onnx")
    assert not (tmp_path / "model").exists()


def test_a_state_that_is_no_tensor():
    class Stateful(torch.nn.Conv2d):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(
        ModelError, match=r"A model's state must be of tensors, but '0._extra_state' is a dict; keep it elsewhere"
    ):
        check_state(torch.nn.Sequential(Stateful(4, 4, 1)))


def test_the_weights_of_the_dense_model_do_not_matter(compressed, inputs, tmp_path):
    save_model(tmp_path, PLAN, weights_of(compressed))
    dense = nets.small()
    with torch.no_grad():
        dense.conv1.weight.fill_(float("nan"))
    assert torch.equal(load_model(dense, tmp_path)(inputs), compressed(inputs))
    with pytest.raises(StudyError, match="must hold weights, if any, but it is on the device meta; build it on the CPU"):
        load_model(nets.small().to("meta"), tmp_path)


def test_onnx_takes_any_batch(compressed, inputs, tmp_path):
    export_onnx(compressed, inputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 7):
        (got,) = session.run(None, {"input": inputs[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), compressed(inputs[:count]).detach(), rtol=1e-4, atol=1e-4)


def test_an_export_that_differs_is_not_kept(compressed, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("ranksearch.export.TOLERANCE", -1.0)
    for form in ("plan", "onnx", "pt2"):
        with pytest.raises(
            StudyError, match=r"The exported model's outputs must equal the trial's, but differ by .*nothing was kept"
        ):
            export_model(compressed, nets.small(), PLAN, inputs, tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


def test_folders_without_a_model(tmp_path):
    with pytest.raises(StudyError, match=r"A model's folder must hold plan.json and weights.safetensors, but .* does not"):
        load_model(nets.small(), tmp_path)


def test_a_model_of_another_dense_class(compressed, tmp_path):
    save_model(tmp_path, PLAN, weights_of(compressed))
    with pytest.raises(StudyError, match=r"must be of the given dense model, but are not: .*size mismatch"):
        load_model(nets.small(classes=20), tmp_path)
    with pytest.raises(PlanError, match="A plan must name layers of the model, but 'conv1' is none"):
        load_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path)


def test_an_archive_of_a_single_input_is_of_any_number(tmp_path):
    model = nets.small().eval()
    export_pt2(model, torch.rand(1, 1, 8, 8), tmp_path / "one.pt2")
    reloaded = torch.export.load(tmp_path / "one.pt2").module()
    assert reloaded(torch.rand(5, 1, 8, 8)).shape == (5, 10)
