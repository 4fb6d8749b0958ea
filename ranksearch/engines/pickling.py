"""How models, data and everything else that a worker needs are pickled."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
from torch import nn
from torch.nn.utils import parametrize

from ranksearch.errors import ModelError


class ModulePickler(cloudpickle.Pickler):
    """cloudpickle, also for modules with parametrised weights, of which torch itself pickles only the state dict."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            return _instance, (type(value),), vars(value)
        return super().reducer_override(value)


def _instance(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def pickled(evaluate: Callable[..., Any]) -> bytes:
    """`evaluate`, pickled for workers on other machines.

    Raises:
        ModelError: something in it cannot be pickled.
    """
    with picklable(), io.BytesIO() as stream:
        ModulePickler(stream).dump(evaluate)
        return stream.getvalue()


@contextmanager
def picklable() -> Iterator[None]:
    """Raise a `ModelError` with a remedy if something inside cannot be pickled."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"Model, data, loss and score must be picklable to reach the workers, but are not ({error}); fix that, or run the "
            "trials in this process with --workers 0."
        ) from error
