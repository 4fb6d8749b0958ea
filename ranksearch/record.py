"""What a study found, from and to its Optuna storage. The report reads nothing else, and neither needs torch."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ranksearch import pareto
from ranksearch.errors import StudyError
from ranksearch.limits import UNLIMITED, Limits
from ranksearch.objectives import BY_RATIO, Objectives
from ranksearch.plan import Factorization, Plan


class Outcome(enum.Enum):
    """How a trial ended; the value is the sentence its user reads."""

    DONE = "done"
    DIVERGED = "diverged: the loss or the score became NaN or infinite; a lower finetune.learning_rate helps"
    NOT_SMALLER = "not smaller than dense: the plan saves no parameters, so it was not trained"
    OVER_BUDGET = (
        "over budget: larger than search.min_ratio, search.max_params or search.max_macs allow, so it was not trained; a "
        "wider limit lets it in"
    )
    OUT_OF_MEMORY = "out of memory: a smaller finetune.batch_size or fewer --workers help"
    WORKER_LOST = "worker lost: its process ended before the trial did, most often for lack of memory; fewer --workers help"

    @property
    def state(self) -> TrialState:
        """The state that Optuna is told."""
        return _STATES.get(self, TrialState.PRUNED)


_STATES = {Outcome.DONE: TrialState.COMPLETE, Outcome.WORKER_LOST: TrialState.FAIL}
_UNTRAINED = (Outcome.NOT_SMALLER, Outcome.OVER_BUDGET, Outcome.WORKER_LOST)

GIVE_UP = 100
"""A search ends once so many proposals in a row needed no training: the sampler finds nothing new within the limits."""


@dataclass(frozen=True)
class Rung:
    """One point of a trial's curve: the validation score after so many epochs of fine-tuning."""

    epochs: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A trial that was fine-tuned for longer, from its decomposed weights, and scored once on the test split."""

    score_validation: float
    score_test: float
    curve: tuple[Rung, ...]
    seconds: float
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial. `score` is the validation score after its last rung, None where it did not get there."""

    number: int
    index: int
    origin: str
    plan: Plan
    outcome: Outcome
    params: int
    macs: int
    ratio: float
    score: float | None = None
    curve: tuple[Rung, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    same_as: int | None = None
    """The number of the trial of the same plan that answered for this one, which was not trained again."""
    finalist: Finalist | None = None

    @property
    def trained(self) -> bool:
        """Whether it was trained to an answer of its own: what `search.trials` counts."""
        return self.same_as is None and self.outcome not in _UNTRAINED

    @property
    def score_validation(self) -> float | None:
        """The validation score with the most fine-tuning behind it."""
        return self.finalist.score_validation if self.finalist else self.score

    @property
    def ending(self) -> str:
        """How the trial ended, in a word or two: `done`, `diverged`."""
        return self.outcome.value.partition(":")[0]


@dataclass(frozen=True)
class Probe:
    """The loss, on a sample of the validation split, with one layer alone stored as `value` and nothing trained."""

    layer: str
    value: Factorization
    loss: float


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer that can be decomposed, as the report shows it. `weight` is the kernel's shape (out, in, *kernel)."""

    name: str
    kind: str
    weight: tuple[int, ...]
    params: int
    macs: int
    vbmf: tuple[int | None, int | None]
    """VBMF ranks of the input and the output unfolding; None where the estimate finds no low-rank signal."""


@dataclass(frozen=True, kw_only=True)
class DenseFacts:
    """The dense model: parameters, multiply-accumulates for one input, scores, milliseconds for one input."""

    params: int
    macs: int
    score_validation: float
    score_test: float
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What holds for the study as a whole, kept as attributes of the Optuna study."""

    name: str
    seed: int
    spec: Mapping[str, Any]
    score_name: str
    dense: DenseFacts
    layers: tuple[LayerFacts, ...]
    skipped: Mapping[str, str]
    versions: Mapping[str, str]
    machine: str
    command: str
    data: str
    """One sentence: what the images are, and how many stand in each split."""

    @property
    def limits(self) -> Limits:
        """What the models of the front must keep, as of the last run."""
        return Limits.of(self.spec.get("search", {}))

    @property
    def objectives(self) -> Objectives:
        """What the models of the study compete in."""
        return Objectives.of(self.spec.get("search", {}), self.dense.macs)


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A whole study: its facts, its trials in the order they were asked for, and the seconds each stage took so far."""

    facts: StudyFacts
    trials: tuple[TrialRecord, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def front(self) -> list[TrialRecord]:
        """The non-dominated trials within the study's limits, by rising ratio; see `front_of`."""
        return front_of(self.trials, self.facts.limits, self.facts.objectives)

    @property
    def unconstrained_front(self) -> list[TrialRecord]:
        """The front that there would be without the limits."""
        return front_of(self.trials, objectives=self.facts.objectives)

    @property
    def shown(self) -> list[TrialRecord]:
        """What a reader is shown: the front, or the unconstrained one where no model keeps the limits."""
        return self.front or self.unconstrained_front

    @property
    def notes(self) -> list[str]:
        """Sentences on what became of the limits and of proposals that were not trained; most studies have none."""
        trials, planned = self.trials, self.facts.spec.get("search", {}).get("trials", 0)
        over = sum(trial.outcome is Outcome.OVER_BUDGET for trial in trials)
        known = sum(trial.same_as is not None for trial in trials)
        trained = sum(trial.trained for trial in trials)
        found = []
        if self.facts.limits and not self.front and self.unconstrained_front:
            found.append(
                f"No model keeps the limits ({self.facts.limits}): shown is the front without them, and the nearest trials "
                "are the finalists."
            )
        if trained < planned and untrained_in_a_row(trials) >= GIVE_UP:
            found.append(
                f"The search ended after {trained} of {planned} trials: {GIVE_UP} proposals in a row were over the limits or "
                "known already; widen the limits or the space."
            )
        if over:
            found.append(f"Proposals over the limits, which were not trained: {over:,}.")
        if known:
            found.append(f"Proposals of a plan that was known already, answered from the record: {known:,}.")
        return found


def untrained_in_a_row(trials: Iterable[TrialRecord], waiting: Iterable[int] = (), running: Iterable[int] = ()) -> int:
    """How many proposals since the last that was trained needed no training.

    Args:
        trials: those that have an answer.
        waiting: numbers of those that wait for the answer to the same plan.
        running: numbers of those that are being trained.
    """
    trials = list(trials)
    last = max([*running, *(trial.number for trial in trials if trial.trained)], default=-1)
    untrained = [*waiting, *(trial.number for trial in trials if not trial.trained)]
    return sum(number > last for number in untrained)


def front_of(trials: Sequence[TrialRecord], limits: Limits = UNLIMITED, objectives: Objectives = BY_RATIO) -> list[TrialRecord]:
    """The non-dominated trials within the limits by validation score and ratios, by rising ratio; each plan once.

    Once there are finalists only they compete: scores of long and of short fine-tuning do not compare.
    """
    done = [trial for trial in trials if trial.outcome is Outcome.DONE and trial.score_validation is not None]
    pool = [trial for trial in done if trial.finalist] or [trial for trial in done if trial.same_as is None]
    pool = [trial for trial in pool if not limits.excess(trial, trial.score_validation)]
    chosen = [pool[i] for i in pareto.front([objectives.point(_score(trial), trial) for trial in pool])]
    return sorted(chosen, key=objectives.ratio)


def choose(
    trials: Sequence[TrialRecord],
    *,
    number: int | None = None,
    min_score: float | None = None,
    min_ratio: float | None = None,
    limits: Limits = UNLIMITED,
    objectives: Objectives = BY_RATIO,
) -> TrialRecord:
    """One finalist: of that number, or the smallest of at least that validation score, or the best of at least that
    compression ratio; the knee of the front where nothing is asked for. One within the study's `limits` where there is one.
    Front, knee and size are meant by the study's `objectives`.

    Raises:
        StudyError: there are no finalists, or none is as asked.
    """
    finalists = {trial.number: trial for trial in trials if trial.finalist}
    if not finalists:
        raise StudyError("A model must be a finalist to be taken home, but there are none yet; let the study end first.")
    if number is not None:
        if number not in finalists:
            names = ", ".join(map(str, sorted(finalists)))
            raise StudyError(f"Only finalists keep their weights, but trial {number} is none; they are {names}.")
        return finalists[number]
    whole = front_of(trials, objectives=objectives)
    front = front_of(trials, limits, objectives) or whole
    if min_score is not None:
        fitting = [t for t in front if _score(t) >= min_score] or [t for t in whole if _score(t) >= min_score]
        if not fitting:
            best = max(map(_score, whole))
            raise StudyError(f"A model with a score of at least {min_score:g} is asked for, but the best has {best:.4f}.")
        return max(fitting, key=objectives.ratio)
    if min_ratio is not None:
        fitting = [t for t in front if t.ratio >= min_ratio] or [t for t in whole if t.ratio >= min_ratio]
        if not fitting:
            most = max(trial.ratio for trial in whole)
            raise StudyError(f"A ratio of at least {min_ratio:g} is asked for, but the smallest model has {most:.1f}.")
        return max(fitting, key=_score)
    return front[pareto.knee([objectives.point(_score(trial), trial) for trial in front])]


def _score(trial: TrialRecord) -> float:
    return trial.score_validation if trial.score_validation is not None else -math.inf


# --- to and from Optuna -------------------------------------------------------------------------------------------

_FACTS, _SECONDS, _FINALIST = "ranksearch:facts", "ranksearch:seconds", "ranksearch:finalist:"
_TRIAL, _ASKED, _PROBES, _FIRSTS = "ranksearch:trial", "ranksearch:asked", "ranksearch:probes", "ranksearch:firsts"


def attributes(record: TrialRecord) -> dict[str, Any]:
    """The trial's attribute, plain JSON values: the whole record, first what a person wants to see. One, since each is a
    commit of its own."""
    whole = {
        "about": f"{record.plan}: {record.ending}",
        "plan": record.plan.to_dict(),
        "outcome": record.outcome.name,
        "params": record.params,
        "macs": record.macs,
        "ratio": record.ratio,
        "score": record.score,
        "curve": [_plain(rung) for rung in record.curve],
        "seconds": record.seconds,
        "seed": record.seed,
        "same_as": record.same_as,
    }
    return {_TRIAL: whole}


def write_facts(study: optuna.Study, facts: StudyFacts) -> None:
    """Keep the study's facts in its storage."""
    study.set_user_attr(_FACTS, _plain(facts))


def write_seconds(study: optuna.Study, seconds: Mapping[str, float]) -> None:
    """Keep the seconds that each stage has taken so far."""
    study.set_user_attr(_SECONDS, dict(seconds))


def write_probes(study: optuna.Study, dense_loss: float | None, probes: Sequence[Probe]) -> None:
    """Keep the probes so far, and the dense model's validation loss that they are set against."""
    plans = [{"plan": Plan.of({probe.layer: probe.value}).to_dict(), "loss": probe.loss} for probe in probes]
    study.set_user_attr(_PROBES, {"dense": dense_loss, "probes": plans})


def read_probes(study: optuna.Study) -> tuple[float | None, list[Probe]]:
    """What `write_probes` kept: the dense loss, None before it is known, and the probes."""
    found = study.user_attrs.get(_PROBES, {"dense": None, "probes": []})
    plans = [(Plan.from_dict(entry["plan"]), entry["loss"]) for entry in found["probes"]]
    return found["dense"], [Probe(*plan.layers[0], loss) for plan, loss in plans]


def write_firsts(study: optuna.Study, firsts: Sequence[tuple[str, Plan]]) -> None:
    """Keep the plans that are tried first, with their origins: an index means the same trial whenever it is asked for."""
    study.set_user_attr(_FIRSTS, [{"origin": origin, "plan": plan.to_dict()} for origin, plan in firsts])


def read_firsts(study: optuna.Study) -> list[tuple[str, Plan]] | None:
    """What `write_firsts` kept; None before it did."""
    found = study.user_attrs.get(_FIRSTS)
    return None if found is None else [(entry["origin"], Plan.from_dict(entry["plan"])) for entry in found]


def write_finalist(study: optuna.Study, number: int, finalist: Finalist) -> None:
    """Keep a finalist's result. Optuna closes finished trials, so it stands among the study's attributes."""
    study.set_user_attr(f"{_FINALIST}{number}", _plain(finalist))


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
    return StudyFacts(**data | {"layers": layers, "dense": DenseFacts(**data["dense"])})


def asked(index: int, origin: str) -> dict[str, Any]:
    """The attribute of a trial that was asked for: its place in the study, kept when it is queued again, and by whom."""
    return {_ASKED: {"index": index, "origin": origin}}


def read_asked(trial: FrozenTrial | optuna.Trial) -> tuple[int, str] | None:
    """What `asked` kept: (index, origin); None for a trial that a killed run had not finished asking for."""
    found = trial.user_attrs.get(_ASKED)
    return (found["index"], found["origin"]) if found else None


def read_trial(trial: FrozenTrial, finalist: Mapping[str, Any] | None = None) -> TrialRecord | None:
    """The record of a finished trial; None while it waits or runs, or where a killed run left it without a result."""
    whole, place = trial.user_attrs.get(_TRIAL), read_asked(trial)
    if whole is None or place is None or trial.state is not Outcome[whole["outcome"]].state:
        return None
    read = {
        "plan": Plan.from_dict(whole["plan"]),
        "outcome": Outcome[whole["outcome"]],
        "curve": tuple(Rung(*point) for point in whole["curve"]),
        "finalist": _finalist(finalist) if finalist else None,
    }
    kept = {key: value for key, value in whole.items() if key != "about"}
    return TrialRecord(**kept | read, number=trial.number, index=place[0], origin=place[1])


def _finalist(data: Mapping[str, Any]) -> Finalist:
    return Finalist(**{**data, "curve": tuple(Rung(*point) for point in data["curve"])})


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """Every finished trial of the study, finalists' results included, by number."""
    attrs = study.user_attrs
    found = (read_trial(t, attrs.get(f"{_FINALIST}{t.number}")) for t in study.get_trials(deepcopy=False))
    return tuple(record for record in found if record is not None)


def read_study(study: optuna.Study) -> StudyRecord:
    """Everything the report needs; raises `StudyError` as `read_facts` does."""
    return StudyRecord(facts=read_facts(study), trials=read_trials(study), seconds=study.user_attrs.get(_SECONDS, {}))


def _plain(value: Any) -> Any:
    """Dataclasses to plain JSON values; a `Rung` becomes the pair [epochs, score]."""
    if isinstance(value, Rung):
        return [value.epochs, value.score]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
