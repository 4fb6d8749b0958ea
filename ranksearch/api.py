"""The whole search from Python: `ranksearch.search(task, ...)`."""

from __future__ import annotations

import dataclasses
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
from ranksearch.spec import DenseSpec, FinalistSpec, Recipe, SearchSpec, SpaceSpec, StudySpec, TaskSpec, parse_spec
from ranksearch.study.options import Options
from ranksearch.study.study import run_study
from ranksearch.task.task import FROM_PYTHON, Task


def search(
    task: Task,
    *,
    out: str | Path = "runs/search",
    methods: str | Sequence[str] = ("tucker2", "cp", "svd"),
    layers: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    rank_multiple: int = 1,
    smaller_in: str | Sequence[str] = ("params",),
    data_aware: bool = True,
    start: str = "decomposed",
    sampler: str = "rank",
    trials: int = 60,
    minutes: float | None = None,
    first: Sequence[Plan] = (),
    minimize: str | Sequence[str] = ("params",),
    min_score: float | None = None,
    min_ratio: float | None = None,
    max_params: int | None = None,
    max_macs: int | None = None,
    finetune: Recipe | None = None,
    finalists: Recipe | None = None,
    finalist_count: int = 10,
    finalist_sweeps: int = 0,
    finalist_schedule: str = "one-shot",
    seed: int = 0,
    options: Options | None = None,
    view: View | None = None,
) -> StudyRecord:
    """Search for the front of a trained model, from Python; `ranksearch study` is the same from a file.

    Args:
        task: the trained model, its data, its loss and score.
        out: the study's folder; the same call goes on where an earlier one stopped.
        methods: what to choose from: tucker2, cp, cp4, spatial, tt, svd, and what `register_method` was given.
        layers: only these layers, by names or patterns such as "stage2.*"; all that can be decomposed if it is empty.
        skip: not these layers, by names or patterns.
        rank_multiple: ranks are multiples of this, as some hardware wants them.
        smaller_in: a layer is only stored in ways that are smaller than dense in each of these: params, macs.
        data_aware: fit the factors for the inputs that each layer sees in training, not for the weights alone.
        start: what a plan's net is trained from: the "decomposed" weights, or weights drawn anew, "scratch".
        sampler: who proposes: rank, or one of Optuna's: tpe, nsga2, gp, random.
        trials: trained trials in all.
        minutes: ask for no more trials once trials took so long, in all runs.
        first: plans to try first.
        minimize: what the front sets against the score: params, macs, or both.
        min_score: models with a lower validation score are not on the front.
        min_ratio: plans of a lower compression ratio are not trained.
        max_params: nor are plans that leave more parameters,
        max_macs: or more multiply-accumulates for one input.
        finetune: how each trial is trained; three epochs by default.
        finalists: how each finalist is trained; twelve epochs by default.
        finalist_count: how many trials of the front become finalists.
        finalist_sweeps: further sweeps over their factors (HOOI, ALS) before they are fine-tuned.
        finalist_schedule: "one-shot", or "layerwise": one layer after the other, the last first, fine-tuned after each.
        seed: of everything random.
        options: workers, engine, device, storage.
        view: what is told while it runs; nothing by default.

    Returns:
        The study's record; `record.front` are the trials to choose from, `load_model(task.model, out / "models" /
        str(trial.number))` takes one home.

    Raises:
        RankSearchError: bad input, most of it before anything is written; or a cluster, a storage or workers that are lost.
    """
    spec = StudySpec(
        name=re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^\w.-]", "-", Path(out).resolve().name)) or "search",
        seed=seed,
        task=TaskSpec(
            model=FROM_PYTHON,
            data=FROM_PYTHON,
            data_args={"about": task.data.about},
            score=f"python:{_word(task.score)}",
            loss=f"python:{_word(task.loss)}",
        ),
        dense=DenseSpec(epochs=0),
        space=SpaceSpec(
            methods=_names(methods),
            plugins=_plugins(_names(methods)),
            layers=_names(layers),
            skip=_names(skip),
            rank_multiple=rank_multiple,
            smaller_in=_names(smaller_in),
            data_aware=data_aware,
            start=start,
        ),
        search=SearchSpec(
            sampler=sampler,
            trials=trials,
            minutes=minutes,
            minimize=_names(minimize),
            min_score=min_score,
            min_ratio=min_ratio,
            max_params=max_params,
            max_macs=max_macs,
        ),
        finetune=finetune or Recipe(epochs=3),
        finalists=FinalistSpec(
            **dataclasses.asdict(finalists or Recipe(epochs=12)),
            count=finalist_count,
            sweeps=finalist_sweeps,
            schedule=finalist_schedule,
        ),
    )
    # By way of its text, so that what Python gives is checked as strictly as a study file.
    spec = parse_spec(spec.to_toml(), source="search()")
    task = replace(task, model=copied(task.model).cpu())
    return run_study(spec, Path(out), options, task=task, first=_plans(first), view=view)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def _plugins(methods: Sequence[str]) -> tuple[str, ...]:
    """The modules that registered methods of a user's own are defined in, for other processes; a script cannot be imported."""
    kinds = [KINDS[name] for name in methods if name in KINDS]
    modules = {type(METHODS[kind]).__module__ for kind in kinds if kind in METHODS}
    return tuple(sorted(name for name in modules if name in sys.modules and not name.startswith(("__main__", "ranksearch."))))


def _plans(given: Sequence[Plan]) -> tuple[Plan, ...]:
    for plan in given:
        if not isinstance(plan, Plan):
            raise SpecError(f"search(): first must hold plans, but got {plan!r}; make one by Plan.of or Plan.from_json.")
    return tuple(given)


def _word(function: Callable[..., Any]) -> str:
    """A function's name as a reference takes it; `<lambda>` is none."""
    return re.sub(r"\W+", "_", getattr(function, "__name__", type(function).__name__))
