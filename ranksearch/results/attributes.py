"""A study's record in its Optuna study: attributes of the study and of its trials, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from ranksearch.errors import StudyError
from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.record import (
    DenseFacts,
    Finalist,
    LayerFacts,
    Probe,
    StudyFacts,
    StudyRecord,
    Timing,
    TrialRecord,
    with_measured,
)

_FACTS, _SECONDS = "ranksearch:facts", "ranksearch:seconds"
_FINALIST, _FAILED = "ranksearch:finalist:", "ranksearch:failed:"
_TRIAL, _ASKED, _PROBES, _INITIAL_PLANS = "ranksearch:trial", "ranksearch:asked", "ranksearch:probes", "ranksearch:firsts"


def write_trial(trial: optuna.Trial, record: TrialRecord) -> None:
    """Keep a trial's whole record, first what a person wants to see. As one attribute, since each is a commit of its own."""
    whole = {
        "about": f"{record.plan}: {record.ending}",
        "plan": record.plan.to_dict(),
        "outcome": record.outcome.name,
        "costs": dict(record.costs),
        "ratio": record.ratio,
        "score": record.score,
        "curve": _points(record.curve),
        "seconds": record.seconds,
        "seed": record.seed,
        "same_as": record.same_as,
    }
    trial.set_user_attr(_TRIAL, whole)


def write_facts(study: optuna.Study, facts: StudyFacts) -> None:
    """Keep the study's facts in its storage."""
    study.set_user_attr(_FACTS, dataclasses.asdict(facts))


def write_seconds(study: optuna.Study, seconds: Mapping[str, float]) -> None:
    """Keep the seconds that each stage has taken so far."""
    study.set_user_attr(_SECONDS, dict(seconds))


def read_seconds(study: optuna.Study) -> dict[str, float]:
    """What `write_seconds` kept."""
    return dict(study.user_attrs.get(_SECONDS, {}))


def write_probes(study: optuna.Study, dense_loss: float | None, probes: Sequence[Probe]) -> None:
    """Keep the probes so far, and the dense model's validation loss that they are set against."""
    plans = [{"plan": Plan.of({probe.layer: probe.value}).to_dict(), "loss": probe.loss} for probe in probes]
    study.set_user_attr(_PROBES, {"dense": dense_loss, "probes": plans})


def read_probes(study: optuna.Study) -> tuple[float | None, list[Probe]]:
    """What `write_probes` kept: the dense loss, None before it is known, and the probes."""
    found = study.user_attrs.get(_PROBES, {"dense": None, "probes": []})
    plans = [(Plan.from_dict(entry["plan"]), entry["loss"]) for entry in found["probes"]]
    return found["dense"], [Probe(*plan.layers[0], loss) for plan, loss in plans]


def write_initial_plans(study: optuna.Study, initial_plans: Sequence[tuple[str, Plan]]) -> None:
    """Keep the plans that are tried first, with their origins: an index means the same trial whenever it is asked for."""
    study.set_user_attr(_INITIAL_PLANS, [{"origin": origin, "plan": plan.to_dict()} for origin, plan in initial_plans])


def read_initial_plans(study: optuna.Study) -> list[tuple[str, Plan]] | None:
    """What `write_initial_plans` kept; None before it did."""
    found = study.user_attrs.get(_INITIAL_PLANS)
    return None if found is None else [(entry["origin"], Plan.from_dict(entry["plan"])) for entry in found]


def write_finalist(study: optuna.Study, number: int, finalist: Finalist) -> None:
    """Keep a finalist's result. Optuna closes finished trials, so it stands among the study's attributes."""
    study.set_user_attr(f"{_FINALIST}{number}", dataclasses.asdict(finalist) | {"curve": _points(finalist.curve)})


def write_failed(study: optuna.Study, number: int, outcome: Outcome) -> None:
    """Keep how a trial's longer fine-tuning ended, where it gave no finalist."""
    study.set_user_attr(f"{_FAILED}{number}", outcome.name)


def has_facts(study: optuna.Study) -> bool:
    """Whether the study got as far as its probes, with the dense model measured."""
    return _FACTS in study.user_attrs


def read_facts(study: optuna.Study) -> StudyFacts:
    """The facts that `write_facts` kept.

    Raises:
        StudyError: the Optuna study is not one of ranksearch's, or stopped before its first trial.
    """
    try:
        data = dict(study.user_attrs[_FACTS])
    except KeyError:
        raise StudyError(
            f"Study {study.study_name!r} holds no ranksearch record yet; run `ranksearch study` until it probes its layers."
        ) from None
    layers = tuple(
        LayerFacts(**entry | {"weight": tuple(entry["weight"]), "vbmf": tuple(entry["vbmf"])}) for entry in data.pop("layers")
    )
    dense = {**data["dense"], "timings": _timings(data["dense"]["timings"])}
    return StudyFacts(**data | {"layers": layers, "dense": DenseFacts(**dense)})


def asked(index: int, origin: str) -> dict[str, Any]:
    """The attribute of a trial that was asked for: its place in the study, kept when it is queued again, and by whom."""
    return {_ASKED: {"index": index, "origin": origin}}


def read_asked(trial: FrozenTrial | optuna.Trial) -> tuple[int, str] | None:
    """What `asked` kept: (index, origin); None for a trial that a killed run had not finished asking for."""
    found = trial.user_attrs.get(_ASKED)
    return (found["index"], found["origin"]) if found else None


def read_trial(trial: FrozenTrial, study: Mapping[str, Any] | None = None) -> TrialRecord | None:
    """The record of a finished trial; None while it waits or runs, or where a killed run left it without a result. What is
    known of it as a finalist stands among the attributes of its `study`."""
    whole, place = trial.user_attrs.get(_TRIAL), read_asked(trial)
    if whole is None or place is None or trial.state is not Outcome[whole["outcome"]].state:
        return None
    finalist, failed = ((study or {}).get(f"{key}{trial.number}") for key in (_FINALIST, _FAILED))
    read = {
        "plan": Plan.from_dict(whole["plan"]),
        "outcome": Outcome[whole["outcome"]],
        "curve": tuple(CurvePoint(*point) for point in whole["curve"]),
        "finalist": _finalist(finalist) if finalist else None,
        "failed": Outcome[failed] if failed and not finalist else None,
    }
    kept = {key: value for key, value in whole.items() if key != "about"}
    return TrialRecord(**kept | read, number=trial.number, index=place[0], origin=place[1])


def _finalist(data: Mapping[str, Any]) -> Finalist:
    curve = tuple(CurvePoint(*point) for point in data["curve"])
    return Finalist(**{**data, "curve": curve, "timings": _timings(data["timings"])})


def _timings(entries: Sequence[Mapping[str, Any]]) -> tuple[Timing, ...]:
    return tuple(Timing(**entry) for entry in entries)


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """Every finished trial of the study, finalists' results included, by number."""
    attrs = study.user_attrs
    found = (read_trial(trial, attrs) for trial in study.get_trials(deepcopy=False))
    return tuple(record for record in found if record is not None)


def read_study(study: optuna.Study) -> StudyRecord:
    """Everything the report needs; raises `StudyError` as `read_facts` does."""
    facts, trials = with_measured(read_facts(study), read_trials(study))
    return StudyRecord(facts=facts, trials=trials, seconds=read_seconds(study))


def _points(curve: Sequence[CurvePoint]) -> list[tuple[float, float]]:
    return [(curve_point.epochs, curve_point.score) for curve_point in curve]
