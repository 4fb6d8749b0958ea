"""A study on paper: strict TOML -> one frozen value, every key checked before anything runs."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from ranksearch.errors import RankSearchError, SpecError, first_line, nearest
from ranksearch.plan import KINDS, Dense
from ranksearch.results.costs import COSTS
from ranksearch.results.limits import Limits

SAMPLERS = ("rank", "tpe", "nsga2", "gp", "random")
PRECISIONS = ("float32", "bfloat16")
STARTS = ("decomposed", "scratch")
SCHEDULES = ("one-shot", "layerwise")


def _checked(rule: str, holds: Callable[[Any], bool], *, choices: Sequence[str] = (), **kwargs: Any) -> Any:
    return field(metadata={"rule": rule, "holds": holds, "choices": choices}, **kwargs)


def _at_least(low: float, **kwargs: Any) -> Any:
    return _checked(f"at least {low}", lambda value: low <= value < math.inf, **kwargs)


def _positive(**kwargs: Any) -> Any:
    return _checked("a finite number above 0", lambda value: 0 < value < math.inf, **kwargs)


def _one_of(choices: Sequence[str], **kwargs: Any) -> Any:
    return _checked(f"one of {', '.join(choices)}", lambda value: value in choices, choices=choices, **kwargs)


def _reference(**kwargs: Any) -> Any:
    return _checked("'package.module:name'", lambda value: bool(re.fullmatch(r"\w[\w.]*:\w[\w.]*", value)), **kwargs)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What is compressed and how it is judged; every reference is `package.module:name`."""

    model: str = _reference()
    """A callable that gives the dense model, an `nn.Module`."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data: str = _reference()
    """A callable that gives `ranksearch.data.Splits`."""
    data_args: Mapping[str, Any] = field(default_factory=dict)
    loss: str = _reference(default="torch.nn.functional:cross_entropy")
    score: str = _reference(default="ranksearch.task.task:accuracy")


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, learning rate rising over the first 15 % of the steps and falling to zero as a cosine."""

    epochs: int = _at_least(0)
    batch_size: int = _at_least(1, default=64)
    learning_rate: float = _positive(default=1e-3)
    weight_decay: float = _at_least(0, default=1e-4)
    precision: str = _one_of(PRECISIONS, default="float32")
    """Or bfloat16: mixed precision (Micikevicius et al. 2018) while it trains, which needs no loss scaling."""


@dataclass(frozen=True, kw_only=True)
class DenseSpec(Recipe):
    """How the dense model comes by its weights: a file of them, training, or both; neither if the model has them."""

    weights: str = ""
    """A state dict in a .safetensors or .pt file; relative to the folder the command runs in."""


@dataclass(frozen=True, kw_only=True)
class FinalistSpec(Recipe):
    """The trials of the front that are fine-tuned for longer, from their start, and then tested."""

    count: int = _at_least(1, default=10, repr=False)  # makes no other training
    sweeps: int = _at_least(0, default=0)
    """Further sweeps over their factors before they are fine-tuned: HOOI for Tucker-2, alternating least squares for CP."""
    schedule: str = _one_of(SCHEDULES, default="one-shot")
    """Or layerwise, the thesis's pipeline: one layer after the other is decomposed, the last first, with `epochs` each."""


