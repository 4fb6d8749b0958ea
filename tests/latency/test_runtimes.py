"""Where models are timed, and what each runtime refuses."""

import pytest
import torch
from torch import nn

from ranksearch.errors import ModelError, SpecError, StudyError
from ranksearch.latency import runtimes
from ranksearch.latency.runtimes import OnnxRuntime, Torch, UserFunction, runtime_of, windowed
from ranksearch.spec import Latency
from tests import nets
from tests.latency import clocks

CPU = torch.device("cpu")


class Odd(nn.Module):
    """A forward that ONNX has no operator for."""

    def forward(self, inputs):
        return torch.special.entr(inputs)


def all_runtimes():
    return [Torch(CPU), OnnxRuntime(), UserFunction(clocks.counting, "tests.latency.clocks:counting")]


@pytest.mark.parametrize("runtime", all_runtimes(), ids=lambda runtime: runtime.name)
def test_every_runtime_gives_milliseconds_and_leaves_the_model(runtime):
    model, threads = nets.small().train(), torch.get_num_threads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call = runtime.prepare(model, torch.ones(2, 1, 8, 8))
    assert 0 < call() < 1000
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_torch_takes_the_threads_that_are_asked_for(monkeypatch):
    seen = []

    class Spy(nn.Module):
        def forward(self, inputs):
            seen.append(torch.get_num_threads())
            return inputs

    Torch(CPU, threads=3).prepare(Spy(), torch.ones(1, 2))()
    assert set(seen) == {3}


@pytest.mark.parametrize(
    ("name", "device", "kind"),
    [("auto", "cpu", OnnxRuntime), ("auto", "cuda", Torch), ("auto", "mps", Torch), ("torch", "cpu", Torch),
     ("onnxruntime", "cpu", OnnxRuntime), ("tests.latency.clocks:counting", "cuda", UserFunction)],
)  # fmt: skip
def test_the_runtime_of_a_study(name, device, kind):
    runtime = runtime_of(Latency(runtime=name, threads=2), torch.device(device))
    assert isinstance(runtime, kind)
    assert runtime.threads == 2


def test_onnx_runtime_is_for_the_cpu():
    with pytest.raises(SpecError, match=r"latency.runtime onnxruntime runs on the CPU, but --device is cuda"):
        runtime_of(Latency(runtime="onnxruntime"), torch.device("cuda"))


def test_a_function_that_is_not_there():
    with pytest.raises(
        SpecError, match=r"latency.runtime: module 'tests.latency.clocks' has no 'countin'. Did you mean 'counting'"
    ):
        runtime_of(Latency(runtime="tests.latency.clocks:countin"), CPU)


def test_a_model_that_the_runtime_cannot_take_is_refused_with_the_operator():
    with pytest.raises(
        ModelError, match=r"latency.runtime onnxruntime must take the model, but .*special_entr.*such as 'torch'"
    ):
        OnnxRuntime().prepare(Odd(), torch.ones(1, 3))


@pytest.mark.parametrize(("function", "given"), [(clocks.broken, "nan"), (clocks.silent, "None")])
def test_a_function_must_return_milliseconds(function, given):
    call = UserFunction(function, "my_pkg:phone").prepare(nets.small(), torch.ones(1, 1, 8, 8))
    with pytest.raises(
        StudyError, match=f"'my_pkg:phone' must return milliseconds, a finite number above 0, but returned {given}"
    ):
        call()


def test_short_runs_are_repeated_and_long_ones_are_not():
    runs = []
    windowed(lambda: runs.append(0))()
    assert len(runs) > 10
    runs.clear()
    call = windowed(lambda: (runs.append(0), sum(range(200_000)))[0])
    runs.clear()
    call()
    assert len(runs) < 10


def test_a_gpu_is_waited_for_whichever_it_is(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in (CPU, torch.device("cuda:1"), torch.device("mps")):
        runtimes._finish(device)
    assert waited == [torch.device("cuda:1"), "mps"]
