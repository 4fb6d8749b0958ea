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

from ranksearch.data import Splits, batches, example
from ranksearch.data.disparity import delta_1_25
from ranksearch.errors import DataError, ModelError, SpecError, first_line
from ranksearch.references import resolve
from ranksearch.results.scores import DELTA
from ranksearch.spec import StudySpec
from ranksearch.support.batch import batch_size, batch_to, concatenate, join_outputs, run_model
from ranksearch.support.nesting import has_lists_per_input, tensors_in
from ranksearch.support.seeds import CPU, seeded
from ranksearch.task.distillation import TITLES, is_against_dense

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""(outputs, targets) of a batch, nested as model and data give them -> a scalar to minimise."""
Score: TypeAlias = Callable[[Any, Any], float]
"""(outputs, targets) of a whole split, nested likewise -> a number; higher is better. Scores should lie in [0, 1]: 0.01 is one
percentage point, and trials 0.15 below the dense model are dropped."""
Show: TypeAlias = Callable[[str, Any], Any]
"""(kind, value): of one input of a split, without the batch dimension, its `input`, `target` or `output` -> a picture (height,
width, 3) of uint8, or None where there is nothing to draw."""


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


@dataclass(frozen=True)
class Task:
    """A model to compress, its data, and how to judge it: by default as a classifier, by any other loss and score if given."""

    model: nn.Module
    data: Splits
    loss: Loss = F.cross_entropy
    score: Score = accuracy
    show: Show | None = None
    """Draws inputs, targets and outputs for the report."""
    channels_last: bool = True
    """Whether 2-D kernels may use the channels-last memory format; a study tests this, see `takes_channels_last`."""
    loss_in_training: bool = False
    """Whether the loss takes the outputs of training mode only, since those of eval mode are nested otherwise; a study tests
    this."""

    @property
    def score_name(self) -> str:
        """The name of the score in reports."""
        titles = {**TITLES, delta_1_25: DELTA}
        own = getattr(self.score, "__name__", "score")
        return next((title for function, title in titles.items() if function is self.score), own)


def evaluation_batch(split: Dataset[Any]) -> int:
    """The batch size for a split outside of training."""
    # Reading an input may draw random numbers; do not change the caller's random state.
    with seeded(0):
        values = sum(tensor.numel() for tensor in tensors_in(example(split)))
    return max(1, min(MAX_EVALUATION_INPUTS, MAX_EVALUATION_VALUES // values))


def targets_for(function: Loss | Score, dense: nn.Module, inputs: Any, targets: Any) -> Any:
    """What a loss or a score compares outputs with: the targets, or the outputs of the dense net if it is made for those."""
    if not is_against_dense(function):
        return targets
    with torch.no_grad():
        return run_model(dense, inputs)


@torch.no_grad()
def predict(
    model: nn.Module, split: Dataset[Any], *, device: torch.device = CPU, dense: nn.Module | None = None
) -> tuple[Any, Any]:
    """Outputs in eval mode and targets of a whole split, in order, on the CPU.

    Args:
        model: the model, on the device.
        split: its inputs and targets.
        device: where to run the model.
        dense: a net whose outputs, in eval mode, take the place of the targets; on the device.

    Raises:
        DataError: those of two batches do not fit together.
    """
    model.eval()
    outputs, targets, sizes, per_input = [], [], [], False
    for inputs, given in batches(split, evaluation_batch(split), device=device):
        outputs.append(batch_to(run_model(model, inputs), CPU))
        targets.append(batch_to(given if dense is None else run_model(dense, inputs), CPU))
        sizes.append(batch_size(inputs))
        per_input = per_input or has_lists_per_input((inputs, given))
    try:
        joined = join_outputs(outputs, sizes, per_input=per_input)
        return joined, concatenate(targets) if dense is None else join_outputs(targets, sizes, per_input=per_input)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "must match" not in str(error):
            raise
        raise DataError(
            f"A score needs the outputs and targets of all batches in one, but those of two batches differ in nesting or shape "
            f"({first_line(error)}); let the model, or a collate function, give lists with an entry for each input."
        ) from error


def load_task(spec: StudySpec) -> Task:
    """Create the task that a study's section `task` describes.

    Raises:
        SpecError: a reference cannot be imported or called with its arguments.
        ModelError: `task.model` does not return an `nn.Module`.
        DataError: `task.data` does not return `Splits`.
    """
    section = spec.task
    model = load_net(section.model, section.model_args, seed=spec.seed)
    data = _call(section.data, section.data_args, "task.data")
    if not isinstance(data, Splits):
        raise DataError(f"task.data must return ranksearch.data.Splits, but {section.data!r} returned a {type(data).__name__}.")
    show = resolve(section.show, key="task.show") if section.show else None
    return Task(model, data, resolve(section.loss, key="task.loss"), resolve(section.score, key="task.score"), show)


def load_net(reference: str, arguments: Mapping[str, Any], *, seed: int = 0, key: str = "task.model") -> nn.Module:
    """The model that a function makes; raises as `load_task` does. `key` names the reference in errors."""
    torch.manual_seed(seed)  # for the initial weights
    model = _call(reference, arguments, key)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{key} must return an nn.Module, but {reference!r} returned a {type(model).__name__}.")
    return model


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
