"""The search from Python: `ranksearch.search(task, ...)`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranksearch.compress.surgery import copied
from ranksearch.console import View
from ranksearch.errors import SpecError
from ranksearch.methods import METHODS
from ranksearch.plan import KINDS, Plan
from ranksearch.results.record import StudyRecord
from ranksearch.settings import fields, plain_help
from ranksearch.spec import FROM_PYTHON, DenseSpec, Finalists, Latency, Recipe, Search, Space, StudySpec, TaskSpec
from ranksearch.study.options import Local, Options, Ray, check_engine
from ranksearch.study.study import run_study
from ranksearch.study_file import check_spec
from ranksearch.task.task import Task


def search(
    task: Task,
    *,
    space: Space = Space(),
    search: Search = Search(),
    latency: Latency = Latency(),
    narrow: Recipe = Recipe(epochs=10),
    finetune: Recipe = Recipe(epochs=3),
    finalists: Finalists = Finalists(epochs=12),
    seed: int = 0,
    first: Sequence[Plan] = (),
    out: str | Path = "runs/search",
    engine: Local | Ray = Local(),
    storage: str | None = None,
    fresh: bool = False,
    view: View | None = None,
) -> StudyRecord:
    """Compress a trained model: search plans, fine-tune them, and return the front. `ranksearch study` does this from a file.

    Args:
        task: the trained model, its data, its loss and score.
        space: {space}.
        search: {search}.
        latency: {latency}.
        narrow: {narrow}.
        finetune: {finetune}.
        finalists: {finalists}.
        seed: {seed}.
        first: plans to try before all others.
        out: the study's folder; the same call resumes a study that was stopped.
        engine: {engine}.
        storage: {storage}.
        fresh: {fresh}.
        view: receives the progress; silent by default.

    Returns:
        The study's record. Choose a trial from `record.front` and load its model by
        `load_model(task.model, out / "models" / str(trial.number))`.

    Raises:
        RankSearchError: bad input, mostly before anything is written; or a cluster, a storage or a worker is lost.
    """
    spec = check_spec(
        StudySpec(
            name=re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^\w.-]", "-", Path(out).resolve().name)) or "search",
            seed=seed,
            task=_task_spec(task),
            dense=DenseSpec(epochs=0),
            space=space,
            search=search,
            latency=latency,
            narrow=narrow,
            finetune=finetune,
            finalists=finalists,
        )
    )
    spec = replace(spec, space=replace(spec.space, plugins=_plugins(spec.space.methods)))
    options = Options(check_engine(engine, lambda key: f"engine.{key}" if key else "engine"), storage, fresh)
    task = replace(task, model=copied(task.model).cpu())
    return run_study(spec, Path(out), options, task=task, first=_checked_plans(first), view=view)


_HELP = {name: plain_help(entry) for cls in (StudySpec, Options) for name, entry in fields(cls).items()}
search.__doc__ = inspect.cleandoc(search.__doc__ or "").format_map(_HELP)


def _task_spec(task: Task) -> TaskSpec:
    """The task as a study file would name it; the names are compared when a study is resumed."""
    return TaskSpec(
        model=FROM_PYTHON,
        data=FROM_PYTHON,
        data_args={"about": task.data.about},
        score=f"python:{_reference_name(task.score)}",
        loss=f"python:{_reference_name(task.loss)}",
        show=f"python:{_reference_name(task.show)}" if task.show else "",
    )


def _plugins(methods: Sequence[str]) -> tuple[str, ...]:
    """The modules that define the user's own methods, for workers to import; a script (`__main__`) cannot be imported."""
    kinds = [KINDS[name] for name in methods if name in KINDS]
    modules = {type(METHODS[kind]).__module__ for kind in kinds if kind in METHODS}
    return tuple(sorted(name for name in modules if name in sys.modules and not name.startswith(("__main__", "ranksearch."))))


def _checked_plans(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    for plan in plans:
        if not isinstance(plan, Plan):
            raise SpecError(f"first must hold plans, but got {plan!r}; make one with Plan.of or Plan.from_json.")
    return tuple(plans)


def _reference_name(function: Callable[..., Any]) -> str:
    """A function's name with only letters, digits and underscores, as references require; `<lambda>` has others."""
    return re.sub(r"\W+", "_", getattr(function, "__name__", type(function).__name__))
