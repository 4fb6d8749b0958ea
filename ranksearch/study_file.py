"""Study files: from strict TOML to a `StudySpec` whose settings fit together; the built-in ones by name."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ranksearch.errors import MissingCodeError, SpecError, nearest
from ranksearch.plan import KINDS, Dense
from ranksearch.references import imported
from ranksearch.results.costs import COSTS
from ranksearch.settings import from_python, from_table
from ranksearch.spec import TIMED_RANK_MULTIPLE, StudySpec


def parse_spec(text: str, *, source: str, overrides: Sequence[str] = ()) -> StudySpec:
    """Parse a study from TOML `text` and apply `section.key=value` overrides. `source` names the text in errors.

    Raises:
        SpecError: the text is not TOML, a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"A study file must be TOML, but {source} is not: {error}.") from None
    for override in overrides:
        _override(data, override)
    return _consistent(from_table(StudySpec, data, lambda key: f"{source}: {key}"))


def check_spec(spec: StudySpec) -> StudySpec:
    """Check a study that was made in Python as strictly as a file; raises `SpecError` as `parse_spec` does."""
    return _consistent(from_python(StudySpec, spec, str))


def _consistent(spec: StudySpec) -> StudySpec:
    """Check settings against each other, and the names in lists; returns the spec with `search.minimize` in canonical order."""
    for module in spec.space.plugins:
        imported(module, module, key="space.plugins")
    methods = [name for name in KINDS if name != Dense.method]
    for method in spec.space.methods:
        if method not in methods:
            raise MissingCodeError(f"space.methods must name known methods, but got {method!r}.{nearest(method, methods)}")
    if spec.space.start == "scratch" and (spec.finalists.schedule != "one-shot" or spec.finalists.sweeps):
        raise SpecError(
            "finalists.schedule must be one-shot and finalists.sweeps 0 where space.start is scratch, which decomposes no "
            f"weights, but got {spec.finalists.schedule} and {spec.finalists.sweeps}."
        )
    if spec.space.start == "scratch" and len(spec.space.widths) > 1:
        raise SpecError(
            "space.widths must be [1.0] where space.start is scratch, which keeps no weights to prune, but got "
            f"{list(spec.space.widths)}."
        )
    if spec.controls and not spec.dense.epochs + spec.finalists.epochs:
        raise SpecError(
            f"controls must be 0 where dense.epochs and finalists.epochs are 0, which train nothing, but got {spec.controls}."
        )
    if spec.finalists.schedule == "layerwise" and not spec.finalists.epochs:
        raise SpecError("finalists.epochs must be at least 1 where finalists.schedule is layerwise, but got 0.")
    for key, costs in (("space.smaller_in", spec.space.smaller_in), ("search.minimize", spec.search.minimize)):
        for cost in costs:
            if cost not in COSTS:
                raise SpecError(f"{key} must name known costs, but got {cost!r}.{nearest(cost, COSTS)}")
        if len(set(costs)) < len(costs):
            raise SpecError(f"{key} must name each cost once, but got {list(costs)}.")
    # Canonical order, so that the order in the file does not make another study.
    minimize = tuple(cost for cost in COSTS if cost in spec.search.minimize)
    spec = dataclasses.replace(spec, search=dataclasses.replace(spec.search, minimize=minimize))
    multiple = spec.space.rank_multiple or (TIMED_RANK_MULTIPLE if spec.timed else 1)
    return dataclasses.replace(spec, space=dataclasses.replace(spec.space, rank_multiple=multiple))


def load_spec(source: str, *, overrides: Sequence[str] = ()) -> StudySpec:
    """Load a built-in study by name, or a study file by path.

    Raises:
        SpecError: `source` is neither a built-in study nor a readable file; or as `parse_spec` does.
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
    """Paths of the studies that come with the package, by name."""
    inside = Path(__file__).parent / "studies"
    # In a checkout the folder of studies is beside the package; in the wheel it is inside the package.
    folder = inside if inside.is_dir() else Path(__file__).parents[1] / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of a function from texts `name=value`, with TOML values.

    Raises:
        SpecError: a text is not of that form.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        if not re.fullmatch(r"[^\W\d]\w*=.*", argument, re.DOTALL):
            raise SpecError(f"--arg must read name=value, but got {argument!r}.")
        _override(found, argument)
    return found


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"An override must read section.key=value, but got {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a word without quotes is a string: the shell removes the quotes
    *sections, last = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise SpecError(f"An override must read section.key=value, but {section!r} in {override!r} is not a section.")
    data[last] = value
