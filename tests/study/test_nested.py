"""Complete studies of models with several inputs and outputs, nested in tuples, dicts and lists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ranksearch
from ranksearch.compress.export import export_model
from ranksearch.compress.saved import load_model
from ranksearch.data import batches
from ranksearch.results.messages import Outcome
from ranksearch.support.batch import run_model
from ranksearch.support.nesting import tensors_in
from ranksearch.task.task import Task
from tests import nested

pytestmark = pytest.mark.slow


def image(image, vector, label):
    return image, label


CASES = {
    "image and vector": lambda: Task(
        nested.TwoInputs(), nested.splits(lambda image, vector, label: ((image, vector), label), classes=2)
    ),
    "dict by name": lambda: Task(
        nested.TwoInputs(), nested.splits(lambda image, vector, label: ({"vector": vector, "image": image}, label), classes=2)
    ),
    "two heads, a dict": lambda: Task(
        nested.TwoHeads(nested.as_dict),
        nested.splits(lambda image, vector, label: (image, {"label": label, "size": image.mean()[None]})),
        nested.loss_of_dict, nested.score_of_dict,
    ),
    "two heads, a tuple": lambda: Task(
        nested.TwoHeads(nested.as_tuple),
        nested.splits(lambda image, vector, label: (image, (label, image.mean()[None]))),
        nested.loss_of_tuple, nested.score_of_tuple,
    ),
    "a dict with attributes": lambda: Task(
        nested.TwoHeads(nested.as_model_output), nested.splits(image), nested.loss_of_output, nested.score_of_output
    ),
    "a dict with its loss": lambda: Task(
        nested.WithLoss(),
        nested.splits(lambda image, vector, label: ({"image": image, "labels": label}, label)),
        lambda outputs, targets: outputs.loss, lambda outputs, targets: nested.share_right(outputs.logits, targets),
    ),
    "siamese": lambda: Task(
        nested.Siamese(), nested.splits(lambda image, vector, label: ([image, image.flip(1) * vector[0]], label)),
        nested.loss_of_distance, nested.score_of_distance,
    ),
}  # fmt: skip


def search(task, out, **options):
    return ranksearch.search(
        task, out=out, search=ranksearch.Search(trials=2), finetune=ranksearch.Recipe(1, batch_size=16),
        finalists=ranksearch.Finalists(1, count=1), **{"engine": ranksearch.Local(0), **options},
    )  # fmt: skip


TIMED = {"dict by name", "a dict with attributes"}
"""Nested inputs and nested outputs."""


@pytest.mark.parametrize("name", CASES)
def test_a_study_from_the_inventory_to_the_exports(name, tmp_path, request):
    """Finalists, their latencies in ONNX Runtime and torch, and exports in all forms."""
    request.getfixturevalue("unreported" if name in TIMED else "bare")
    torch.manual_seed(0)
    task = CASES[name]()
    record = search(task, tmp_path / "mine")
    assert [trial.outcome for trial in record.trials] == [Outcome.DONE] * 2
    finalist = next(trial for trial in record.trials if trial.finalist)
    assert {timing.runtime for timing in finalist.finalist.timings} == ({"onnxruntime", "torch"} if name in TIMED else set())
    model = load_model(task.model, tmp_path / "mine" / "models" / str(finalist.number))
    inputs = next(batches(task.data.validation, 16))[0]
    assert type(run_model(model, inputs)) is type(run_model(task.model, inputs))
    for form in ("plan", "onnx", "pt2"):
        assert export_model(model, task.model, finalist.plan, inputs, tmp_path / form, form=form) < 1e-4


@pytest.mark.usefixtures("bare")
def test_workers_train_nested_data(tmp_path):
    torch.manual_seed(0)
    record = search(CASES["two heads, a dict"](), tmp_path / "mine", engine=ranksearch.Local(1))
    assert [trial.outcome for trial in record.trials] == [Outcome.DONE] * 2


@pytest.mark.usefixtures("bare")
def test_narrower_nets_of_nested_data(tmp_path):
    torch.manual_seed(0)
    record = search(
        CASES["image and vector"](), tmp_path / "mine", space=ranksearch.Space(widths=(1.0, 0.5)), narrow=ranksearch.Recipe(1)
    )
    assert [net.width for net in record.facts.narrow] == [0.5]


def test_names_of_exported_inputs_and_outputs(tmp_path):
    import onnx

    task = CASES["dict by name"]()
    inputs = next(batches(task.data.validation, 4))[0]
    plan = ranksearch.Plan()
    export_model(task.model.eval(), task.model, plan, inputs, tmp_path / "model.onnx", form="onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert ([entry.name for entry in graph.input], [entry.name for entry in graph.output]) == (["vector", "image"], ["output"])
    export_model(task.model, task.model, plan, inputs, tmp_path / "model.pt2", form="pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    got = program(vector=inputs["vector"][:3], image=inputs["image"][:3])
    torch.testing.assert_close(got, task.model(inputs["image"][:3], inputs["vector"][:3]))
    heads = nested.TwoHeads(nested.as_model_output).eval()
    export_model(heads, heads, plan, inputs["image"], tmp_path / "heads.onnx", form="onnx")
    graph = onnx.load(tmp_path / "heads.onnx").graph
    assert [entry.name for entry in graph.output] == ["output.label", "output.size"]
    assert len(tensors_in(heads(inputs["image"]))) == 2


@pytest.mark.usefixtures("bare")
def test_a_loss_of_outputs_that_only_training_mode_gives(tmp_path):
    """An auxiliary head: eval mode gives one tensor, training mode two."""
    task = Task(Auxiliary(), nested.splits(image, classes=2), loss_of_both)
    record = search(task, tmp_path / "mine")
    assert all(trial.outcome is Outcome.DONE for trial in record.trials)


class Auxiliary(nested.TwoHeads):
    def __init__(self):
        super().__init__(nested.as_tuple)
        self.size = torch.nn.Linear(12, 2)

    def forward(self, image):
        label, (other,) = super().forward(image)
        return (label, other) if self.training else label


def loss_of_both(outputs, targets):
    return sum(F.cross_entropy(output, targets) for output in outputs)
