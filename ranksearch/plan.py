"""Plans: a plan maps each layer of a model to a factorization, a frozen value with a method and its ranks.

This file does not import torch, so that reports and tools can read a plan in milliseconds. The cost and the construction
of each factorization are in `ranksearch.methods`, one file per class below.
"""

from __future__ import annotations

import functools
import json
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ranksearch.errors import PlanError, nearest

FORMAT = "ranksearch-plan/1"
OPTIONAL = ("kernel", "order", "padding")
"""The fields of a factorization beside its ranks."""


@dataclass(frozen=True)
class Factorization:
    """How one layer is stored. The subclass selects the method; its positional fields are the ranks.

    A fully connected layer after a flatten can be treated as a convolution over the whole feature map. `kernel` is then the
    size of that map, such as (6, 6), and None otherwise. If the channels were not the first axis of the map, `order` lists
    the axes in the flattened row from slowest to fastest, 0 for the channels, 1 and up for the positions: (1, 2, 0) if the
    channels were last.

    `padding` holds the zeros around the input, (before, after) for each axis, of a layer that puts them there itself, since
    their number may depend on the size of the input; None for any other layer.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    kernel: tuple[int, ...] | None = field(default=None, kw_only=True)
    order: tuple[int, ...] | None = field(default=None, kw_only=True)
    padding: tuple[tuple[int, int], ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in self.rank_names():
            if not _is_positive(rank := getattr(self, name)):
                raise PlanError(f"A rank must be a whole number of at least 1, but {self.method} got {name}={rank!r}.")
            object.__setattr__(self, name, int(rank))  # also a numpy integer
        if self.kernel is not None:
            if not (isinstance(self.kernel, Sequence) and self.kernel and all(map(_is_positive, self.kernel))):
                raise PlanError(f"A kernel must be whole numbers of at least 1, but {self.method} got kernel={self.kernel!r}.")
            object.__setattr__(self, "kernel", tuple(map(int, self.kernel)))
        if self.order is not None:
            axes = list(range(1 + len(self.kernel or ())))
            if not (self.kernel and isinstance(self.order, Sequence) and sorted(self.order, key=str) == axes):
                raise PlanError(
                    f"An order must list each axis of the map once, {axes}, but {self.method} got order={self.order!r} and "
                    f"kernel={self.kernel!r}."
                )
            object.__setattr__(self, "order", tuple(self.order))
        if self.padding is not None:
            if not (isinstance(self.padding, Sequence) and self.padding and all(map(_is_pair, self.padding))):
                raise PlanError(
                    "A padding must be pairs of whole numbers of at least 0, one for each axis, but "
                    f"{self.method} got padding={self.padding!r}."
                )
            object.__setattr__(self, "padding", tuple(map(tuple, self.padding)))

    @classmethod
    @functools.cache
    def rank_names(cls) -> tuple[str, ...]:
        """The names of the ranks, in order; empty for a dense layer."""
        return tuple(entry.name for entry in fields(cls) if not entry.kw_only)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks, in the order of `rank_names`."""
        return tuple(getattr(self, name) for name in self.rank_names())

    def __str__(self) -> str:
        return f"{self.title} {'x'.join(map(str, self.ranks))}" if self.ranks else self.title


@dataclass(frozen=True)
class Dense(Factorization):
    """The layer, unchanged."""

    method = "dense"
    title = "dense"


@dataclass(frozen=True)
class SVD(Factorization):
    """Two matrices, in -> rank -> out; for fully connected layers and 1x1 convolutions."""

    method = "svd"
    title = "SVD"
    rank: int


@dataclass(frozen=True)
class Spatial(Factorization):
    """Two convolutions, d x 1 then 1 x d, with `rank` channels between (Jaderberg et al. 2014)."""

    method = "spatial"
    title = "spatial SVD"
    rank: int


@dataclass(frozen=True)
class Tucker2(Factorization):
    """1x1 in -> rank_in, kernel rank_in -> rank_out, 1x1 rank_out -> out (Kim et al. 2016).

    A 1x1 convolution that would keep the number of channels is not built; its factor is multiplied into the kernel. With all
    input channels for `rank_in` this is Tucker-1.
    """

    method = "tucker2"
    title = "Tucker-2"
    rank_in: int
    rank_out: int


