"""Before the first trial: probes each layer alone, and chooses the initial plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from ranksearch.spec import StudySpec
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.prior import vbmf_plans
from ranksearch.strategy.sensitivity import predict_front, rescuable, spread, values_to_probe
from ranksearch.strategy.space import SearchSpace, check_plan
from ranksearch.study.session import Session
from ranksearch.task.evaluation import Evaluator

MAX_PREDICTED_PLANS = 4
"""How many plans of the predicted front are tried first."""
WORST_LOSS = 1e6
"""Recorded in place of a probe's NaN or infinite loss, which a storage cannot keep."""


USER = "user"
"""The origin of the user's initial plans."""


def read_user_plans(paths: Sequence[str], from_python: Sequence[Plan], space: SearchSpace, inventory: Inventory) -> list[Plan]:
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


def probe_layers(
    session: Session, bases: Bases, profiles: Sequence[Profile], evaluate: Evaluator, *, seed: int
) -> tuple[dict[float, float], list[Probe]]:
    """Measure the loss of each net, and its loss with one layer at a time decomposed, and store each result at once.

    Returns:
        By width the loss of each net, unless the worker that measured it was lost, and the probes.
    """
    plans = []
    for base, profile in zip(bases, profiles, strict=True):
        plans.append(Plan(width=base.width))
        for name, layer in profile.layers.items():
            plans += [Plan.of({name: value}, base.width) for value in values_to_probe(layer)]
    dense_losses, probes = attributes.read_probes(session.study)
    done = {Plan.of({probe.layer: probe.value}, probe.width) for probe in probes}
    done |= {Plan(width=width) for width in dense_losses}
    session.view.stage("probing layers", len(plans), len(done))

    def on_result(job: Job, result: Result) -> None:
        if result.outcome is Outcome.WORKER_LOST:
            session.view.note(f"probe of {job.plan}: {result.outcome.value}")
            return
        if result.loss is None:
            done.add(job.plan)  # skipped in this run only: the next run may have more memory
            session.view.step(f"{job.plan}: {result.outcome.value}")
            return
        loss = result.loss if math.isfinite(result.loss) else WORST_LOSS
        if job.plan.layers:
            probes.append(Probe(*job.plan.layers[0], loss, job.plan.width))
        else:
            dense_losses[job.plan.width] = loss
        done.add(job.plan)
        attributes.write_probes(session.study, dense_losses, probes)
        session.view.step(str(job.plan))

    def jobs() -> Iterator[Job]:
        return (Job(key, plan, seed, Stage.PROBE) for key, plan in enumerate(plans) if plan not in done)

    session.run_jobs("probes", jobs, evaluate, on_result)
    return dense_losses, probes


def choose_initial_plans(
    study: optuna.Study, spec: StudySpec, bases: Bases, profiles: Sequence[Profile], user_plans: Sequence[Plan], *,
    dense_losses: Mapping[float, float], probes: Sequence[Probe],
) -> list[tuple[str, Plan]]:  # fmt: skip
    """The initial plans with their origins: the user's, then, within the limits, those of the predicted front, the narrower
    nets without decompositions, and those of VBMF for the given net.

    They are chosen once and kept in the storage.
    """
    if (saved := attributes.read_initial_plans(study)) is not None:
        return saved

    def within_limits(plan: Plan) -> bool:
        return not spec.search.limits.excess(bases.size_of(plan))

    price = prices(spec.search.minimize, bases.dense)[0]
    # If the worker of the dense probe was lost, there is no loss to compare the others with.
    corners = predict_front(bases, profiles, probes, dense_losses, price) if 1.0 in dense_losses else []
    # Keep the dense corner although it is never chosen: `spread` takes the first corner for the dense one.
    within = [*corners[:1], *(corner for corner in corners[1:] if within_limits(corner.plan))]
    chosen = spread(rescuable(within), price.of(bases.dense), MAX_PREDICTED_PLANS)
    predicted = [("frontier", corner.plan) for corner in chosen]
    given = bases.nets[0]
    others = [("width", Plan(width=base.width)) for base in bases if base is not given]
    others += vbmf_plans(given.space, profiles[0].vbmf)
    seen = {plan for _, plan in predicted}
    others = [(origin, plan) for origin, plan in others if plan not in seen and within_limits(plan)]
    initial_plans = [*((USER, plan) for plan in user_plans), *predicted, *others]
    attributes.write_initial_plans(study, initial_plans)
    return initial_plans
