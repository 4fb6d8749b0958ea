"""Values nested in tuples, lists, dicts and dataclasses, in any depth.

Subclasses keep their type: a namedtuple, and the outputs of Hugging Face's models, which are dicts with attributes. torch's own
pytree takes a subclass of dict that nobody registered for a single value.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


class PerInput(list[Any]):
    """A list with one entry for each input of a batch, such as images of several sizes. Other lists only nest values."""


def parts_of(value: Any) -> dict[Any, Any] | None:
    """The values directly inside a tuple, list, dict or dataclass, by index, key or field; None for any other value."""
    if isinstance(value, MutableMapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def has_lists_per_input(value: Any) -> bool:
    """Whether a `PerInput` list is inside."""
    return isinstance(value, PerInput) or any(map(has_lists_per_input, (parts_of(value) or {}).values()))


def rebuilt(value: Any, parts: Mapping[Any, Any]) -> Any:
    """A tuple, list, dict or dataclass of the same type as `value` that holds `parts`."""
    if isinstance(value, (tuple, list)):
        kind = type(value)
        return kind(*parts.values()) if hasattr(kind, "_fields") else kind(parts.values())
    twin = copy.copy(value)
    for name, part in parts.items():
        if isinstance(twin, MutableMapping):
            twin[name] = part
        else:
            object.__setattr__(twin, name, part)  # a dataclass may be frozen
    return twin


def leaves_of(value: Any) -> Iterator[Any]:
    """All values inside that hold no others, in a fixed order."""
    parts = parts_of(value)
    if parts is None:
        yield value
    else:
        for part in parts.values():
            yield from leaves_of(part)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors inside, in a fixed order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def named_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors inside by the path to each, such as `boxes.0`; `name` is the path of the value itself."""
    if isinstance(value, Tensor):
        return {name: value}
    inside: dict[str, Tensor] = {}
    for key, part in (parts_of(value) or {}).items():
        inside |= named_tensors(part, f"{name}.{key}" if name else str(key))
    return inside


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with every tensor replaced by the function's result."""
    if isinstance(value, Tensor):
        return function(value)
    parts = parts_of(value)
    return value if parts is None else rebuilt(value, {name: map_tensors(function, part) for name, part in parts.items()})


def is_plain(value: Any) -> bool:
    """Whether there is no subclass of dict and no dataclass inside."""
    parts = parts_of(value)
    plain = isinstance(value, (tuple, list)) or type(value) in (dict, OrderedDict)
    return parts is None or (plain and all(map(is_plain, parts.values())))


def as_plain(value: Any) -> Any:
    """The value with a dict in the place of each subclass of dict and each dataclass."""
    parts = parts_of(value)
    if parts is None:
        return value
    plain = {name: as_plain(part) for name, part in parts.items()}
    return rebuilt(value, plain) if isinstance(value, (tuple, list)) else plain


def nesting(value: Any) -> str:
    """How tensors are nested in a value, in words, as `(tensor, {'boxes': tensor})`; without lengths of `PerInput` lists."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, PerInput):
        return f"list of {' or '.join(sorted({nesting(entry) for entry in value})) or 'nothing'}"
    parts = parts_of(value)
    if parts is None:
        return type(value).__name__
    inside = [nesting(part) for part in parts.values()]
    if isinstance(value, tuple):
        return f"({', '.join(inside)})"
    if isinstance(value, list):
        return f"[{', '.join(inside)}]"
    return "{" + ", ".join(f"{name!r}: {part}" for name, part in zip(parts, inside, strict=True)) + "}"
