"""Checks that model, data, loss and score fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.compress.surgery import copied
from ranksearch.data import batches
from ranksearch.errors import ModelError, first_line
from ranksearch.support.batch import arguments_of, batch_shapes, input_shapes, run_model
from ranksearch.support.nesting import as_plain, map_tensors, named_tensors, nesting, tensors_in
from ranksearch.support.seeds import seeded
from ranksearch.task.distillation import is_against_dense
from ranksearch.task.task import Task, accuracy, predict, targets_for


def check_arguments(task: Task) -> None:
    """Raise `DataError` if the model's forward cannot take the inputs of the data set as its arguments."""
    arguments_of(task.model, next(batches(task.data.train, 1))[0])


def check_outputs(task: Task, *, trains: bool = True) -> Task:
    """Check that the model, the data, the loss and the score fit together. Leaves the model in eval mode.

    Args:
        task: the task to check.
        trains: whether the model will be trained; then its outputs must depend on a trainable weight.

    Returns:
        The task, with `loss_in_training`.

    Raises:
        ModelError: the model does not accept the inputs of a split or does not run in training mode; its output is not one
            tensor for `accuracy` or cross-entropy, not (batch, classes) for `accuracy`, or depends on no trainable weight; or
            loss or score give no number.
    """
    inputs, targets = next(batches(task.data.train, 2))
    with torch.no_grad():
        outputs = run_model(task.model.eval(), inputs)
        _check_splits(task, inputs)
        training_outputs = _in_training(task, inputs)
    # The built-in loss and score take one tensor. Some models return more in training mode, for example auxiliary outputs.
    for output, judge in ((outputs, task.score is accuracy), (training_outputs, task.loss is F.cross_entropy)):
        if judge and not isinstance(output, Tensor):
            raise ModelError(
                f"The model must return one tensor, in training mode too, but returns a {type(output).__name__}; wrap it, or "
                "give a loss and a score of your own."
            )
    if trains and not any(tensor.requires_grad for tensor in tensors_in(training_outputs)):
        raise ModelError(
            "The model must be trainable, but its outputs depend on no trainable weight; call requires_grad_() on frozen "
            "weights, and remove no_grad from its forward."
        )
    classes = task.data.classes
    if task.score is accuracy and classes is not None and (outputs.dim() != 2 or outputs.shape[1] < classes):
        raise ModelError(
            f"The model must return {classes} outputs for each input, one per class, but returns shape "
            f"{tuple(outputs.shape[1:])}; check its arguments against the data."
        )
    loss_in_training = nesting(training_outputs) != nesting(outputs)
    for_loss, for_score = (targets_for(each, task.model, inputs, targets) for each in (task.loss, task.score))
    _check_number("loss", task.loss, map_tensors(Tensor.detach, training_outputs if loss_in_training else outputs), for_loss)
    try:
        _check_number("score", task.score, outputs, for_score)
    except ModelError:
        if is_against_dense(task.score):
            raise
        # A score may need more than two inputs, for example some of each class.
        _check_number("score", task.score, *predict(task.model, task.data.validation))
    return replace(task, loss_in_training=loss_in_training)


def _check_splits(task: Task, inputs: Any) -> None:
    """Run the model on an input of each other split than the training split, which has these inputs."""
    for name, split in (("validation", task.data.validation), ("test", task.data.test)):
        others = next(batches(split, 1))[0]
        try:
            run_model(task.model, others)
        except Exception as error:
            raise ModelError(
                f"The model must accept the inputs of every split, but with inputs of {name!r}, of shape "
                f"{input_shapes(others)} (those of 'train': {input_shapes(inputs)}), its forward raised "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error


def _in_training(task: Task, inputs: Any) -> Any:
    """The outputs of a copy of the model in training mode."""
    copy = copied(task.model).train()
    try:
        with seeded(0), torch.enable_grad():
            return run_model(copy, inputs)
    except Exception as error:
        fix = "; give it the targets among its inputs, if it computes its losses itself" if "target" in str(error) else ""
        raise ModelError(
            f"The model must run in training mode, but raised {type(error).__name__}: {first_line(error)}{fix}"
        ) from error


def check_float32(task: Task) -> None:
    """Refuse a task with float64 tensors, which Apple's GPUs do not support.

    Raises:
        ModelError: a weight or buffer of the model or the loss, an input or a target is float64 or complex128.
    """
    inputs, targets = next(batches(task.data.train, 2))
    tensors = {f"{name} are": tensor for name, tensor in named_tensors(inputs, "the inputs").items()}
    tensors |= {f"{name} are": tensor for name, tensor in named_tensors(targets, "the targets").items()}
    for module in (task.model, task.loss):
        if isinstance(module, nn.Module):
            tensors |= {f"{name} is": tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.float64, torch.complex128):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"--device mps does not support {dtype}, but {name} {dtype}; use float32, or --device cpu.")


def _check_number(name: str, function: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> None:
    try:
        float(function(outputs, targets))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ModelError(
            f"The {name} must return one number for outputs of shape {as_plain(batch_shapes(outputs))} and targets of shape "
            f"{batch_shapes(targets)}, but raised {type(error).__name__}: {first_line(error)}"
        ) from error
