"""A made-up study of LeNet's six layers, as complete as a real one: 45 trials with all outcomes, eight of them finalists."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from ranksearch.plan import CP, SVD, Factorization, Plan, Spatial, Tucker2
from ranksearch.results.account import Part
from ranksearch.results.choosing import front_of
from ranksearch.results.messages import CurvePoint, Outcome
from ranksearch.results.record import Control, DenseFacts, LayerFacts, StudyFacts, StudyRecord, with_measured
from ranksearch.results.trials import Finalist, Timing, TrialRecord

SHAPES = {
    "conv1": ((32, 1, 3, 3), 784),
    "conv2": ((32, 32, 3, 3), 784),
    "conv3": ((64, 32, 3, 3), 196),
    "conv4": ((64, 64, 3, 3), 196),
    "fc1": ((360, 3136), 1),
    "fc2": ((10, 360), 1),
}
RUNGS = (0, 1, 3, 9)


def study_record(*, trials: int = 45, finalists: int = 8) -> StudyRecord:
    """The study after `trials` trials, with the best of them as finalists."""
    facts = study_facts()
    draw = random.Random(7)
    record = StudyRecord(
        facts=facts,
        trials=tuple(_trial(number, draw, facts) for number in range(trials)),
        seconds={"dense": 41.7, "profile": 6.3, "search": 512.4, "finalists": 148.9} if trials else {"dense": 41.7},
    )
    chosen = front_of(record.trials, record.facts.objectives)
    chosen = [chosen[i * (len(chosen) - 1) // max(finalists - 1, 1)] for i in range(min(finalists, len(chosen)))]
    finals = {trial.number: _finalist(trial, draw) for trial in chosen}
    facts, timed = with_measured(facts, [replace(t, finalist=finals.get(t.number)) for t in record.trials])
    return replace(record, facts=facts if finals else record.facts, trials=timed)


def study_facts() -> StudyFacts:
    """The facts of a study before its first trial."""
    layers = tuple(
        LayerFacts(
            name=name,
            kind="Conv2d" if len(shape) == 4 else "Linear",
            weight=shape,
            costs={"params": _params(shape, None), "macs": math.prod(shape) * places},
            vbmf=vbmf,
        )
        for (name, (shape, places)), vbmf in zip(
            SHAPES.items(), [(None, 4), (9, 11), (12, 19), (17, 21), (38, 38), (9, 9)], strict=True
        )
    )
    return StudyFacts(
        name="lenet",
        seed=0,
        spec={
            "study": {"name": "lenet", "seed": 0, "finalists": 8},
            "search": {"trials": 45, "minimize": ["params"]},
            "model": {"factory": "ranksearch.models:lenet", "width": 1.0},
            "data": {"factory": "ranksearch.data:digits", "size": [28, 28], "normalise": True},
            "finetune": {"learning_rate": 0.001, "batch_size": 128, "rungs": list(RUNGS), "distill": 0.5},
        },
        score_name="accuracy",
        dense=DenseFacts(
            costs={cost: sum(layer.costs[cost] for layer in layers) for cost in ("params", "macs")},
            score_validation=0.9861,
            score_test=0.9843,
            timings=(Timing("onnxruntime", 1, 1, 0.912, 0.01, True),),
        ),
        layers=layers,
        skipped={"dropout": "Dropout has no weight to decompose", "norm1": "BatchNorm2d has no kernel to decompose"},
        account=(
            Part(
                title="decomposable layers",
                modules=tuple(layer.name for layer in layers),
                params=sum(layer.params for layer in layers),
                macs=sum(layer.macs for layer in layers),
            ),
        ),
        versions={"ranksearch": "0.1.0", "python": "3.11.2", "torch": "2.9.0", "optuna": "5.0.0"},
        machine="2 x Xeon 2.6 GHz, 8 GiB, no GPU",
        command="ranksearch study lenet --trials 45 --seed 0",
        data="Handwritten digits, 28x28 grey: 4,000 images to train, 1,000 to validate, 1,000 to test.",
    )


def _trial(number: int, draw: random.Random, facts: StudyFacts) -> TrialRecord:
    origin = {0: "vbmf", 1: "vbmf x 0.5"}.get(number, f"frontier {number - 1}" if number < 10 else "sampler")
    keep = {0: 0.30, 1: 0.15}.get(number, math.exp(draw.uniform(math.log(0.01), math.log(0.5))))
    plan = Plan.of({layer.name: _factorization(layer.weight, keep * draw.uniform(0.5, 2), draw) for layer in facts.layers})
    params = sum(_params(layer.weight, plan[layer.name]) for layer in facts.layers)
    ratio = facts.dense.params / params
    outcome = _outcome(number, ratio)
    final = facts.dense.score_validation - 0.0009 * math.log(ratio) ** 2.6 + draw.gauss(0, 0.006)
    final -= 0.2 if number > 9 and (number % 8 == 7 or ratio > 150) else 0.0
    final -= 0.012 if origin == "sampler" and number < 20 else 0.02 if origin.startswith("vbmf") else 0
    curve = _curve(final, RUNGS, draw)[: {Outcome.DONE: 4, Outcome.DIVERGED: 2}.get(outcome, 0)]
    return TrialRecord(
        number=number,
        index=number,
        origin=origin,
        plan=plan,
        outcome=outcome,
        costs={
            "params": params,
            "macs": round(facts.dense.macs / ratio ** random.Random(number).uniform(0.3, 1.1)),
        },
        ratio=ratio,
        score=curve[-1].score if outcome is Outcome.DONE else None,
        curve=curve,
        seconds=round(2 + 3 * len(curve) * draw.random(), 2),
        seed=draw.randrange(2**31),
    )


def _outcome(number: int, ratio: float) -> Outcome:
    odd = {
        13: Outcome.DIVERGED,
        17: Outcome.OUT_OF_MEMORY,
        22: Outcome.NOT_SMALLER,
        27: Outcome.OVER_BUDGET,
        31: Outcome.WORKER_LOST,
    }
    return odd.get(number, Outcome.DIVERGED if number > 9 and number % 8 == 3 else Outcome.DONE)


def _curve(final: float, epochs: tuple[int, ...], draw: random.Random) -> tuple[CurvePoint, ...]:
    start = draw.uniform(0.1, 0.8)
    progress = [1 - math.exp(-1.1 * epoch) for epoch in epochs]
    return tuple(
        CurvePoint(epoch, round(min(0.999, max(0.1, start + (final - start) * part)), 4))
        for epoch, part in zip(epochs, progress, strict=True)
    )


def _finalist(trial: TrialRecord, draw: random.Random) -> Finalist:
    assert trial.score is not None
    curve = _curve(min(0.99, trial.score + 0.006), (0, 10, 30), draw)
    return Finalist(
        score_validation=curve[-1].score,
        score_test=round(curve[-1].score - draw.uniform(-0.001, 0.006), 4),
        curve=curve,
        seconds=18.5,
        timings=(Timing("onnxruntime", 1, 1, round(0.912 / trial.ratio**0.35, 4), 0.01, True),),
    )


def _factorization(shape: tuple[int, ...], keep: float, draw: random.Random) -> Factorization:
    out, inner = shape[:2]
    rank = max(1, round(keep * min(out, inner)))
    if len(shape) == 2:
        return SVD(rank)
    kind = draw.randrange(3)
    if kind == 0:
        return Tucker2(max(1, round(keep * inner)), max(1, round(keep * out)))
    return Spatial(rank) if kind == 1 else CP(2 * rank)


def _params(shape: tuple[int, ...], value: Factorization | None) -> int:
    out, inner, area = shape[0], shape[1], math.prod(shape[2:])
    if isinstance(value, Tucker2):
        return inner * value.rank_in + area * value.rank_in * value.rank_out + value.rank_out * out + out
    if value is None:
        return inner * area * out + out
    return max(value.ranks) * (inner + area + out) + out


def with_controls(record: StudyRecord, *controls: tuple[float, float]) -> StudyRecord:
    """The study with these controls: (ratio in every cost, validation score)."""
    dense = record.facts.dense
    return replace(
        record,
        controls=tuple(
            Control(
                number=number,
                share=1 / ratio,
                costs={name: value / ratio for name, value in dense.costs.items()},
                ratio=ratio,
                score_validation=score,
                score_test=score - 0.004,
                curve=(CurvePoint(0, 0.1), CurvePoint(27, score)),
                seconds=12.5,
                timings=(Timing("onnxruntime", 1, 1, 0.912 / ratio, 0.01, True),),
            )
            for number, (ratio, score) in enumerate(controls, start=1)
        ),
    )
