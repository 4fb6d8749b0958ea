"""The methods that plans, searches and workers know: those of this package, and those that users add."""

from __future__ import annotations

import re
from typing import get_args

from ranksearch.errors import PlanError
from ranksearch.methods.base import Estimate, Method
from ranksearch.plan import KINDS, Factorization

METHODS: dict[type[Factorization], Method] = {}
"""By the type of its values, in the order of registration. Changed by `register_method` alone."""

NAME = r"[a-z][a-z0-9_]*"
RESERVED = ("method", "kernel", "order")
"""What a plan's entry for a layer holds beside the ranks."""


def method_of(value: Factorization) -> Method:
    """The code behind a plan's value.

    Raises:
        PlanError: its type is of no registered method.
    """
    method = METHODS.get(type(value))
    if method is None:
        raise PlanError(f"A plan's values must be of registered methods, but got {value!r}; call ranksearch.register_method.")
    return method


def register_method(method: Method) -> None:
    """Make a decomposition known: to plans, to `factorize_`, and to searches that name it in `space.methods`.

    Call it where the class of the method is defined, once at import. The workers of a study get the methods from it. Another
    process, such as `ranksearch report`, imports the modules that the study's key `plugins` names. The same class may be
    registered again, also when its module or notebook cell runs anew.

    Args:
        method: an instance of a subclass of `ranksearch.methods.Method`. Its `kind` is a frozen dataclass that derives from
            `Factorization`: it names the `method`, its `title`, and the ranks, one field each.

    Raises:
        PlanError: it is none, or its name is another method's.
    """
    if not isinstance(method, Method):
        raise PlanError(f"register_method takes an instance of a subclass of ranksearch.methods.Method, but got {method!r}.")
    kind = _checked_kind(method)
    known = KINDS.get(kind.method)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise PlanError(
            f"A method's name must be its own, but {kind.method!r} of {kind.__module__} is also that of {known.__module__}; "
            "rename one."
        )
    if known is not None and known is not kind:
        METHODS.pop(known, None)  # defined anew, as by a notebook's cell that runs again
    KINDS[kind.method] = kind
    METHODS[kind] = method


def _checked_kind(method: Method) -> type[Factorization]:
    owner, kind = type(method).__name__, getattr(method, "kind", None)
    if not (isinstance(kind, type) and issubclass(kind, Factorization) and "__dataclass_params__" in vars(kind)):
        raise PlanError(f"{owner}.kind must be a frozen dataclass that derives from Factorization, but is {kind!r}.")
    name, title, ranks = getattr(kind, "method", None), getattr(kind, "title", None), kind.rank_names()
    if not (isinstance(name, str) and re.fullmatch(NAME, name) and isinstance(title, str)):
        raise PlanError(
            f"{kind.__name__} must have a title and a method's name of lower-case letters, digits and _, but has title="
            f"{title!r} and method={name!r}."
        )
    if not ranks or set(ranks) & set(RESERVED):
        raise PlanError(
            f"{kind.__name__} must have a field for each rank, none of them called {', '.join(RESERVED)}, but has "
            f"{', '.join(ranks) or 'none'}."
        )
    vbmf = getattr(method, "vbmf", None)
    if not isinstance(vbmf, tuple) or len(vbmf) != len(ranks) or not set(vbmf) <= set(get_args(Estimate)):
        raise PlanError(
            f"{owner}.vbmf must name one of {', '.join(get_args(Estimate))} for each of the ranks {', '.join(ranks)}, but is "
            f"{vbmf!r}."
        )
    return kind