@dataclass(frozen=True, kw_only=True)
class SpaceSpec:
    """What the search may choose from, for which layers."""

    methods: tuple[str, ...] = _checked("at least one method", bool, default=("tucker2", "cp", "svd"))
    plugins: tuple[str, ...] = ()
    """Modules to import first, which register methods of a user's own."""
    layers: tuple[str, ...] = ()
    """Only these layers; all that can be decomposed where it is empty."""
    skip: tuple[str, ...] = ()
    """Not these layers."""
    rank_multiple: int = _at_least(1, default=1)
    """Ranks are multiples of this, as some hardware wants them; one that cannot be so large is held at its largest."""
    smaller_in: tuple[str, ...] = _checked(f"at least one of {', '.join(COSTS)}", bool, default=("params",))
    """A layer is stored only in ways that are smaller than dense in each of these costs."""
    data_aware: bool = True
    """Fit the factors for the inputs that each layer sees in training, not for the weights alone."""
    start: str = _one_of(STARTS, default="decomposed")
    """What a plan's net is trained from: the dense net's decomposed weights, or weights drawn anew (from scratch)."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How long to search, and who proposes."""

    sampler: str = _one_of(SAMPLERS, default="rank")
    trials: int = _at_least(1, default=60)
    """How many plans are trained; those that need no training do not count."""
    first: tuple[str, ...] = ()
    """Files of plans, as models/<trial>/plan.json is one, to try first; relative to the folder the command runs in."""
    minimize: tuple[str, ...] = _checked(f"at least one of {', '.join(COSTS)}", bool, default=("params",))
    """The costs that the front sets against the score: parameters, multiply-accumulates, or both."""
    minutes: float | None = _positive(default=None)
    min_score: float | None = _checked("a finite number", math.isfinite, default=None)
    """Models with a lower validation score are not on the front."""
    min_ratio: float | None = _positive(default=None)
    """Plans of a lower compression ratio are not trained; nor are those of more parameters or multiply-accumulates:"""
    max_params: int | None = _at_least(1, default=None)
    max_macs: int | None = _at_least(1, default=None)

    @property
    def limits(self) -> Limits:
        """What every model of the front must keep."""
        return Limits.of(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A whole study. Equal values give equal studies."""

    name: str = _checked("letters, digits, '.', '_' or '-'", lambda value: bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", value)))
    about: str = ""
    seed: int = _checked("between 0 and 2147483647", lambda value: 0 <= value < 2**31, default=0)
    task: TaskSpec
    dense: DenseSpec
    space: SpaceSpec = field(default_factory=SpaceSpec)
    search: SearchSpec = field(default_factory=SearchSpec)
    finetune: Recipe
    finalists: FinalistSpec

    def to_dict(self) -> dict[str, Any]:
        """Plain TOML values; what is not set is left out."""
        return _plain(self)

    def to_toml(self) -> str:
        """The spec as resolved: every key, defaults and overrides included."""
        return tomli_w.dumps(self.to_dict())

    def identity(self) -> dict[str, Any]:
        """What makes results comparable: all but the budget, the limits and the wording. Flat, `section.key` -> value.

        A limit says what is looked for and leaves every score as it is, so a study may go on under others. The plans to try
        first count by what is in their files, which the study's storage holds.
        """
        flat: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            flat |= {f"{key}.{inner}": entry for inner, entry in value.items()} if isinstance(value, dict) else {key: value}
        free = {"about", "space.plugins", "search.trials", "search.minutes", "search.first", "finalists.count"}
        free |= {f"search.{key}" for key in Limits.names()}
        return {key: value for key, value in flat.items() if key not in free}


def parse_spec(text: str, *, source: str, overrides: Sequence[str] = ()) -> StudySpec:
    """The study that TOML `text` describes, with `section.key=value` overrides on top.

    Raises:
        SpecError: not TOML, an unknown or missing key, a value of another type or out of range.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"A study file must be TOML, but {source} is not: {error}.") from None
    for override in overrides:
        _override(data, override)
    spec: StudySpec = _section(StudySpec, data, source=source, path="")
    for module in spec.space.plugins:
        _imported(module, module, key="space.plugins")
    methods = [name for name in KINDS if name != Dense.method]
    for method in spec.space.methods:
        if method not in methods:
            raise SpecError(f"space.methods must name methods, but {method!r} is none.{nearest(method, methods)}")
    if spec.space.start == "scratch" and (spec.finalists.schedule != "one-shot" or spec.finalists.sweeps):
        raise SpecError(
            "finalists.schedule must be one-shot and finalists.sweeps 0 where space.start is scratch, which decomposes no "
            f"weights, but got {spec.finalists.schedule} and {spec.finalists.sweeps}."
        )
    if spec.finalists.schedule == "layerwise" and not spec.finalists.epochs:
        raise SpecError("finalists.epochs must be at least 1 where finalists.schedule is layerwise, but got 0.")
    for key, costs in (("space.smaller_in", spec.space.smaller_in), ("search.minimize", spec.search.minimize)):
        for cost in costs:
            if cost not in COSTS:
                raise SpecError(f"{key} must name costs, but {cost!r} is none.{nearest(cost, COSTS)}")
        if len(set(costs)) < len(costs):
            raise SpecError(f"{key} must name each cost once, but got {list(costs)}.")
    # In one order, so that in whichever they are named they make the same study.
    minimize = tuple(cost for cost in COSTS if cost in spec.search.minimize)
    return dataclasses.replace(spec, search=dataclasses.replace(spec.search, minimize=minimize))


