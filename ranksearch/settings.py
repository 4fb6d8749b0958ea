"""Settings: a dataclass says the help, the rule and the default of each of its fields, and whoever needs them reads them there.

Study files, the command line, the docstrings and the tables of docs/ take them from the fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field
from typing import Any, TypeVar

import numpy as np

from ranksearch.errors import SpecError, nearest

T = TypeVar("T")
Named = Callable[[str], str]
"""From a setting's name to the words by which the user knows it: `search.trials`, `mine.toml: search.trials`, `--trials`."""


def setting(
    help: str, rule: str = "", holds: Callable[[Any], bool] = lambda _: True, *, choices: Sequence[str] = (), **kwargs: Any
) -> Any:
    """A field of a settings class. `holds` says whether a value keeps the `rule`, which completes "NAME must be ..."."""
    return field(metadata={"help": help, "rule": rule, "holds": holds, "choices": choices}, **kwargs)


def at_least(low: float, help: str, *, where: str = "", **kwargs: Any) -> Any:
    """A finite number of at least `low`; `where` is added to the rule."""
    return setting(help, f"at least {low}{where}", lambda value: low <= value < math.inf, **kwargs)


def positive(help: str, **kwargs: Any) -> Any:
    """A finite number above 0."""
    return setting(help, "a finite number above 0", lambda value: 0 < value < math.inf, **kwargs)


def one_of(choices: Sequence[str], help: str, **kwargs: Any) -> Any:
    """One of a few words."""
    return setting(help, f"one of {', '.join(choices)}", lambda value: value in choices, choices=choices, **kwargs)


def matching(pattern: str, rule: str, help: str, **kwargs: Any) -> Any:
    """A string that the pattern matches as a whole."""
    return setting(help, rule, lambda value: bool(re.fullmatch(pattern, value)), **kwargs)


def documented(cls: type[T]) -> type[T]:
    """Add the help of each setting to the docstring of the class."""
    lines = (f"    {entry.name}: {plain_help(entry)}." for entry in dataclasses.fields(typing.cast(Any, cls)))
    cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nArgs:", *lines])
    return cls


def fields(cls: type[Any]) -> dict[str, Field[Any]]:
    """The fields of a settings class by name."""
    return {entry.name: entry for entry in dataclasses.fields(cls)}


def plain_help(entry: Field[Any]) -> str:
    """A field's help without the backticks of Markdown."""
    return str(entry.metadata["help"]).replace("`", "")


