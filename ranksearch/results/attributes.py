"""Read and write a study's record as user attributes of its Optuna study and trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from ranksearch.errors import StudyError
from ranksearch.plan import Plan
from ranksearch.results.account import Part
from ranksearch.results.messages import CurvePoint, Difference, Outcome
from ranksearch.results.record import (
    Control,
    DenseFacts,
    LayerFacts,
    NarrowFacts,
    Probe,
    StudyFacts,
    StudyRecord,
    control_with_measured,
    with_measured,
)
from ranksearch.results.trials import Finalist, Timing, TrialRecord

_FACTS, _SECONDS = "ranksearch:facts", "ranksearch:seconds"
_FINALIST, _FAILED = "ranksearch:finalist:", "ranksearch:failed:"
_CONTROLS, _CONTROL = "ranksearch:controls", "ranksearch:control:"
_TRIAL, _ASKED, _PROBES, _INITIAL_PLANS = "ranksearch:trial", "ranksearch:asked", "ranksearch:probes", "ranksearch:firsts"


def write_trial(trial: optuna.Trial, record: TrialRecord) -> None:
    """Store a trial's record, readable parts first, as one attribute: Optuna commits every attribute separately."""
    content = {
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
    trial.set_user_attr(_TRIAL, content)


def write_facts(study: optuna.Study, facts: StudyFacts) -> None:
    """Store the study's facts."""
    study.set_user_attr(_FACTS, dataclasses.asdict(facts))


def write_seconds(study: optuna.Study, seconds: Mapping[str, float]) -> None:
    """Store the seconds that each stage has taken so far."""
    study.set_user_attr(_SECONDS, dict(seconds))


def read_seconds(study: optuna.Study) -> dict[str, float]:
    """The seconds by stage that `write_seconds` stored; empty before it ran."""
    return dict(study.user_attrs.get(_SECONDS, {}))


def write_probes(study: optuna.Study, dense_losses: Mapping[float, float], probes: Sequence[Probe]) -> None:
    """Store the probes so far, and by width the loss of each net without decompositions, which they are compared with."""
    dense = [{"width": width, "loss": loss} for width, loss in dense_losses.items()]
    plans = [{"plan": Plan.of({probe.layer: probe.value}, probe.width).to_dict(), "loss": probe.loss} for probe in probes]
    study.set_user_attr(_PROBES, {"dense": dense, "probes": plans})


def read_probes(study: optuna.Study) -> tuple[dict[float, float], list[Probe]]:
    """The losses of the nets (those that are known) and the probes that `write_probes` stored."""
    stored = study.user_attrs.get(_PROBES, {"dense": [], "probes": []})
    plans = [(Plan.from_dict(entry["plan"]), entry["loss"]) for entry in stored["probes"]]
    dense_losses = {entry["width"]: entry["loss"] for entry in stored["dense"]}
    return dense_losses, [Probe(*plan.layers[0], loss, plan.width) for plan, loss in plans]


def write_initial_plans(study: optuna.Study, initial_plans: Sequence[tuple[str, Plan]]) -> None:
    """Store the initial plans with their origins, so that a resumed study tries the same plans in the same order."""
    study.set_user_attr(_INITIAL_PLANS, [{"origin": origin, "plan": plan.to_dict()} for origin, plan in initial_plans])


def read_initial_plans(study: optuna.Study) -> list[tuple[str, Plan]] | None:
    """The initial plans that `write_initial_plans` stored; None before it ran."""
    stored = study.user_attrs.get(_INITIAL_PLANS)
    return None if stored is None else [(entry["origin"], Plan.from_dict(entry["plan"])) for entry in stored]


def write_finalist(study: optuna.Study, number: int, finalist: Finalist) -> None:
    """Store a finalist's result as an attribute of the study: Optuna does not let a finished trial change."""
    study.set_user_attr(f"{_FINALIST}{number}", dataclasses.asdict(finalist) | {"curve": _points(finalist.curve)})


def write_failed(study: optuna.Study, number: int, outcome: Outcome) -> None:
    """Store the outcome of a finalist whose longer fine-tuning failed."""
    study.set_user_attr(f"{_FAILED}{number}", outcome.name)


def write_shares(study: optuna.Study, shares: Sequence[float], reason: str = "") -> None:
    """Store the shares of the controls, so that a resumed study trains the same; or the reason why there are none."""
    study.set_user_attr(_CONTROLS, {"shares": list(shares), "reason": reason})


def read_shares(study: optuna.Study) -> tuple[list[float], str]:
    """The shares and the reason that `write_shares` stored; empty before it ran."""
    stored = study.user_attrs.get(_CONTROLS, {"shares": [], "reason": ""})
    return stored["shares"], stored["reason"]


def write_control(study: optuna.Study, control: Control) -> None:
    """Store a control's result."""
    content = dataclasses.asdict(control) | {"curve": _points(control.curve)}
    study.set_user_attr(f"{_CONTROL}{control.number}", content)


def write_failed_control(study: optuna.Study, number: int, outcome: Outcome) -> None:
    """Store the outcome of a control whose training failed."""
    study.set_user_attr(f"{_CONTROL}{number}", {"failed": outcome.name})


def read_controls(study: optuna.Study) -> tuple[dict[int, Control], dict[int, Outcome]]:
    """The controls by number, and the outcomes of those that failed."""
    entries = {name.removeprefix(_CONTROL): entry for name, entry in study.user_attrs.items() if name.startswith(_CONTROL)}
    stored = {int(number): entry for number, entry in sorted(entries.items(), key=lambda item: int(item[0]))}
    failed = {number: Outcome[entry["failed"]] for number, entry in stored.items() if "failed" in entry}
    return {number: _control(entry) for number, entry in stored.items() if number not in failed}, failed


def _control(data: Mapping[str, Any]) -> Control:
    curve = tuple(CurvePoint(*point) for point in data["curve"])
    return Control(**{**data, "curve": curve, "timings": _timings(data["timings"])})


def has_facts(study: optuna.Study) -> bool:
    """Whether the dense model has been measured and its facts stored, so that probing could start."""
    return _FACTS in study.user_attrs


def read_facts(study: optuna.Study) -> StudyFacts:
    """The facts that `write_facts` stored.

    Raises:
        StudyError: ranksearch did not make this Optuna study, or the study stopped before its first trial.
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
    narrow = tuple(NarrowFacts(**entry) for entry in data["narrow"])
    account = tuple(map(Part.from_dict, data.get("account", ())))
    return StudyFacts(**data | {"layers": layers, "dense": DenseFacts(**dense), "narrow": narrow, "account": account})


def asked(index: int, origin: str) -> dict[str, Any]:
    """The user attribute of a proposed trial: its index, which it keeps when it is queued again, and its origin."""
    return {_ASKED: {"index": index, "origin": origin}}


def read_asked(trial: FrozenTrial | optuna.Trial) -> tuple[int, str] | None:
    """The (index, origin) of a proposed trial; None if a run was killed before the proposal was complete."""
    stored = trial.user_attrs.get(_ASKED)
    return (stored["index"], stored["origin"]) if stored else None


def read_trial(trial: FrozenTrial, study: Mapping[str, Any] | None = None) -> TrialRecord | None:
    """The record of a finished trial; None if it waits, runs, or was left without a result by a killed run.

    `study` are the user attributes of the Optuna study, which hold the results of finalists.
    """
    content, place = trial.user_attrs.get(_TRIAL), read_asked(trial)
    if content is None or place is None or trial.state is not Outcome[content["outcome"]].state:
        return None
    finalist, failed = ((study or {}).get(f"{key}{trial.number}") for key in (_FINALIST, _FAILED))
    converted = {
        "plan": Plan.from_dict(content["plan"]),
        "outcome": Outcome[content["outcome"]],
        "curve": tuple(CurvePoint(*point) for point in content["curve"]),
        "finalist": _finalist(finalist) if finalist else None,
        "failed": Outcome[failed] if failed and not finalist else None,
    }
    plain = {key: value for key, value in content.items() if key != "about"}
    return TrialRecord(**plain | converted, number=trial.number, index=place[0], origin=place[1])


def _finalist(data: Mapping[str, Any]) -> Finalist:
    curve = tuple(CurvePoint(*point) for point in data["curve"])
    differences = {key: Difference(**data[key]) for key in ("difference_validation", "difference_test") if data.get(key)}
    return Finalist(**{**data, **differences, "curve": curve, "timings": _timings(data["timings"])})


def _timings(entries: Sequence[Mapping[str, Any]]) -> tuple[Timing, ...]:
    return tuple(Timing(**entry) for entry in entries)


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """The records of all finished trials, by number, finalists' results included."""
    attrs = study.user_attrs
    records = (read_trial(trial, attrs) for trial in study.get_trials(deepcopy=False))
    return tuple(record for record in records if record is not None)


def read_study(study: optuna.Study) -> StudyRecord:
    """The whole record of a study; raises `StudyError` as `read_facts` does."""
    facts, trials = with_measured(read_facts(study), read_trials(study))
    controls, failed = read_controls(study)
    _, reason = read_shares(study)
    return StudyRecord(
        facts=facts,
        trials=trials,
        seconds=read_seconds(study),
        controls=tuple(map(control_with_measured, controls.values())),
        missing_controls=(
            *([f"There are no controls: {reason}"] if reason else []),
            *(f"Control {number} failed, {outcome.of_control}." for number, outcome in failed.items()),
        ),
    )


def _points(curve: Sequence[CurvePoint]) -> list[tuple[float, float]]:
    return [(curve_point.epochs, curve_point.score) for curve_point in curve]
