"""Settings: dataclasses whose fields carry their help text, their rule and their default.

Study files, the command line, docstrings and the tables in docs/ all read these fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field
from typing import Any, TypeVar

import numpy as np

from ranksearch.errors import SpecError, nearest

T = TypeVar("T")
Named = Callable[[str], str]
"""Maps a setting's name to the name that the user knows: `search.trials`, `mine.toml: search.trials` or `--trials`."""


def setting(
    help: str, rule: str = "", holds: Callable[[Any], bool] = lambda _: True, *, choices: Sequence[str] = (), **kwargs: Any
) -> Any:
    """A field of a settings class. `rule` completes the sentence "NAME must be ..."; `holds` tests a value against it."""
    return field(metadata={"help": help, "rule": rule, "holds": holds, "choices": choices}, **kwargs)


def at_least(low: float, help: str, *, where: str = "", **kwargs: Any) -> Any:
    """A field for a finite number of at least `low`; `where` is appended to the rule."""
    return setting(help, f"at least {low}{where}", lambda value: low <= value < math.inf, **kwargs)


def positive(help: str, **kwargs: Any) -> Any:
    """A field for a finite number above 0."""
    return setting(help, "a finite number above 0", lambda value: 0 < value < math.inf, **kwargs)


def one_of(choices: Sequence[str], help: str, **kwargs: Any) -> Any:
    """A field for one of a few strings."""
    return setting(help, f"one of {', '.join(choices)}", lambda value: value in choices, choices=choices, **kwargs)


def matching(pattern: str, rule: str, help: str, **kwargs: Any) -> Any:
    """A field for a string that the whole pattern matches."""
    return setting(help, rule, lambda value: bool(re.fullmatch(pattern, value)), **kwargs)


def documented(cls: type[T]) -> type[T]:
    """Class decorator: append the help of every setting to the docstring."""
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
    """A field's default; `MISSING` if the setting is required."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def kind_of(cls: type[Any], name: str) -> Any:
    """The type of a setting, without None."""
    return _without_none(typing.get_type_hints(cls)[name])


def from_table(cls: type[T], table: Mapping[str, Any], named: Named) -> T:
    """Make settings from a table of plain values, and check every value.

    Raises:
        SpecError: a key is unknown or missing, or a value has the wrong type or breaks its rule.
    """
    hints, by_name = typing.get_type_hints(cls), fields(cls)
    for key in table:
        if key not in by_name:
            raise SpecError(f"{named(key)} is not a key of a study.{nearest(key, by_name)}")
    values = {}
    for name, entry in by_name.items():
        if name in table:
            values[name] = _checked_value(hints[name], table[name], entry, _within(named, name))
        elif default_of(entry) is MISSING:
            if not dataclasses.is_dataclass(hints[name]):
                raise SpecError(f"{named(name)} must be set, but is missing.")
            values[name] = from_table(typing.cast(type, hints[name]), {}, _within(named, name))
    return cls(**values)


def from_python(cls: type[T], settings: Any, named: Named) -> T:
    """Check settings that were made in Python, as `from_table` does.

    A string becomes a tuple of one string where a tuple is expected; numpy numbers become Python numbers.
    """
    return from_table(cls, _table_of(cls, settings, named), named)


def to_table(settings: Any) -> dict[str, Any]:
    """Settings as plain values by key; leaves out settings that are None."""
    pairs = ((entry.name, getattr(settings, entry.name)) for entry in dataclasses.fields(settings))
    return {name: _plain(value) for name, value in pairs if value is not None}


def _within(named: Named, section: str) -> Named:
    """`named` for the settings of a section; the empty key names the section itself."""
    return lambda key: named(f"{section}.{key}" if key else section)


def _checked_value(kind: Any, raw: Any, entry: Field[Any], named: Named) -> Any:
    name = named("")
    if dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise SpecError(f"{name} must be a section, but got {raw!r}.")
        return from_table(typing.cast(type, kind), raw, named)
    if isinstance(kind, types.UnionType):
        if raw is None:
            return None
        kind = _without_none(kind)
    value = _converted(kind, raw)
    if value is None:
        raise SpecError(f"{name} must be {_type_name(kind)}, but got {raw!r}.")
    if isinstance(value, dict):
        _check_json(value, name)
    if not entry.metadata["holds"](value):
        choices = entry.metadata["choices"]
        hint = nearest(value, choices) if choices else ""
        raise SpecError(f"{name} must be {entry.metadata['rule']}, but got {raw!r}.{hint}")
    return value


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def _check_json(value: Any, path: str) -> None:
    """Check the arguments of a user's function: they are stored as JSON, and compared when a study is resumed."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_json(inner, f"{path}.{key}")
    elif not isinstance(value, str | int | float):
        raise SpecError(f"{path} must be a string, a number, true or false, but got {value}; write it in quotes.")
    elif value != value:
        raise SpecError(f"{path} must be a number, but got nan.")


def _converted(kind: Any, raw: Any) -> Any:
    """`raw` converted to the type `kind`; None if its type is wrong."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = [_converted(typing.get_args(kind)[0], item) for item in raw] if isinstance(raw, list | tuple) else [None]
        return None if None in items else tuple(items)
    if kind is float and type(raw) is int:
        return float(raw)
    return raw if type(raw) is (dict if origin else kind) else None


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    lists = {tuple[str, ...]: "a list of strings", tuple[float, ...]: "a list of numbers"}
    return names.get(kind) or lists.get(kind, "a table")


def _table_of(cls: type[Any], settings: Any, named: Named) -> dict[str, Any]:
    if type(settings) is not cls:
        raise SpecError(f"{named('')} must be a ranksearch.{cls.__name__}, but got {settings!r}.")
    hints = typing.get_type_hints(cls)
    return {name: _as_in_toml(hints[name], getattr(settings, name), _within(named, name)) for name in fields(cls)}


def _as_in_toml(kind: Any, raw: Any, named: Named) -> Any:
    """Convert a value from Python to the form it has in a TOML table."""
    if dataclasses.is_dataclass(kind):
        return _table_of(typing.cast(type, kind), raw, named)
    if typing.get_origin(kind) is tuple and isinstance(raw, str):
        return (raw,)
    return raw.item() if isinstance(raw, np.generic) else raw


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
