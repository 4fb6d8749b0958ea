"""Where models are timed: torch, ONNX Runtime, or a function of the user's."""

from __future__ import annotations

import abc
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ranksearch.compress.export import quiet_exporter
from ranksearch.compress.flat import Flat
from ranksearch.errors import ModelError, SpecError, StudyError, first_line
from ranksearch.references import resolve
from ranksearch.spec import Latency
from ranksearch.support.batch import arguments_of
from ranksearch.support.copies import deep_copy
from ranksearch.support.nesting import map_tensors, tensors_in

Timer: TypeAlias = Callable[[], float]
"""Runs a model once, or a few times in a row, and gives the milliseconds that one run took."""

MIN_WINDOW_MS = 2.0
"""A clock's resolution and the noise of a call count little over so long a time."""
ORT, TORCH, AUTO = "onnxruntime", "torch", "auto"
WARM_UPS = 2


class Runtime(abc.ABC):
    """Something that runs models and can be timed."""

    name: str
    """As study files and records name it."""
    threads: int

    @abc.abstractmethod
    def prepare(self, model: nn.Module, inputs: Any) -> Timer:
        """What times `model` on the batch `inputs`. The model is left as it was.

        Raises:
            StudyError: the runtime does not take the model.
        """


@dataclass(frozen=True)
class Torch(Runtime):
    """torch, eager, in inference mode, on one device; convolutional models are laid out as they are trained."""

    device: torch.device
    threads: int = 1
    channels_last: bool = True
    name: str = TORCH

    def prepare(self, model: nn.Module, inputs: Any) -> Timer:
        twin = deep_copy(model).to(self.device).eval()
        if self.channels_last:
            twin = twin.to(memory_format=torch.channels_last)
        args, kwargs = arguments_of(twin, map_tensors(self._placed, inputs))

        def run() -> None:
            with torch.inference_mode():
                twin(*args, **kwargs)
            _finish(self.device)

        return windowed(run, around=self._with_threads)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        last = self.channels_last and tensor.dim() == 4
        return tensor.to(self.device, memory_format=torch.channels_last if last else torch.preserve_format)

    @contextmanager
    def _with_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    threads: int = 1
    name: str = ORT

    def prepare(self, model: nn.Module, inputs: Any) -> Timer:
        import onnxruntime  # here, since workers never need it

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4
        data = _as_onnx(model, inputs)
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            raise _refused(self.name, error) from error
        arrays = {_input_name(number): tensor.cpu().numpy() for number, tensor in enumerate(tensors_in(inputs))}
        # The file lacks inputs that the model does not use, such as targets.
        feed = {entry.name: arrays[entry.name] for entry in session.get_inputs()}
        return windowed(lambda: session.run(None, feed))


@dataclass(frozen=True)
class UserFunction(Runtime):
    """A function of the user's: (module, inputs) -> milliseconds, as of a phone behind a cable."""

    function: Callable[[nn.Module, Any], float]
    name: str
    threads: int = 1

    def prepare(self, model: nn.Module, inputs: Any) -> Timer:
        def call() -> float:
            found = self.function(deep_copy(model).eval(), inputs)
            if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf:
                raise StudyError(
                    f"latency.runtime {self.name!r} must return milliseconds, a finite number above 0, but returned {found!r}."
                )
            return float(found)

        return call


def runtime_of(latency: Latency, device: torch.device, *, channels_last: bool = True) -> Runtime:
    """The runtime that a study's section `latency` names.

    Raises:
        SpecError: `latency.runtime` names a function that cannot be imported.
    """
    name = chosen_name(latency, device)
    if name == TORCH:
        return Torch(device, latency.threads, channels_last)
    if name == ORT:
        if device.type != "cpu" and latency.runtime == ORT:
            raise SpecError(
                f"latency.runtime onnxruntime runs on the CPU, but --device is {device}; set latency.runtime = 'torch'."
            )
        return OnnxRuntime(latency.threads)
    return UserFunction(resolve(name, key="latency.runtime"), name, latency.threads)


def chosen_name(latency: Latency, device: torch.device) -> str:
    """`auto` is ONNX Runtime on a CPU, and torch elsewhere."""
    if latency.runtime == AUTO:
        return ORT if device.type == "cpu" else TORCH
    return latency.runtime


def windowed(run: Callable[[], object], around: Callable[[], Any] | None = None) -> Timer:
    """A call that repeats `run` for at least `MIN_WINDOW_MS`, so that a short one can be timed; the last of a few first runs,
    which also warm caches up, says how often."""
    around = around or _nothing

    def milliseconds(times: int) -> float:
        with around():
            start = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - start) * 1e3 / times

    first = [milliseconds(1) for _ in range(WARM_UPS)][-1]
    times = max(1, math.ceil(MIN_WINDOW_MS / max(first, 1e-3)))
    return lambda: milliseconds(times)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _as_onnx(model: nn.Module, inputs: Any) -> bytes:
    """The model as ONNX, by torch's older exporter, which takes a hundredth of a second for a layer, where the newer one takes
    more than one: a table of times needs hundreds of files. Both write the same convolutions and products."""
    batch = map_tensors(torch.Tensor.cpu, inputs)
    twin, tensors = Flat(deep_copy(model).cpu().eval(), batch), tuple(tensors_in(batch))
    names = [_input_name(number) for number in range(len(tensors))]
    buffer = io.BytesIO()
    try:
        with quiet_exporter(), torch.no_grad():
            torch.onnx.export(twin, (tensors,), buffer, dynamo=False, input_names=names)  # type: ignore[arg-type]
    except Exception as error:  # what tracing makes of a user's forward is not foreseen
        raise _refused(ORT, error) from error
    return buffer.getvalue()


def _input_name(number: int) -> str:
    return f"input{number}"


def _refused(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"latency.runtime {name} must take the model, but {type(error).__name__}: {first_line(error)}; choose another "
        "latency.runtime, such as 'torch'."
    )


def _finish(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
