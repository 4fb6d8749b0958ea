"""Every script of examples/ runs in its reduced form, and what comes out is what it says; the docs' drawings are their script's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress.export import export_onnx
from ranksearch.compress.inventory import count_params
from ranksearch.methods import METHODS
from ranksearch.plan import KINDS
from ranksearch.support.batch import run_model
from ranksearch.support.nesting import tensors_in
from tests.pictures import write_pictures

EXAMPLES = Path(__file__).parents[1] / "examples"
DRAWINGS = Path(__file__).parents[1] / "docs" / "explanation" / "img"

pytestmark = pytest.mark.slow


def imported(name, folder=EXAMPLES):
    """The module of a script, under a name by which its functions can be pickled."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs_of(model, inputs):
    with torch.no_grad():
        return tensors_in(run_model(model.eval(), inputs))


def check_search(out, dense, small, record, inputs):
    """The models of the front are smaller than the dense one, and the loaded one is what lies in the folder."""
    assert record.front
    assert all(trial.params < record.facts.dense.params == count_params(dense) for trial in record.front)
    number = next(trial.number for trial in record.front if trial.params == count_params(small))
    again = ranksearch.load_model(dense, out / "models" / str(number))
    for ours, theirs in zip(outputs_of(small, inputs), outputs_of(again, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def check_onnx(model, inputs, path):
    """The model runs in ONNX Runtime, at another size of batch too, and gives torch's outputs."""
    export_onnx(model.eval(), inputs, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check_session(session, model, inputs[:3])


def check_session(session, model, inputs):
    (found,) = session.run(None, {"input": inputs.numpy()})
    (expected,) = outputs_of(model, inputs)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_own_cnn(tmp_path):
    dense, small, record = imported("own_cnn").main(tmp_path, quick=True)
    inputs = torch.rand(5, 1, 8, 8)
    check_search(tmp_path, dense, small, record, inputs)
    check_onnx(small, inputs, tmp_path / "small.onnx")
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "shape"), [("unet_segmentation", (1, 24, 32)), ("audio_conv1d", (1, 1024)), ("without_labels", (1, 16, 16))]
)
def test_searches(name, shape, tmp_path, bare):
    dense, small, record = imported(name).main(tmp_path, quick=True)
    inputs = torch.randn(5, *shape)
    check_search(tmp_path, dense, small, record, inputs)
    check_onnx(small, inputs, tmp_path / "small.onnx")


def test_resnet18_folder(tmp_path, bare):
    for folder, each in (("train", 12), ("test", 4)):
        write_pictures(tmp_path / "pictures" / folder, each=each, classes=["cat", "dog", "hen"])
    dense, small, record = imported("resnet18_folder").main(tmp_path / "pictures", tmp_path / "out", quick=True)
    check_search(tmp_path / "out", dense, small, record, torch.randn(2, 3, 40, 40))
    assert all(trial.macs < record.facts.dense.macs for trial in record.front)
    assert all(name.startswith("layer1.0.") for trial in record.trials for name, _ in trial.plan)


def test_ssdlite_detection(tmp_path, bare):
    module = imported("ssdlite_detection")
    dense, small, record = module.main(tmp_path, quick=True)
    (images, targets), _ = module.collate(list(module.squares(4, seed=9)))
    check_search(tmp_path, dense, small, record, (images, targets))
    perfect = [{**truth, "scores": torch.ones(len(truth["boxes"]))} for truth in targets]
    assert module.average_precision(perfect, targets) == 1
    moved = [{**found, "boxes": found["boxes"] + 500} for found in perfect]
    assert module.average_precision(moved, targets) == 0


def test_the_score_of_unet_segmentation():
    module = imported("unet_segmentation")
    classes = module.discs_and_squares(4, seed=0, size=32).tensors[1]
    outputs = nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    assert module.mean_iou(outputs, classes) == 1
    assert module.mean_iou(outputs.roll(1, dims=1), classes) == 0


def test_factorize_by_hand(tmp_path):
    dense, small, again = imported("factorize_by_hand").main(tmp_path, quick=True)
    assert count_params(again) == count_params(small) < count_params(dense) / 20
    inputs = torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(*(outputs_of(model, inputs) for model in (small, again)))
    check_onnx(again, inputs, tmp_path / "small.onnx")


def test_deploy_onnx(tmp_path):
    models, paths, times = imported("deploy_onnx").main(tmp_path, quick=True)
    assert paths[1].stat().st_size < paths[0].stat().st_size / 5
    assert min(times) > 0
    for model, path in zip(models, paths, strict=True):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        check_session(session, model, torch.randn(3, 1, 32, 32))


def test_own_method(tmp_path, bare):
    module = imported("own_method")
    try:
        dense, small, record = module.main(tmp_path, quick=True)
        check_search(tmp_path, dense, small, record, torch.randn(5, 1, 16, 16))
        assert any(isinstance(value, module.Basis) for trial in record.trials for _, value in trial.plan)
        # At its bound a method reproduces any kernel.
        for conv in (nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv1d(4, 6, 5, groups=2), nn.ConvTranspose2d(4, 3, 2, 2)):
            net, inputs = nn.Sequential(conv), torch.randn(2, conv.in_channels, *[9] * (conv.weight.dim() - 2))
            expected = outputs_of(net, inputs)
            rank = METHODS[module.Basis].bounds(ranksearch.inventory(net, inputs[:1])["0"].weight)[0]
            ranksearch.factorize_(net, {"0": module.Basis(rank)})
            torch.testing.assert_close(outputs_of(net, inputs), expected, rtol=1e-4, atol=1e-5)
    finally:
        METHODS.pop(module.Basis)
        KINDS.pop("basis")


def test_each_example_has_a_test_and_a_line():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    text = Path(__file__).read_text()
    assert {name for name in names if f'"{name}"' in text} == names
    table = (EXAMPLES / "README.md").read_text()
    assert {name for name in names if f"({name}.py)" in table} == names
    assert all('quick="--quick" in sys.argv' in (EXAMPLES / f"{name}.py").read_text() for name in names)


def test_drawings_are_those_of_their_script():
    drawn = imported("draw", DRAWINGS).drawings()
    assert {path.name: path.read_text(encoding="utf-8") for path in DRAWINGS.glob("*.svg")} == drawn
    for page in ("decompositions", "vbmf", "whitening", "predicted-front"):
        text = (DRAWINGS.parent / f"{page}.md").read_text(encoding="utf-8")
        drawn = {name: picture for name, picture in drawn.items() if f"(img/{name})" not in text}
    assert not drawn
