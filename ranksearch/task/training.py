"""Training, scoring, recalibrating and timing models."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ranksearch.compress.surgery import copied
from ranksearch.data import at_once, batches, sample, size
from ranksearch.spec import Recipe
from ranksearch.support.batch import batch_size, run_model
from ranksearch.support.nesting import map_tensors
from ranksearch.support.seeds import seeded
from ranksearch.task.checkpoint import Checkpoint
from ranksearch.task.distillation import is_against_dense
from ranksearch.task.task import Loss, Score, Task, evaluation_batch, predict, targets_for

M = TypeVar("M", bound=nn.Module)

MAX_GRADIENT_NORM = 5.0
"""Gradients are clipped to this norm, well above those of stable training here (below 3). One huge step can ruin a CP model."""
WARM_UP_SHARE = 0.15
"""The share of all steps in which the learning rate rises: decomposed weights are badly scaled for full steps at the start."""


class Diverged(Exception):
    """The loss, or the score, became NaN or infinite."""


def fit(
    model: nn.Module, task: Task, recipe: Recipe, *, seed: int, device: torch.device, checkpoint: Checkpoint | None = None
) -> Iterator[int]:
    """Train `model` in place and yield the number of epochs done after each epoch; the caller may score the model, or stop.

    Shuffling, augmentation and dropout depend only on `seed`. Training resumes from `checkpoint` as if it had never stopped;
    the checkpoint is written when the caller asks for the next epoch.

    Raises:
        Diverged: the loss became NaN or infinite.
    """
    order = torch.Generator().manual_seed(seed)
    steps = math.ceil(size(task.data.train) / at_once(task.data.train, recipe.batch_size)) * recipe.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    use_bfloat16 = recipe.precision == "bfloat16"
    loss_of, dense = _loss_on(task, device), dense_on(task, task.loss, device)
    checkpoint = checkpoint or Checkpoint()
    finished_epochs = checkpoint.restore(order, model=model, optimizer=optimizer, schedule=schedule)
    for epoch in range(finished_epochs + 1, recipe.epochs + 1):
        # An epoch neither depends on the caller's random state nor changes it.
        with seeded(seed + epoch, device):
            model.train()
            for inputs, targets in batches(task.data.train, recipe.batch_size, generator=order, device=device):
                with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                    outputs = run_model(model, inputs)
                # The loss in float32: it is cheap, and a user's loss may not support bfloat16.
                outputs = map_tensors(_as_float32, outputs) if use_bfloat16 else outputs
                loss = loss_of(outputs, targets_for(task.loss, dense, inputs, targets))
                if not torch.isfinite(loss):
                    raise Diverged("the loss became NaN or infinite")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
        yield epoch
        checkpoint.save(epoch, order, model=model, optimizer=optimizer, schedule=schedule)


def _loss_on(task: Task, device: torch.device) -> Loss:
    """The loss, on the model's device if it has class weights. Moved as a copy, since other code uses it on the CPU."""
    return copy.deepcopy(task.loss).to(device) if isinstance(task.loss, nn.Module) else task.loss


def dense_on(task: Task, function: Loss | Score, device: torch.device) -> nn.Module:
    """The dense net; in eval mode and on the device if the loss or the score compares with its outputs."""
    if not is_against_dense(function):
        return task.model
    if next(task.model.parameters()).device == device:
        return task.model.eval()
    return place(copied(task.model), device, channels_last=task.channels_last).eval()


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _rate(step: int, steps: int) -> float:
    warm_up_steps = max(1, round(steps * WARM_UP_SHARE))
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps)))


def place(model: M, device: torch.device, *, channels_last: bool = True) -> M:
    """Move a model to a device, with 2-D kernels in channels-last format: a third faster for factorized layers on a CPU."""
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if channels_last and tensor.dim() == 4:  # `model.to(memory_format=...)` fails if the model has a 3-D kernel
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def takes_channels_last(task: Task) -> bool:
    """Whether the task's model runs with channels-last kernels; `x.view(len(x), -1)` in a forward fails with them."""
    inputs, _ = next(batches(task.data.train, 2))
    model = place(copied(task.model), torch.device("cpu"))
    try:
        with seeded(0), torch.no_grad():
            for training in (False, True):
                run_model(model.train(training), inputs)
    except RuntimeError:
        return False
    return True


def release(device: torch.device) -> None:
    """Free the GPU memory that torch caches, since other processes share the GPU."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


@torch.no_grad()
def score(model: nn.Module, task: Task, split: Dataset[Any], *, device: torch.device) -> float:
    """The task's score of `model` on a whole split."""
    return float(task.score(*predictions(model, task, split, device=device)))


def predictions(model: nn.Module, task: Task, split: Dataset[Any], *, device: torch.device) -> tuple[Any, Any]:
    """What the task's score takes: outputs of `model` for a whole split, and the targets, or the dense net's outputs."""
    dense = dense_on(task, task.score, device) if is_against_dense(task.score) else None
    return predict(model, split, device=device, dense=dense)


@torch.no_grad()
def loss_on(model: nn.Module, task: Task, split: Dataset[Any], *, seed: int, device: torch.device) -> float:
    """The task's loss of `model` on a whole split, the mean over its batches, in eval mode where the loss takes its outputs.

    Else in training mode, with normalisation and dropout as in eval mode. What else is random there follows the seed.
    """
    total, function, dense = 0.0, _loss_on(task, device), dense_on(task, task.loss, device)
    with seeded(seed, device), in_training_mode(model) if task.loss_in_training else nullcontext(model.eval()):
        for inputs, targets in batches(split, evaluation_batch(split), device=device):
            outputs, targets = run_model(model, inputs), targets_for(task.loss, dense, inputs, targets)
            total += batch_size(inputs) * float(function(outputs, targets))
    return total / size(split)


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, in which some models compute their losses, with normalisation and dropout in eval mode.

    On exit the model is in eval mode.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        model.eval()


@torch.no_grad()
def recalibrate(model: nn.Module, task: Task, *, seed: int, device: torch.device, inputs: int = 2048) -> None:
    """Measure the running statistics of batch normalisation again, on at most `inputs` random inputs of the training split.

    A decomposed layer changes the input of the next normalisation, so without this a score says little (EagleEye, ECCV 2020).
    Inputs and batches are drawn by `seed` alone, since a folder of images is often sorted by class.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta, measured = [norm.momentum for norm in norms], set[nn.Module]()

    def begin(norm: nn.modules.batchnorm._BatchNorm, inputs: Any) -> None:
        # Reset only when called, so that a layer that is not called, for example in an unused branch, keeps its statistics.
        if norm not in measured:
            measured.add(norm)
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()

    model.eval()
    order = torch.Generator().manual_seed(seed)
    # Augmentation follows the seed too, and the caller's random state is not changed.
    with seeded(seed, device), ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(begin))
        chosen = sample(task.data.train, inputs, seed=seed)
        # Batches of about equal size, since the average weighs all batches alike and a small last one has poor statistics.
        max_batch = at_once(chosen, evaluation_batch(chosen))
        batch_size = math.ceil(size(chosen) / math.ceil(size(chosen) / max_batch))
        for batch, _ in batches(chosen, batch_size, generator=order, device=device):
            run_model(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
