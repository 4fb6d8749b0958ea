"""How a study is run: options that may change between the runs of one study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ranksearch.errors import SpecError, StudyError
from ranksearch.settings import Named, at_least, documented, fields, from_python, matching, setting


@documented
@dataclass(frozen=True)
class Local:
    """Run trials in processes of this machine."""

    workers: int | None = at_least(
        0,
        "how many trials run at a time; by default one per core, or one on a GPU; 0 runs them in the main process",
        default=None,
    )
    device: str = matching(
        r"auto|cpu|mps|cuda(:\d+)?",
        "auto, cpu, cuda, cuda:N or mps",
        "where to train: `cpu`, `cuda`, one GPU of several such as `cuda:1`, `mps`, or `auto`: CUDA if available, else the CPU",
        default="auto",
    )


@documented
@dataclass(frozen=True)
class Ray:
    """Run trials on a Ray cluster, by Ray Tune."""

    address: str | None = setting(
        "the cluster: `auto` on one of its machines, or HOST:PORT of its head; by default a local Ray is started on this "
        "machine and stopped at the end",
        default=None,
    )
    workers: int | None = at_least(
        1, "the most trials at a time; by default as many as the cluster holds", where=" on Ray", default=None
    )
    cpus_per_trial: int = at_least(1, "CPUs and threads for each trial", default=1)
    gpus_per_trial: float = setting(
        "GPUs for each trial, a whole number or a fraction such as 0.25; with 0, trials train on CPUs",
        "whole or a fraction of one",
        lambda gpus: 0 <= gpus < 1 or (gpus >= 1 and gpus.is_integer()),
        default=0.0,
    )
    device: str = matching(
        r"auto|cpu|cuda(:\d+)?",
        "auto, cpu, cuda or cuda:N on Ray",
        "where the dense net is trained and the finalists are timed; trials train on GPUs if `gpus_per_trial` is above 0",
        default="auto",
    )


ENGINES: dict[str, type[Local] | type[Ray]] = {"local": Local, "ray": Ray}
"""Engines by their names on the command line."""


@documented
@dataclass(frozen=True)
class Options:
    """Options that may change between the runs of one study."""

    engine: Local | Ray = setting("where trials run: in processes of this machine, or on Ray", default=Local())
    storage: str | None = setting("the address of an Optuna database; by default SQLite in the study's folder", default=None)
    fresh: bool = setting("start over: first delete the study from its folder and its storage", default=False)
    command: str = setting("the command that makes the study again, for the report", default="ranksearch.search(...)")


def check_engine(engine: Local | Ray, named: Named) -> Local | Ray:
    """Check every value of an engine and return the engine. `named` turns a setting's name into the name that the user typed.

    Raises:
        SpecError: `engine` is not an engine, or a value has the wrong type, breaks its rule or contradicts another value.
    """
    if not isinstance(engine, Local | Ray):
        raise SpecError(f"{named('')} must be a ranksearch.Local or a ranksearch.Ray, but got {engine!r}.")
    engine = from_python(type(engine), engine, named)
    if isinstance(engine, Ray):
        if engine.device.startswith("cuda") and not engine.gpus_per_trial:
            raise SpecError(
                f"{named('gpus_per_trial')} must be above 0 for {named('device')} {engine.device} on Ray, but got 0."
            )
        if engine.device == "cpu" and engine.gpus_per_trial:
            raise SpecError(
                f"{named('gpus_per_trial')} must be 0 for {named('device')} cpu, but got {engine.gpus_per_trial:g}."
            )
    return engine


def engine_of(name: str, given: Mapping[str, Any]) -> Local | Ray:
    """The engine that the command line names, with the options given there.

    Raises:
        SpecError: as `check_engine` does.
        StudyError: an option belongs to another engine.
    """
    if set(given) - set(fields(ENGINES[name])):
        raise StudyError("--address, --cpus-per-trial and --gpus-per-trial are for --engine ray, but the engine is local.")
    return check_engine(ENGINES[name](**given), option_of)


def option_of(name: str) -> str:
    """The command-line option of a setting."""
    return f"--{name.replace('_', '-')}"
