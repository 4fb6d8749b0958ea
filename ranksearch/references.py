"""References of study files to code: `package.module:name`."""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from ranksearch.errors import MissingCodeError, RankSearchError, SpecError, first_line, nearest


def resolve(reference: str, *, key: str) -> Callable[..., Any]:
    """Import the callable that a `package.module:name` reference names. `key` names the setting in errors.

    Raises:
        SpecError: the module cannot be imported or has no such name, or the object is not callable.
    """
    module_name, _, name = reference.partition(":")
    target: Any = imported(module_name, reference, key=key)
    for part in name.split("."):
        if not hasattr(target, part):
            raise SpecError(f"{key}: module {module_name!r} has no {name!r}.{nearest(name, _public(target))}")
        target = getattr(target, part)
    if not callable(target):
        raise SpecError(f"{key} must name a callable, but {reference!r} is of type {type(target).__name__}.")
    return typing.cast(Callable[..., Any], target)


def imported(module: str, reference: str, *, key: str) -> types.ModuleType:
    """Import a module. `reference` and `key` name the value and its setting in errors.

    Raises:
        SpecError: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingCodeError(
            f"{key} must be importable, but {reference!r} is not: {error}; check the spelling, install the package, or "
            "run from the folder that holds it."
        ) from None
    except RankSearchError as error:
        raise SpecError(f"{key} must be importable, but {reference!r} cannot be used: {error}") from None
    except Exception as error:
        raise SpecError(
            f"{key} must be importable, but {reference!r} raised {type(error).__name__}: {first_line(error)}; fix the module."
        ) from error


def _public(module: Any) -> Iterable[str]:
    return [name for name in vars(module) if not name.startswith("_")]