@dataclass(frozen=True)
class CP(Factorization):
    """1x1 in -> rank, depthwise kernel, 1x1 rank -> out: CP with the kernel's modes merged into one."""

    method = "cp"
    title = "CP"
    rank: int


@dataclass(frozen=True)
class CP4(Factorization):
    """1x1 in -> rank, depthwise d x 1, depthwise 1 x d, 1x1 rank -> out: the thesis's TD block (Lebedev et al. 2015)."""

    method = "cp4"
    title = "CP-4"
    rank: int


@dataclass(frozen=True)
class TT(Factorization):
    """1x1 in -> rank_in, d x 1 rank_in -> rank_mid, 1 x d rank_mid -> rank_out, 1x1 rank_out -> out: a tensor train
    (Oseledets 2011)."""

    method = "tt"
    title = "TT"
    rank_in: int
    rank_mid: int
    rank_out: int


KINDS: dict[str, type[Factorization]] = {kind.method: kind for kind in (Dense, SVD, Spatial, Tucker2, CP, CP4, TT)}
"""Factorization classes by method name; `ranksearch.register_method` adds to them."""


@dataclass(frozen=True)
class Kept:
    """The channels that a narrower net keeps along one dimension of a tensor: `indices` out of `size`, ascending."""

    size: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(map(_is_natural, self.indices)) and list(self.indices) == sorted(set(self.indices))
        if not (_is_positive(self.size) and self.indices and ascending and self.indices[-1] < self.size):
            raise PlanError(f"Kept channels must be ascending numbers from 0 to below their size, but got {self}.")


