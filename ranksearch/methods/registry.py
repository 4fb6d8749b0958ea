"""The registry of methods: those of this package, and those that users add."""

from __future__ import annotations

import inspect
import re
from typing import get_args

from ranksearch.errors import PlanError
from ranksearch.methods.base import Estimate, Method
from ranksearch.plan import KINDS, OPTIONAL, Factorization

METHODS: dict[type[Factorization], Method] = {}
"""By type of factorization, in the order of registration. Only `register_method` changes it."""

_CALLED_WITH = {
    "bounds": ("weight",),
    "parts": ("weight", "ranks"),
    "prepare": ("kernel", "ranks", "seed", "rows"),
    "factors": ("kernel", "prepared", "ranks", "seed", "sweeps"),
    "errors": ("prepared", "ranks"),
}
"""How a study calls the functions of a method, all arguments by position."""

METHOD_NAME = r"[a-z][a-z0-9_]*"
RESERVED_FIELDS = ("method", *OPTIONAL)
"""The keys of a plan's entry for a layer that are not ranks."""


def method_of(value: Factorization) -> Method:
    """The method that a plan's value selects.

    Raises:
        PlanError: no method is registered for the value's type.
    """
    method = METHODS.get(type(value))
    if method is None:
        raise PlanError(f"A plan's values must have a registered method, but got {value!r}; call ranksearch.register_method.")
    return method


def register_method(method: Method) -> None:
    """Register a decomposition, so that plans, `factorize_` and the study's key `space.methods` can use it.

    Call it once, in the module that defines the method. A study sends its registered methods to its workers. Other processes,
    for example `ranksearch report`, import the modules that the study's key `plugins` names. Registering the same class again
    is allowed, also if its module or notebook cell runs again.

    Args:
        method: an instance of a subclass of `ranksearch.methods.Method`. Its `kind` is a frozen dataclass that derives from
            `Factorization`: it names the `method`, its `title`, and the ranks, one field each.

    Raises:
        PlanError: `method` is not a valid method, or another method has its name.
    """
    if not isinstance(method, Method):
        raise PlanError(f"register_method takes an instance of a subclass of ranksearch.methods.Method, but got {method!r}.")
    kind = _checked_kind(method)
    for name, arguments in _CALLED_WITH.items():
        _check_signature(method, name, arguments)
    registered = KINDS.get(kind.method)
    if registered is not None and (registered.__module__, registered.__qualname__) != (kind.__module__, kind.__qualname__):
        raise PlanError(
            f"A method's name must be unique, but both {kind.__module__} and {registered.__module__} use {kind.method!r}; "
            "rename one."
        )
    if registered is not None and registered is not kind:
        METHODS.pop(registered, None)  # the same class defined again, for example by a notebook cell that ran twice
    KINDS[kind.method] = kind
    METHODS[kind] = method


def _check_signature(method: Method, name: str, arguments: tuple[str, ...]) -> None:
    """Raise `PlanError` unless this function of the method can be called with these arguments."""
    signature = inspect.signature(getattr(method, name))
    try:
        signature.bind(*arguments)
    except TypeError:
        raise PlanError(
            f"{type(method).__name__}.{name} must take ({', '.join(arguments)}), as {Method.__name__}.{name} does, but is "
            f"{name}{signature}."
        ) from None


def _checked_kind(method: Method) -> type[Factorization]:
    owner, kind = type(method).__name__, getattr(method, "kind", None)
    if not (isinstance(kind, type) and issubclass(kind, Factorization) and "__dataclass_params__" in vars(kind)):
        raise PlanError(f"{owner}.kind must be a frozen dataclass that derives from Factorization, but is {kind!r}.")
    name, title, ranks = getattr(kind, "method", None), getattr(kind, "title", None), kind.rank_names()
    if not (isinstance(name, str) and re.fullmatch(METHOD_NAME, name) and isinstance(title, str)):
        raise PlanError(
            f"{kind.__name__} must have a title, and a method name of lower-case letters, digits and _, but has title="
            f"{title!r} and method={name!r}."
        )
    if not ranks or set(ranks) & set(RESERVED_FIELDS):
        raise PlanError(
            f"{kind.__name__} must have a field for each rank, none of them called {', '.join(RESERVED_FIELDS)}, but has "
            f"{', '.join(ranks) or 'none'}."
        )
    vbmf = getattr(method, "vbmf", None)
    if not isinstance(vbmf, tuple) or len(vbmf) != len(ranks) or not set(vbmf) <= set(get_args(Estimate)):
        raise PlanError(
            f"{owner}.vbmf must name one of {', '.join(get_args(Estimate))} for each of the ranks {', '.join(ranks)}, but is "
            f"{vbmf!r}."
        )
    return kind
