"""Before the first trial: probes each layer alone, and chooses the initial plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna

from ranksearch.compress.inventory import Inventory
from ranksearch.compress.profile import Profile
from ranksearch.errors import PlanError, SpecError, StudyError
from ranksearch.plan import Plan
from ranksearch.results import attributes
from ranksearch.results.messages import Job, Outcome, Result, Stage
from ranksearch.results.objectives import prices
from ranksearch.results.record import Probe
from ranksearch.strategy.prior import vbmf_plans
from ranksearch.strategy.sensitivity import predict_front, rescuable, spread, values_to_probe
from ranksearch.strategy.space import Space, check_plan, size_of
from ranksearch.study.run import Run
from ranksearch.task.evaluation import Evaluator

MAX_PREDICTED_PLANS = 4
"""How many plans of the predicted front are tried first."""
WORST_LOSS = 1e6
"""Recorded in place of a probe's NaN or infinite loss, which a storage cannot keep."""


USER = "user"
"""The origin of the user's initial plans."""


def read_user_plans(paths: Sequence[str], from_python: Sequence[Plan], space: Space, inventory: Inventory) -> list[Plan]:
    """The user's plans to try first: those in the files that `search.first` names, then those given from Python.

    Raises:
        SpecError: a file cannot be read, or a plan is outside the search space.
    """
    plans = []
    named = [*((path, _read_plan(path)) for path in paths), *((f"plan {at}", plan) for at, plan in enumerate(from_python, 1))]
    for name, plan in named:
        try:
            check_plan(plan, space, inventory)
        except PlanError as error:
            raise SpecError(f"search.first, {name}: {error}") from None
        plans.append(plan)
    return plans


def _read_plan(path: str) -> Plan:
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8-sig"))
    except PlanError as error:
        raise SpecError(f"search.first, {path}: {error}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"search.first must name plan files, but {path!r} cannot be read: {reason}; check the path.") from None


def check_user_plans(study: optuna.Study, plans: Sequence[Plan]) -> None:
    """Check that the user's initial plans are those that the study already has in its storage.

    Raises:
        StudyError: they differ.
    """
    saved = attributes.read_initial_plans(study)
    if saved is not None and [plan for origin, plan in saved if origin == USER] != list(plans):
        raise StudyError(
            "The initial plans of a study cannot change, but search.first now names others; change it back, choose another "
            "--out or name, or --fresh to start over."
        )


def probe_layers(run: Run, layers: Profile, evaluate: Evaluator) -> None:
    """Measure the loss with one layer at a time decomposed, and store each result at once. The front is predicted from them."""
    plans = [Plan()]
    for name, layer in layers.layers.items():
        plans += [Plan.of({name: value}) for value in values_to_probe(layer)]
    dense_loss, probes = attributes.read_probes(run.study)
    done = {Plan.of({probe.layer: probe.value}) for probe in probes} | ({Plan()} if dense_loss is not None else set())
    run.view.stage("probing layers", len(plans), len(done))

    def on_result(job: Job, result: Result) -> None:
        nonlocal dense_loss
        if result.outcome is Outcome.WORKER_LOST:
            run.view.note(f"probe of {job.plan}: {result.outcome.value}")
            return
        if result.loss is None:
            done.add(job.plan)  # skipped in this run only: the next run may have more memory
            run.view.step(f"{job.plan}: {result.outcome.value}")
            return
        loss = result.loss if math.isfinite(result.loss) else WORST_LOSS
        if job.plan.layers:
            probes.append(Probe(*job.plan.layers[0], loss))
        else:
            dense_loss = loss
        done.add(job.plan)
        attributes.write_probes(run.study, dense_loss, probes)
        run.view.step(str(job.plan))

    def jobs() -> Iterator[Job]:
        return (Job(key, plan, run.spec.seed, Stage.PROBE) for key, plan in enumerate(plans) if plan not in done)

    run.run_jobs("probes", jobs, evaluate, on_result)


def choose_initial_plans(run: Run, layers: Profile) -> list[tuple[str, Plan]]:
    """The initial plans with their origins: the user's, then those of the predicted front and of VBMF within the limits.

    They are chosen once and kept in the storage.
    """
    if (saved := attributes.read_initial_plans(run.study)) is not None:
        return saved
    dense_loss, probes = attributes.read_probes(run.study)
    price = prices(run.spec.search.minimize, run.inventory)[0]
    # If the worker of the dense probe was lost, there is no loss to compare the others with.
    corners = predict_front(layers, probes, dense_loss, price) if dense_loss is not None else []
    # Keep the dense corner although it is never chosen: `spread` takes the first corner for the dense one.
    within = [*corners[:1], *(corner for corner in corners[1:] if _within_limits(run, corner.plan))]
    chosen = spread(rescuable(within), price.of(run.inventory), MAX_PREDICTED_PLANS)
    vbmf = [(origin, plan) for origin, plan in vbmf_plans(run.space, layers.vbmf) if _within_limits(run, plan)]
    initial_plans = [*((USER, plan) for plan in run.user_plans), *(("frontier", corner.plan) for corner in chosen), *vbmf]
    attributes.write_initial_plans(run.study, initial_plans)
    return initial_plans


def _within_limits(run: Run, plan: Plan) -> bool:
    return not run.spec.search.limits.excess(size_of(plan, run.inventory))