@dataclass(frozen=True)
class Narrowing:
    """The channels that a narrower net keeps of a model, as `ranksearch.compress.narrowing.narrow_` applies it.

    Attributes:
        kept: the distinct sets of kept channels.
        tensors: by name of a parameter or buffer and by dimension, the position in `kept` of the channels that it keeps.
            Dimensions that are not named keep all.
        attributes: by name of a module, its attributes that change with its tensors, such as `in_channels`, and their values.
    """

    kept: tuple[Kept, ...] = ()
    tensors: Mapping[str, Mapping[int, int]] = field(default_factory=dict, hash=False)
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The narrowing as in `plan.json`."""
        return {
            "kept": [{"size": kept.size, "indices": list(kept.indices)} for kept in self.kept],
            "tensors": {name: {str(dim): at for dim, at in dims.items()} for name, dims in self.tensors.items()},
            "attributes": {name: dict(values) for name, values in self.attributes.items()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Narrowing:
        """The narrowing from the output of `to_dict`.

        Raises:
            PlanError: something is missing, unknown or of another type.
        """
        if not isinstance(data, dict) or set(data) != {"kept", "tensors", "attributes"}:
            got = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise PlanError(f'A narrowing needs "kept", "tensors" and "attributes", but got {got or "nothing"}.')
        if not isinstance(data["kept"], list):
            raise PlanError(f"A narrowing's kept channels must be a list, but are {data['kept']!r}.")
        kept = tuple(map(_kept, data["kept"]))
        return cls(
            kept,
            {name: _dims(name, dims, len(kept)) for name, dims in _objects(data, "tensors").items()},
            {name: _values(name, values) for name, values in _objects(data, "attributes").items()},
        )


@dataclass(frozen=True)
class Plan:
    """Map from layer name to factorization; layers that it does not name stay dense. Compares and hashes by content.

    `width` names the net that is factorized: 1.0 for the given dense net, otherwise a narrower one made of it by pruning
    channels, with about this share of its multiply-accumulates. `narrowing` says which channels that net keeps. A study has one
    for each width, so plans compare by their widths. A plan that is saved beside weights must hold it.
    """

    layers: tuple[tuple[str, Factorization], ...] = ()
    width: float = 1.0
    narrowing: Narrowing | None = field(default=None, compare=False)

    @classmethod
    def of(cls, layers: Mapping[str, Factorization], width: float = 1.0, narrowing: Narrowing | None = None) -> Plan:
        """The plan for these layers; drops dense layers and sorts by name, so that equal plans compare equal."""
        kept = sorted((name, value) for name, value in layers.items() if not isinstance(value, Dense))
        return cls(tuple(kept), width, narrowing)

    def __iter__(self) -> Iterator[tuple[str, Factorization]]:
        return iter(self.layers)

    def __getitem__(self, layer: str) -> Factorization:
        return dict(self.layers).get(layer, Dense())

    def __str__(self) -> str:
        layers = ", ".join(f"{name} {value}" for name, value in self) or "dense"
        return layers if self.width == 1 else f"width {self.width:g}: {layers}"

    def to_dict(self) -> dict[str, Any]:
        """`{"format": ..., "width": ..., "layers": {name: {"method": ..., <rank>: ...}}, "narrowing": ...}`, as in `plan.json`.

        The width is left out if it is 1, the narrowing if there is none.
        """
        layers = {
            name: {"method": value.method}
            | dict(zip(value.rank_names(), value.ranks, strict=True))
            | ({"kernel": list(value.kernel)} if value.kernel else {})
            | ({"order": list(value.order)} if value.order else {})
            | ({"padding": list(map(list, value.padding))} if value.padding else {})
            for name, value in self
        }
        width = {} if self.width == 1 else {"width": self.width}
        narrowing = {} if self.narrowing is None else {"narrowing": self.narrowing.to_dict()}
        return {"format": FORMAT} | width | {"layers": layers} | narrowing

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan from the output of `to_dict`.

        Raises:
            PlanError: the format is not `FORMAT`, a method or rank is unknown, a rank is missing or not positive, the width is
                not a share, or the narrowing is none.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("layers"), dict):
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f'A plan needs "format": "{FORMAT}" and a "layers" object, but got {got!r}.')
        width = data.get("width", 1.0)
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
            raise PlanError(f"A plan's width must be above 0 and at most 1, but got {width!r}.")
        layers = {name: _factorization(name, entry) for name, entry in data["layers"].items()}
        narrowing = None if data.get("narrowing") is None else Narrowing.from_dict(data["narrowing"])
        return cls.of(layers, float(width), narrowing)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan from JSON text; raises `PlanError` as `from_dict` does, or if the text is not JSON."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"A plan must be JSON, but line {error.lineno} is not: {error.msg}.") from None
        return cls.from_dict(data)


def _is_positive(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_natural, value))


def _objects(data: Any, key: str) -> dict[str, dict[str, Any]]:
    """The object under a key of a narrowing, whose values are objects, too."""
    found = data[key]
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise PlanError(f"A narrowing's {key} must be an object of objects, but are {found!r}.")
    return found


def _kept(entry: Any) -> Kept:
    if not isinstance(entry, dict) or set(entry) != {"size", "indices"} or not isinstance(entry["indices"], list):
        raise PlanError(f'Kept channels must be an object of "size" and "indices", but got {entry!r}.')
    return Kept(entry["size"], tuple(entry["indices"]))


def _dims(name: str, dims: Mapping[str, Any], count: int) -> dict[int, int]:
    for dim, at in dims.items():
        if not (dim.isdecimal() and _is_natural(at) and at < count):
            raise PlanError(
                f"A narrowing must give each dimension of tensor {name!r} one of its {count} sets of kept channels, but gives "
                f"dimension {dim} {at!r}."
            )
    return {int(dim): at for dim, at in dims.items()}


def _values(name: str, values: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
    for attribute, value in values.items():
        if not (_is_natural(value) or (isinstance(value, list) and all(map(_is_natural, value)))):
            raise PlanError(f"A narrowing's attributes must be whole numbers, but {name}.{attribute} is {value!r}.")
    return {attribute: tuple(value) if isinstance(value, list) else value for attribute, value in values.items()}


def _factorization(layer: str, entry: Any) -> Factorization:
    method = entry.get("method") if isinstance(entry, dict) else entry
    if not isinstance(method, str) or method not in KINDS:
        raise PlanError(f"Layer {layer!r} must name a known method, but got {method!r}.{nearest(str(method), KINDS)}")
    kind = KINDS[method]
    got, expected = set(entry) - {"method", *OPTIONAL}, kind.rank_names()
    if got != set(expected):
        ranks = ", ".join(expected) or "no rank"
        raise PlanError(f"Layer {layer!r}: method {method!r} takes {ranks}, but got {', '.join(sorted(got)) or 'none'}.")
    return kind(*(entry[name] for name in expected), **{name: entry.get(name) for name in OPTIONAL})
