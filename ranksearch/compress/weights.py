"""Saves weights as safetensors, with the versions of the modules that wrote them, and loads them into a model."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeVar

import safetensors.torch
from torch import Tensor, nn

from ranksearch.errors import ModelError

M = TypeVar("M", bound=nn.Module)

VERSIONS = "state_dict_metadata"
"""Key in a safetensors header. Its value is JSON of `state_dict()._metadata`, the version of each module by name."""


def weights_of(model: nn.Module) -> bytes:
    """The state dict of a model as safetensors bytes, with the versions of its modules in the header."""
    versions = getattr(model.state_dict(), "_metadata", None)
    header = None if versions is None else {VERSIONS: json.dumps(versions)}
    return safetensors.torch.save(_tensors(model), header)


def digest_of(model: nn.Module) -> str:
    """The SHA-256, in hexadecimal, of the names and values in the state dict, without the versions of modules."""
    return hashlib.sha256(safetensors.torch.save(_tensors(model))).hexdigest()


def state_of(weights: bytes) -> Mapping[str, Tensor]:
    """The state dict in safetensors bytes, with the versions of its modules if the header has them.

    Raises:
        SafetensorError: the bytes are not a complete safetensors file.
    """
    state = OrderedDict(safetensors.torch.load(weights))
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size]).get("__metadata__", {})
    if VERSIONS in header:
        vars(state)["_metadata"] = json.loads(header[VERSIONS])
    return state


def load_(model: M, state: Mapping[str, Tensor]) -> M:
    """Load a state dict into `model`, in place.

    Raises:
        RuntimeError: names or shapes do not fit. A module with its own loading code may raise anything.
    """
    if getattr(state, "_metadata", None) is not None:
        model.load_state_dict(state)
        return model
    # Files of other programs hold no versions, and torch takes such a state dict for one from before versions existed. Most
    # were written by current modules, so try the current versions first.
    current = OrderedDict(state)
    vars(current)["_metadata"] = getattr(model.state_dict(), "_metadata", None)
    try:
        model.load_state_dict(current)
    except RuntimeError as error:
        try:
            model.load_state_dict(state)
        except Exception:
            raise error from None
    return model


def check_state(model: nn.Module) -> None:
    """Raise `ModelError` if a model's state dict holds anything but tensors: `weights_of` could not write it."""
    for name, kept in model.state_dict().items():
        if not isinstance(kept, Tensor):
            kind = type(kept).__name__
            raise ModelError(f"A model's state_dict() must hold tensors only, but {name!r} is a {kind}; keep it elsewhere.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
