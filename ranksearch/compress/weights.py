"""Weights as safetensors, with the versions of the modules that wrote them; and back into a model."""

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
"""Key in the header of a safetensors file: JSON of `state_dict()._metadata`, the version of each module by its name."""


def weights_of(model: nn.Module) -> bytes:
    """The state dict of a model as safetensors bytes, on the CPU; the header holds the versions of its modules."""
    versions = getattr(model.state_dict(), "_metadata", None)
    header = None if versions is None else {VERSIONS: json.dumps(versions)}
    return safetensors.torch.save(_tensors(model), header)


def digest_of(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the names and values in the state dict; versions of modules do not count."""
    return hashlib.sha256(safetensors.torch.save(_tensors(model))).hexdigest()


def state_of(weights: bytes) -> Mapping[str, Tensor]:
    """The state dict in safetensors bytes, with the versions of its modules where the header holds them.

    Raises:
        SafetensorError: the bytes are no safetensors, or not all of one.
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
        RuntimeError: names or shapes do not fit. A module that loads by code of its own may raise anything.
    """
    if getattr(state, "_metadata", None) is not None:
        model.load_state_dict(state)
        return model
    # Safetensors files of other programs hold no versions, and torch reads such a state dict as older than versions are.
    # Most were written by current modules, so that is tried first.
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
    """Refuse a model whose state dict holds more than tensors, which `weights_of` cannot write, with `ModelError`."""
    for name, kept in model.state_dict().items():
        if not isinstance(kept, Tensor):
            kind = type(kept).__name__
            raise ModelError(f"A model's state must be of tensors, but {name!r} is a {kind}; keep it elsewhere.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
