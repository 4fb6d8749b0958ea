"""The task of a study: a model, its data, a loss and a score."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ranksearch.compress.surgery import copied
from ranksearch.data import Splits, batches, example
from ranksearch.errors import DataError, ModelError, SpecError, first_line
from ranksearch.spec import StudySpec, resolve
from ranksearch.support.batch import batch_to, concatenate, run_model, tensors_in
from ranksearch.support.seeds import CPU, seeded

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> a scalar to minimise."""
Score: TypeAlias = Callable[[Tensor, Tensor], float]
"""(outputs, targets) of a whole split -> a number; higher is better. Scores should lie in [0, 1]: 0.01 is one percentage point,
and trials 0.15 below the dense model are dropped."""


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of inputs whose largest output is that of the target class; NaN if any output is NaN.

    Args:
        outputs: (inputs, classes).
        targets: class numbers (inputs,).
    """
    if torch.isnan(outputs).any():
        return math.nan
    return float((outputs.argmax(1) == targets).double().mean())


MAX_EVALUATION_INPUTS, MAX_EVALUATION_VALUES = 256, 2**23
"""The largest batch outside of training, in inputs and in input values. The second limit gives 55 colour images of 224 x 224,
for which the first layer of VGG-16 alone outputs 0.7 GB."""
FROM_PYTHON = "python:given"
"""The value of `task.model` and `task.data` in the spec of a study whose model and data were passed to `ranksearch.search`."""


@dataclass(frozen=True)
class Task:
    """A model to compress, its data, and how to judge it: by default as a classifier, by any other loss and score if given."""

    model: nn.Module
    data: Splits
    loss: Loss = F.cross_entropy
    score: Score = accuracy
    channels_last: bool = True
    """Whether 2-D kernels may use the channels-last memory format; a study tests this, see `takes_channels_last`."""

    @property
    def score_name(self) -> str:
        """The name of the score in reports."""
        return getattr(self.score, "__name__", "score")


def evaluation_batch(split: Dataset[Any]) -> int:
    """The batch size for a split outside of training."""
    # Reading an input may draw random numbers; do not change the caller's random state.
    with seeded(0):
        values = sum(tensor.numel() for tensor in tensors_in(example(split)))
    return max(1, min(MAX_EVALUATION_INPUTS, MAX_EVALUATION_VALUES // values))


@torch.no_grad()
def predict(model: nn.Module, split: Dataset[Any], *, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a whole split, in order, on the CPU."""
    model.eval()
    evaluation_batches = batches(split, evaluation_batch(split), device=device)
    pairs = [batch_to((run_model(model, inputs), targets), CPU) for inputs, targets in evaluation_batches]
    outputs, targets = concatenate(pairs)
    return outputs, targets


def check_outputs(task: Task, *, trains: bool = True) -> None:
    """Check that the model, the data, the loss and the score fit together. Leaves the model in eval mode.

    Args:
        task: the task to check.
        trains: whether the model will be trained; then its outputs must depend on a trainable weight.

    Raises:
        ModelError: the model does not accept the inputs of a split or does not run in training mode; its output is not one
            tensor, not (batch, classes) for `accuracy`, or depends on no trainable weight; or loss or score give no number.
    """
    classes = task.data.classes
    inputs, targets = next(batches(task.data.train, 2))
    with torch.no_grad():
        outputs = run_model(task.model.eval(), inputs)
        for name, split in (("validation", task.data.validation), ("test", task.data.test)):
            others = next(batches(split, 1))[0]
            try:
                run_model(task.model, others)
            except Exception as error:
                raise ModelError(
                    f"The model must accept the inputs of every split, but with inputs of {name!r}, of shape "
                    f"{tuple(others.shape[1:])} (those of 'train': {tuple(inputs.shape[1:])}), its forward raised "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        copy = copied(task.model).train()
        try:
            with seeded(0), torch.enable_grad():
                training_outputs = run_model(copy, inputs)
        except Exception as error:
            raise ModelError(
                f"The model must run in training mode, but raised {type(error).__name__}: {first_line(error)}"
            ) from error
    # Some models return more in training mode, for example the outputs of auxiliary classifiers.
    for output in (outputs, training_outputs):
        if not isinstance(output, Tensor):
            raise ModelError(
                f"The model must return one tensor, in training mode too, but returns a {type(output).__name__}; wrap it."
            )
    if trains and not training_outputs.requires_grad:
        raise ModelError(
            "The model must be trainable, but its outputs depend on no trainable weight; call requires_grad_() on frozen "
            "weights, and remove no_grad from its forward."
        )
    if task.score is accuracy and classes is not None and (outputs.dim() != 2 or outputs.shape[1] < classes):
        raise ModelError(
            f"The model must return {classes} outputs for each input, one per class, but returns shape "
            f"{tuple(outputs.shape[1:])}; check its arguments against the data."
        )
    _check_number("loss", task.loss, outputs, targets)
    try:
        _check_number("score", task.score, outputs, targets)
    except ModelError:
        # A score may need more than two inputs, for example some of each class.
        _check_number("score", task.score, *predict(task.model, task.data.validation))


def check_float32(task: Task) -> None:
    """Refuse a task with float64 tensors, which Apple's GPUs do not support.

    Raises:
        ModelError: a weight or buffer of the model or the loss, an input or a target is float64 or complex128.
    """
    inputs, targets = next(batches(task.data.train, 2))
    tensors = {"the inputs are": inputs, "the targets are": targets}
    for module in (task.model, task.loss):
        if isinstance(module, nn.Module):
            tensors |= {f"{name} is": tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.dtype in (torch.float64, torch.complex128):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"--device mps does not support {dtype}, but {name} {dtype}; use float32, or --device cpu.")


def _check_number(name: str, function: Callable[[Tensor, Tensor], Any], outputs: Tensor, targets: Tensor) -> None:
    try:
        float(function(outputs, targets))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"The {name} must return one number for outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}, but raised {type(error).__name__}: {first_line(error)}"
        ) from error


def load_task(spec: StudySpec) -> Task:
    """Create the task that a study's section `task` describes.

    Raises:
        SpecError: a reference cannot be imported or called with its arguments.
        ModelError: `task.model` does not return an `nn.Module`.
        DataError: `task.data` does not return `Splits`.
    """
    section = spec.task
    torch.manual_seed(spec.seed)  # for the initial weights
    model = _call(section.model, section.model_args, "task.model")
    if not isinstance(model, nn.Module):
        raise ModelError(f"task.model must return an nn.Module, but {section.model!r} returned a {type(model).__name__}.")
    data = _call(section.data, section.data_args, "task.data")
    if not isinstance(data, Splits):
        raise DataError(f"task.data must return ranksearch.data.Splits, but {section.data!r} returned a {type(data).__name__}.")
    return Task(model, data, resolve(section.loss, key="task.loss"), resolve(section.score, key="task.score"))


def _call(reference: str, arguments: Mapping[str, Any], key: str) -> Any:
    target = resolve(reference, key=key)
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        raise SpecError(f"{key}: {reference} must take the arguments {dict(arguments)}, but: {error}.") from None
    try:
        return target(**arguments)
    except (OSError, ValueError, TypeError, LookupError, AssertionError, RuntimeError, pickle.UnpicklingError) as error:
        raise SpecError(
            f"{key}: {reference} must succeed with {dict(arguments)}, but raised {type(error).__name__}: {first_line(error)}"
        ) from error