def default_of(entry: Field[Any]) -> Any:
    """A field's default; `MISSING` where it must be set."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def kind_of(cls: type[Any], name: str) -> Any:
    """The type of a setting that is set."""
    return _without_none(typing.get_type_hints(cls)[name])


def from_table(cls: type[T], table: Mapping[str, Any], named: Named) -> T:
    """The settings that a table of plain values gives, every value checked.

    Raises:
        SpecError: an unknown or missing key, a value of another type or against its rule.
    """
    hints, entries = typing.get_type_hints(cls), fields(cls)
    for key in table:
        if key not in entries:
            raise SpecError(f"{named(key)} is not a key of a study.{nearest(key, entries)}")
    values = {}
    for name, entry in entries.items():
        if name in table:
            values[name] = _value(hints[name], table[name], entry, _within(named, name))
        elif default_of(entry) is MISSING:
            if not dataclasses.is_dataclass(hints[name]):
                raise SpecError(f"{named(name)} must be set, but is missing.")
            values[name] = from_table(typing.cast(type, hints[name]), {}, _within(named, name))
    return cls(**values)


def from_python(cls: type[T], given: Any, named: Named) -> T:
    """Settings that were given from Python, checked as `from_table` does.

    A single string stands for a tuple of it, and a number of numpy's for Python's.
    """
    return from_table(cls, _table_of(cls, given, named), named)


def to_table(settings: Any) -> dict[str, Any]:
    """Plain values by key; a setting that is None is left out."""
    pairs = ((entry.name, getattr(settings, entry.name)) for entry in dataclasses.fields(settings))
    return {name: _plain(value) for name, value in pairs if value is not None}


def entries(cls: type[Any], *, prefix: str = "", omit: Collection[str] = ()) -> Iterator[tuple[str, Field[Any]]]:
    """Every setting by its key, those of a section after the section itself."""
    hints = typing.get_type_hints(cls)
    for name, entry in fields(cls).items():
        if name not in omit:
            yield f"{prefix}{name}", entry
            if dataclasses.is_dataclass(hints[name]):
                yield from entries(typing.cast(type, hints[name]), prefix=f"{prefix}{name}.", omit=omit)


def table_of(settings: Iterable[tuple[str, Field[Any]]], *, head: str) -> str:
    """A Markdown table of settings: name, default, help."""
    lines = (f"| `{name}` | {_left_out(entry)} | {entry.metadata['help']} |" for name, entry in settings)
    return "\n".join([f"| {head} | left out | what it says |", "|---|---|---|", *lines])


def _left_out(entry: Field[Any]) -> str:
    default = default_of(entry)
    if dataclasses.is_dataclass(default):
        return "its defaults"
    if default is MISSING:
        return "needed"
    if default is None:
        return "none"
    return "empty" if default == "" else json.dumps(default)


def _within(named: Named, section: str) -> Named:
    """The names of the settings in a section; the empty name is the section's own."""
    return lambda key: named(f"{section}.{key}" if key else section)


def _value(kind: Any, given: Any, entry: Field[Any], named: Named) -> Any:
    name = named("")
    if dataclasses.is_dataclass(kind):
        if not isinstance(given, dict):
            raise SpecError(f"{name} must be a section, but got {given!r}.")
        return from_table(typing.cast(type, kind), given, named)
    if isinstance(kind, types.UnionType):
        if given is None:
            return None
        kind = _without_none(kind)
    value = _typed(kind, given)
    if value is None:
        raise SpecError(f"{name} must be {_words(kind)}, but got {given!r}.")
    if isinstance(value, dict):
        _check_kept(value, name)
    if not entry.metadata["holds"](value):
        choices = entry.metadata["choices"]
        hint = nearest(value, choices) if choices else ""
        raise SpecError(f"{name} must be {entry.metadata['rule']}, but got {given!r}.{hint}")
    return value


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def _check_kept(value: Any, path: str) -> None:
    """Arguments of a user's function are kept as JSON, and compared when a study goes on."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_kept(inner, f"{path}.{key}")
    elif not isinstance(value, str | int | float):
        raise SpecError(f"{path} must be a string, a number, true or false, but got {value}; write it in quotes.")
    elif value != value:
        raise SpecError(f"{path} must be a number, but got nan.")


def _typed(kind: Any, given: Any) -> Any:
    """`given` as the field's type, None where it is of another."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        return tuple(given) if isinstance(given, list | tuple) and all(isinstance(item, str) for item in given) else None
    if kind is float and type(given) is int:
        return float(given)
    return given if type(given) is (dict if origin else kind) else None


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind) or ("a list of strings" if typing.get_origin(kind) is tuple else "a table")


def _table_of(cls: type[Any], given: Any, named: Named) -> dict[str, Any]:
    if type(given) is not cls:
        raise SpecError(f"{named('')} must be a ranksearch.{cls.__name__}, but got {given!r}.")
    hints = typing.get_type_hints(cls)
    return {name: _native(hints[name], getattr(given, name), _within(named, name)) for name in fields(cls)}


def _native(kind: Any, given: Any, named: Named) -> Any:
    """A value from Python as a table holds it."""
    if dataclasses.is_dataclass(kind):
        return _table_of(typing.cast(type, kind), given, named)
    if typing.get_origin(kind) is tuple and isinstance(given, str):
        return (given,)
    return given.item() if isinstance(given, np.generic) else given


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
