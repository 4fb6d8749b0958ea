"""Pictures of a task's inputs, targets and outputs, drawn by the task's own function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ranksearch.data import batches, part, size
from ranksearch.errors import ModelError, first_line
from ranksearch.report.pictures import INPUT, TARGET
from ranksearch.support.batch import batch_shapes, concatenate, one_input
from ranksearch.support.seeds import seeded
from ranksearch.task.task import Show, Task, predict

Picture = NDArray[np.uint8]
SHOWN_INPUTS = 3
"""How many inputs of the test split are drawn."""
OUTPUT = "output"


def check_show(task: Task) -> None:
    """Draw the first test input, its target and the model's output for it, if the task can draw.

    Raises:
        ModelError: `task.show` fails, or returns no picture.
    """
    if task.show is not None and size(task.data.test):
        for _ in drawn_inputs(task, [0]):
            pass
        for _ in drawn_outputs(task, task.model, [0]):
            pass


def shown_inputs(task: Task) -> list[int]:
    """The indices of the test inputs to draw, spread over the split."""
    count = size(task.data.test)
    return sorted({(2 * number + 1) * count // (2 * SHOWN_INPUTS) for number in range(SHOWN_INPUTS)})


def drawn_inputs(task: Task, chosen: list[int]) -> Iterator[tuple[int, str, Picture]]:
    """The index, the kind and the picture of these test inputs and their targets; raises `ModelError` as `check_show` does."""
    with seeded(0):  # reading an input may draw random numbers
        inputs, targets = (concatenate(column) for column in zip(*batches(_split(task, chosen), 1), strict=True))
    for place, index in enumerate(chosen):
        for kind, values in ((INPUT, inputs), (TARGET, targets)):
            if (picture := _drawn(task.show, kind, one_input(values, place))) is not None:
                yield index, kind, picture


def drawn_outputs(task: Task, model: nn.Module, chosen: list[int]) -> Iterator[tuple[int, Picture]]:
    """The index and the picture of a model's output for these test inputs; raises `ModelError` as `check_show` does."""
    with seeded(0):
        outputs, _ = predict(model, _split(task, chosen))
    for place, index in enumerate(chosen):
        if (picture := _drawn(task.show, OUTPUT, one_input(outputs, place))) is not None:
            yield index, picture


def _split(task: Task, chosen: list[int]) -> Any:
    return part(task.data.test, torch.tensor(chosen))


def _drawn(show: Show | None, kind: str, value: Any) -> Picture | None:
    assert show is not None
    try:
        picture = show(kind, value)
    except Exception as error:  # a user's function may raise anything
        raise ModelError(
            f"task.show must return a picture, or None where there is nothing to draw, but for {kind!r} and a value of shape "
            f"{batch_shapes(value)} it raised {type(error).__name__}: {first_line(error)}; correct the function."
        ) from error
    array = picture.numpy(force=True) if isinstance(picture, Tensor) else picture
    if array is None:
        return None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        returned = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise ModelError(
            f"task.show must return a picture, uint8 of shape (height, width, 3), or None, but for {kind!r} it returned "
            f"{returned}; correct the function."
        )
    return array
