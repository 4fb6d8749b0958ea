"""Where the dense model's weights come from."""

from __future__ import annotations

import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from ranksearch import training
from ranksearch.console import View
from ranksearch.errors import ModelError
from ranksearch.spec import StudySpec, TrainSpec
from ranksearch.tasks import Task
from ranksearch.training import Recipe


def train_dense(task: Task, spec: StudySpec, device: torch.device, view: View) -> None:
    """Train the dense model from the weights it has, as `spec.dense` says.

    Raises:
        ModelError: the loss became NaN or infinite.
    """
    if not spec.dense.epochs:
        return
    view.stage("training the dense net", spec.dense.epochs)
    training.place(task.model, device)
    try:
        for _ in training.fit(task.model, task, recipe(spec.dense), seed=spec.seed, device=device):
            view.step()
    except training.Diverged:
        raise ModelError(
            f"The dense net must train, but its loss became NaN or infinite at learning rate {spec.dense.learning_rate}; "
            "lower dense.learning_rate."
        ) from None


def recipe(spec: TrainSpec) -> Recipe:
    """The recipe that a section of a study file describes."""
    return Recipe(spec.epochs, spec.batch_size, spec.learning_rate, spec.weight_decay, spec.precision)


def load_weights(model: nn.Module, path: Path) -> bool:
    """Load a state dict into the model; False where there is no such file.

    Raises:
        ModelError: the file is no state dict, or not one of this model.
    """
    if not path.exists():
        return False
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, TypeError, AttributeError, OSError, EOFError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} must be a state dict of the model, but cannot be loaded: {first}") from error
    return True


def load_given(model: nn.Module, path: Path) -> None:
    """Load the weights that a study file names; raises `ModelError` as `load_weights` does, and where there is no file."""
    if not load_weights(model, path):
        raise ModelError(f"dense.weights must be a state dict of the model, but {path} does not exist.")