def load_spec(source: str, *, overrides: Sequence[str] = ()) -> StudySpec:
    """The built-in study of that name, or the study in that file.

    Raises:
        SpecError: neither a built-in study nor a readable file; and as `parse_spec` does.
    """
    path = Path(source)
    if source in builtin_studies():
        path = builtin_studies()[source]
    elif path.suffix != ".toml" and not path.exists():
        raise SpecError(
            f"A study is a built-in name or a .toml file, but {source!r} is neither.{nearest(source, builtin_studies())}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"The study file {source} cannot be read: {reason}; check the path.") from None
    return parse_spec(text, source=source, overrides=overrides)


def builtin_studies() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    inside = Path(__file__).parent / "studies"
    # In a checkout the studies stand beside the package; the wheel carries them inside it.
    folder = inside if inside.is_dir() else Path(__file__).parents[1] / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def resolve(reference: str, *, key: str) -> Callable[..., Any]:
    """What `package.module:name` names.

    Raises:
        SpecError: the module cannot be imported, has no such name, or the name is not callable.
    """
    module_name, _, name = reference.partition(":")
    found: Any = _imported(module_name, reference, key=key)
    for part in name.split("."):
        if not hasattr(found, part):
            raise SpecError(f"{key}: module {module_name!r} has no {name!r}.{nearest(name, _public(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{key} must name something callable, but {reference!r} is a {type(found).__name__}.")
    return typing.cast(Callable[..., Any], found)


def _imported(module: str, reference: str, *, key: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecError(
            f"{key} must be importable, but {reference!r} is not: {error}; check the spelling, install the package, or "
            "run from the folder that holds it."
        ) from None
    except RankSearchError as error:
        raise SpecError(f"{key} must be importable, but {reference!r} is refused: {error}") from None
    except Exception as error:
        raise SpecError(
            f"{key} must be importable, but {reference!r} raised {type(error).__name__}: {first_line(error)}; mend the module."
        ) from error


def _public(module: Any) -> Iterable[str]:
    return [name for name in vars(module) if not name.startswith("_")][:30]


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"An override must read section.key=value, but got {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, as a shell user means it
    *sections, last = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise SpecError(f"An override must read section.key=value, but {section!r} of {override!r} is no section.")
    data[last] = value


def _section(cls: type[Any], data: Any, *, source: str, path: str) -> Any:
    if not isinstance(data, dict):
        raise SpecError(f"{source}: {path.rstrip('.')} must be a section, but got {data!r}.")
    hints, entries = typing.get_type_hints(cls), {entry.name: entry for entry in dataclasses.fields(cls)}
    for key in data:
        if key not in entries:
            raise SpecError(f"{source}: {path}{key} is not a key of a study.{nearest(key, entries)}")
    values = {}
    for name, entry in entries.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if name in data:
            values[name] = _value(hints[name], data[name], entry, source=source, path=f"{path}{name}")
        elif dataclasses.is_dataclass(hints[name]) and required:
            values[name] = _section(typing.cast(type, hints[name]), {}, source=source, path=f"{path}{name}.")
        elif required:
            raise SpecError(f"{source}: {path}{name} must be set, but is missing.")
    return cls(**values)


def _value(kind: Any, given: Any, entry: dataclasses.Field[Any], *, source: str, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _section(typing.cast(type, kind), given, source=source, path=f"{path}.")
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    value = _typed(kind, given)
    if value is None:
        raise SpecError(f"{source}: {path} must be {_words(kind)}, but got {given!r}.")
    if isinstance(value, dict):
        _check_kept(value, f"{source}: {path}")
    if not entry.metadata.get("holds", lambda _: True)(value):
        choices = entry.metadata["choices"]
        hint = nearest(value, choices) if choices else ""
        raise SpecError(f"{source}: {path} must be {entry.metadata['rule']}, but got {given!r}.{hint}")
    return value


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
        return tuple(given) if type(given) is list and all(isinstance(item, str) for item in given) else None
    if kind is float and type(given) is int:
        return float(given)
    return given if type(given) is (dict if origin else kind) else None


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind) or ("a list of strings" if typing.get_origin(kind) is tuple else "a table")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        pairs = ((entry.name, getattr(value, entry.name)) for entry in dataclasses.fields(value))
        return {name: _plain(entry) for name, entry in pairs if entry is not None}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.generic):
        return value.item()  # numpy's numbers, from Python
    return list(value) if isinstance(value, tuple) else value
