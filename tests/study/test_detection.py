"""A complete study of a detector that computes its losses itself, on pictures of several sizes."""

from __future__ import annotations

import pytest
import torch

import ranksearch
from ranksearch.compress.export import export_model
from ranksearch.compress.saved import load_model
from ranksearch.data import batches
from ranksearch.errors import ModelError, StudyError
from ranksearch.results.messages import Outcome
from ranksearch.support.batch import batch_size
from ranksearch.task import training
from ranksearch.task.checks import check_outputs
from ranksearch.task.task import Task, predict
from tests import detection

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return check_outputs(Task(detection.small_ssd(), detection.squares(), detection.summed, detection.recall))


@pytest.mark.slow
def test_a_detector_is_searched(unreported, detector, tmp_path):
    record = ranksearch.search(
        detector, out=tmp_path / "ssd", search=ranksearch.Search(trials=2), finetune=ranksearch.Recipe(1, batch_size=6),
        finalists=ranksearch.Finalists(2, count=1, batch_size=6), engine=ranksearch.Local(0),
        space=ranksearch.Space(layers=("backbone.*",)),
    )  # fmt: skip
    assert [trial.outcome for trial in record.trials] == [Outcome.DONE] * 2
    assert [layer.name for layer in record.facts.layers if layer.name.startswith("head.classification")] == [
        f"head.classification_head.module_list.{number}" for number in range(3)
    ]
    finalist = next(trial for trial in record.trials if trial.finalist)
    assert {(timing.runtime, timing.batch) for timing in finalist.finalist.timings} == {("onnxruntime", 1), ("torch", 1)}
    model = load_model(detector.model, tmp_path / "ssd" / "models" / str(finalist.number))
    inputs = next(batches(detector.data.validation, 4))[0]
    assert export_model(model, detector.model, finalist.plan, inputs, tmp_path / "plan") < 1e-4
    for form in ("onnx", "pt2"):
        words = (
            f"A model must take tensors with a batch dimension to be written as {form}, but takes lists with an entry for each"
        )
        with pytest.raises(StudyError, match=words):
            export_model(model, detector.model, finalist.plan, inputs, tmp_path / form, form=form)


@pytest.mark.slow
def test_a_detector_learns(detector):
    """Its losses fall, on validation too, where they are computed without changing its statistics."""
    model = training.copied(detector.model)

    def loss():
        return training.loss_on(model, detector, detector.data.validation, seed=0, device=CPU)

    before, statistics = loss(), [buffer.clone() for buffer in model.buffers()]
    assert before == loss()
    assert all(torch.equal(one, other) for one, other in zip(statistics, model.buffers(), strict=True))
    for _ in training.fit(model, detector, training.Recipe(6, batch_size=6, learning_rate=1e-2), seed=0, device=CPU):
        pass
    assert loss() < 0.8 * before


def test_boxes_of_all_batches_are_scored_together(detector):
    outputs, targets = predict(detector.model, detector.data.validation)
    assert len(outputs) == len(targets) == batch_size(targets) == 12
    assert 0 <= detection.recall(outputs, targets) <= 1


def test_a_detector_without_its_targets(detector):
    def images_only(samples):
        return [image for (image, _), _ in samples], [targets for _, targets in samples]

    data = detection.squares()
    data = ranksearch.Splits(data.train.split, data.validation.split, data.test.split, None, "squares", images_only)
    words = (
        "The model must run in training mode, but raised AssertionError: targets should not be none when in training mode; give"
    )
    with pytest.raises(ModelError, match=words):
        check_outputs(Task(detector.model, data, detection.summed, detection.recall))
