"""The account of a model: where all of its parameters and multiply-accumulates are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_NAMES = 3
"""How many modules a sentence names."""


@dataclass(frozen=True)
class Entry:
    """A module in the account of a model: its own parameters and multiply-accumulates for one input, not those of its children.

    A layer, decomposable or skipped, has those of the modules in it too. `skipped` is the reason for skipping it; None for a
    decomposable one, and for any other module. Shared parameters count once. `unused` counts the parameters that no pass uses.
    """

    name: str
    kind: str
    params: int
    macs: int
    unused: int = 0
    layer: bool = False
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Modules that belong together in the account, such as all layers that are skipped for the same reason."""

    title: str
    """What they are: `decomposable layers`, `skipped: it is depthwise`, `BatchNorm2d`."""
    modules: tuple[str, ...]
    params: int
    macs: int
    unused: int = 0
    """How many of their parameters no pass uses."""

    @classmethod
    def of(cls, title: str, entries: Sequence[Entry]) -> Part:
        """The part of these entries."""
        return cls(
            title=title,
            modules=tuple(entry.name or "the model itself" for entry in entries),
            params=sum(entry.params for entry in entries),
            macs=sum(entry.macs for entry in entries),
            unused=sum(entry.unused for entry in entries),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Part:
        """The part from `dataclasses.asdict`, also after it was JSON."""
        return cls(**{**data, "modules": tuple(data["modules"])})

    @property
    def names(self) -> str:
        """The names of its first modules, and how many more there are."""
        return listed(self.modules)


def account_by_kind(entries: Iterable[Entry]) -> tuple[Part, ...]:
    """The account in few parts: decomposable layers, skipped ones by their reason, other modules by their class.

    Modules with parameters that no pass uses are parts of their own.
    """
    return _grouped(entries, _title)


def account_by_layer(entries: Iterable[Entry]) -> tuple[Part, ...]:
    """As `account_by_kind`, with a part for each skipped layer."""
    return _grouped(entries, lambda entry: f"skipped {entry.name}: {entry.skipped}" if entry.skipped else _title(entry))


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are: `conv1, conv2, conv3 and 14 more`."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _title(entry: Entry) -> str:
    if entry.layer:
        return "decomposable layers"
    if entry.skipped:
        return f"skipped: {entry.skipped}"
    return entry.kind + (", not used" if entry.unused else "")


def _grouped(entries: Iterable[Entry], title: Callable[[Entry], str]) -> tuple[Part, ...]:
    groups: dict[str, list[Entry]] = {}
    # Layers first, then skipped ones, then all else; `sorted` keeps the order of the model within each.
    for entry in sorted(entries, key=lambda entry: (not entry.layer, entry.skipped is None)):
        groups.setdefault(title(entry), []).append(entry)
    return tuple(Part.of(name, members) for name, members in groups.items())
