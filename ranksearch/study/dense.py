"""The dense model's weights: trained here, or loaded from a file."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor, nn

from ranksearch.compress.checks import check_weights
from ranksearch.compress.surgery import copied
from ranksearch.compress.weights import digest_of, load_, state_of, weights_of
from ranksearch.console import View
from ranksearch.errors import ModelError, StudyError
from ranksearch.spec import StudySpec
from ranksearch.study import folder
from ranksearch.study.session import Session
from ranksearch.support.files import write_whole, writing
from ranksearch.task import training
from ranksearch.task.checkpoint import Checkpoint
from ranksearch.task.task import Task

DENSE_DIGEST = "ranksearch:dense"
"""Name of the study attribute that holds the SHA-256 of the dense model's trained weights."""


def make_dense(session: Session, spec: StudySpec, task: Task, device: torch.device, out: Path, *, model_given: bool) -> Task:
    """Load the dense model's weights from an earlier run, or else train the model as the spec says.

    Returns:
        The task, with the trained model on the device.
    """
    path, unfinished = out / folder.DENSE_FILE, out / folder.UNFINISHED / "dense.pt"
    with session.stage("dense"):
        # A model passed from Python keeps its own weights: the folder may hold those of another model.
        if model_given or not load_weights(task.model, path):
            train_dense(task, spec, device, session.view, unfinished=unfinished)
        digest = digest_of(task.model)
        _check_digest(session.study, digest)
        # Weights first: a digest without them could not be resumed from, since retraining seldom gives the same bits.
        if not path.exists():
            with writing(f"The dense net's {path}"):
                write_whole(path, weights_of(task.model))
        unfinished.unlink(missing_ok=True)
        if DENSE_DIGEST not in session.study.user_attrs:
            session.study.set_user_attr(DENSE_DIGEST, digest)
    # Use the memory layout of training: otherwise the factors of a resumed run would differ in their last bits.
    model = training.place(task.model, device, channels_last=task.channels_last).eval()
    # Training may have made weights NaN or infinite.
    check_weights(model)
    return replace(task, model=model)


def _check_digest(study: optuna.Study, digest: str) -> None:
    """Raise `StudyError` unless the study was started with this dense model."""
    if study.user_attrs.get(DENSE_DIGEST, digest) != digest:
        raise StudyError(
            f"The study {study.study_name!r} in this storage was started from another dense model; choose another name or "
            "--storage, or --fresh to start over."
        )


def train_dense(task: Task, spec: StudySpec, device: torch.device, view: View, *, unfinished: Path) -> None:
    """Train the dense model from its current weights, as `spec.dense` says. `unfinished` is the file of its checkpoint.

    Raises:
        ModelError: the loss became NaN or infinite.
    """
    if not spec.dense.epochs:
        return
    checkpoint = Checkpoint(unfinished, f"{spec.dense}, seed {spec.seed}, from {digest_of(task.model)}")
    view.stage("training the dense net", spec.dense.epochs, checkpoint.epochs)
    # Train a copy: some forwards store tensors in the model during training, after which it could not be copied any more.
    model = training.place(copied(task.model), device, channels_last=task.channels_last)
    try:
        for _ in training.fit(model, task, spec.dense, seed=spec.seed, device=device, checkpoint=checkpoint):
            view.step()
    except training.Diverged:
        raise ModelError(
            f"The dense net must train, but its loss became NaN or infinite at learning rate {spec.dense.learning_rate}; "
            "lower dense.learning_rate."
        ) from None
    task.model.load_state_dict(model.state_dict())


def load_weights(model: nn.Module, path: Path) -> bool:
    """Load a state dict into the model. Returns False if the file does not exist.

    Raises:
        ModelError: the file is not a state dict, or is one of another model.
    """
    if not path.exists():
        return False
    state = _read(path)
    try:
        load_(model, state)
    except Exception as error:  # a module's own loading code may raise anything
        difference = _difference(model, state) or " ".join(str(error).split())
        raise ModelError(f"{path} must be a state dict of the model, but {difference}") from error
    return True


def load_required_weights(model: nn.Module, path: Path) -> None:
    """Load the weights file that a study names; raises `ModelError` as `load_weights` does, and if the file does not exist."""
    if not load_weights(model, path):
        raise ModelError(f"dense.weights must be a state dict of the model, but {path} does not exist.")


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file. Raises `ModelError` if there is none."""
    safe = path.suffix == ".safetensors"
    writer = "safetensors.torch.save_file" if safe else "torch.save"
    try:
        content = path.read_bytes()
        state = state_of(content) if safe else _unpickled(content)
    except Exception as error:  # torch may raise anything on a file that another program wrote
        raise ModelError(
            f"{path} must be a state dict, but cannot be read: {_reason(error, writer)}; write it by "
            f"{writer}(model.state_dict(), ...)."
        ) from error
    if why := _why_no_state_dict(state):
        raise ModelError(f"{path} must be a state dict, but {why}")
    return state


class _Inert:
    """Takes the place of an object whose class is not safe to load, and keeps its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _unpickled(content: bytes) -> Any:
    """Load the content of a torch.save file. Objects that are not safe to load become `_Inert`, so their code never runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of TorchScript files and then refuses them anyway
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not zipfile.is_zipfile(io.BytesIO(content)):
                raise
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        inert: list[Any] = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _reason(error: Exception, writer: str) -> str:
    """Why a file could not be read."""
    if isinstance(error, OSError) and error.filename:  # an error of the file system: torch's for cut files have no filename
        return str(error.strerror)
    if held := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return f"it holds a {held[1]}"
    return f"it is damaged, or was not written by {writer}"


def _why_no_state_dict(state: Any) -> str:
    """What a file holds instead of a state dict, and the remedy, as the end of a sentence; empty for a state dict."""
    if _is_model(state):
        return f"is a whole model, a {type(state).__name__}; save model.state_dict()."
    if not isinstance(state, Mapping):
        return f"is a {type(state).__name__}; save model.state_dict()."
    odd = next((name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))), None)
    if odd is None:
        return ""
    for name, value in state.items():
        if isinstance(value, Mapping) and value and not _why_no_state_dict(value):
            return f"is a training checkpoint, with a state dict under {name!r}; save only that."
        if _is_model(value):
            return f"is a training checkpoint, with a whole model under {name!r}; save only the state_dict() of that model."
    return f"its entry {odd!r} is not a named tensor; save only the state dict."


def _is_model(value: Any) -> bool:
    return isinstance(value, _Inert) and "_modules" in vars(value)


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How a state dict differs from the model's, and the remedy, as the end of a sentence; empty if names and shapes agree."""
    own = model.state_dict()
    missing, unexpected = [name for name in own if name not in state], [name for name in state if name not in own]
    prefix = next((name.removesuffix(inner) for name in unexpected[:1] for inner in own if name.endswith(f".{inner}")), "")
    if prefix and all(name.startswith(prefix) for name in state):
        return f"all its names begin with {prefix!r}; remove that prefix."
    others = [name for name in own if name in state and own[name].shape != state[name].shape]
    parts = [f"it lacks {_some(missing)}"] if missing else []
    parts += [f"it holds {_some(unexpected)}, which the model lacks"] if unexpected else []
    parts += [f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} in the model" for name in others[:1]]
    return ", ".join(parts) + ("; use the model and the arguments that it was trained with." if parts else "")


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
