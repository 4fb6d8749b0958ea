"""Objectives: fronts, proposals, studies and reports that minimise multiply-accumulates, or both costs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.compress.saved import load_model
from ranksearch.errors import StudyError
from ranksearch.plan import Plan
from ranksearch.report import figures, points, summary, write_report
from ranksearch.results import pareto
from ranksearch.results.attributes import read_study
from ranksearch.results.choosing import choose, front_of
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import CurvePoint, Outcome, Result
from ranksearch.results.objectives import Objectives, prices
from ranksearch.strategy.finalists import choose_finalists
from ranksearch.strategy.space import size_of
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nets
from tests.books import FOUND, SPACE, Books, knowledge
from tests.conftest import essence, stored, tiny_spec
from tests.report_study import study_record

MINIMIZED = [("params",), ("macs",), ("params", "macs"), ("macs", "params")]
minimized = pytest.mark.parametrize("minimize", MINIMIZED, ids="+".join)
PLANS = [SPACE.smallest("params"), SPACE.smallest("macs"), Plan()]
RECORD = study_record()


def minimizing(*costs):
    """The made-up study, with these costs in `search.minimize`."""
    return replace(RECORD, facts=replace(RECORD.facts, spec={"search": {"trials": 45, "minimize": list(costs)}}))


def searching(*costs):
    """The spec of the small study, with these costs in `search.minimize`."""
    return tiny_spec(f"search.minimize={json.dumps(costs)}", "search.trials=6", "finalists.count=2")


# --- the objectives ---


@minimized
def test_the_dense_model_is_the_reference(minimize):
    whole = size_of(Plan(), FOUND)
    objectives = Objectives(minimize, FOUND.costs)
    assert objectives.point(0.5, whole) == (0.5, *objectives.reference)
    assert len(objectives.directions) == 1 + len(minimize)


@minimized
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_ratios_are_dense_cost_over_cost(minimize, plan):
    size = size_of(plan, FOUND)
    by_cost = {"params": FOUND.params / size.params, "macs": FOUND.macs / size.macs}
    objectives = Objectives(minimize, FOUND.costs)
    assert objectives.ratios(size) == pytest.approx([by_cost[cost] for cost in minimize])
    assert math.log(objectives.ratio(size)) == pytest.approx(sum(math.log(by_cost[c]) for c in minimize) / len(minimize))
    assert [objectives.only(cost).ratio(size) for cost in minimize] == pytest.approx([by_cost[cost] for cost in minimize])


@minimized
def test_two_costs_have_a_price_together_and_one_each(minimize):
    found = prices(minimize, FOUND)
    assert [price.of(FOUND) for price in found][-len(minimize) :] == [FOUND.costs[cost] for cost in minimize]
    if len(minimize) > 1:
        assert found[0].of(FOUND) == pytest.approx(2.0)


# --- fronts ---


@minimized
def test_a_front_equals_brute_force(minimize):
    record = minimizing(*minimize)
    objectives = record.facts.objectives
    pool = figures.finalists(record)
    values = {t.number: objectives.point(t.finalist.score_validation, t) for t in pool}

    def beaten(trial):
        own = values[trial.number]
        return any(all(a >= b for a, b in zip(v, own, strict=True)) and v != own for v in values.values())

    assert record.front == sorted((t for t in pool if not beaten(t)), key=objectives.ratio)
    assert set(record.front) >= set(front_of(pool, objectives.only(minimize[0])))


def test_fronts_of_other_costs_are_others():
    trials = [replace(trial, finalist=None) for trial in RECORD.trials]
    found = [{t.number for t in front_of(trials, Objectives(m, RECORD.facts.dense.costs))} for m in MINIMIZED[:3]]
    assert found[0] != found[1]
    assert found[0] | found[1] < found[2]


@minimized
def test_finalists_are_of_the_front_and_one_is_chosen(minimize):
    record = minimizing(*minimize)
    objectives = record.facts.objectives
    trials = [replace(trial, finalist=None) for trial in record.trials]
    chosen = choose_finalists(trials, record.facts.dense.score_validation, 4, UNLIMITED, objectives)
    assert len(chosen) == 4
    assert {t.number for t in chosen} <= {t.number for t in front_of(trials, objectives)}
    assert chosen == sorted(chosen, key=objectives.ratio)
    least = min(t.finalist.score_validation for t in record.front)
    assert choose(record.trials, objectives, dense_score=record.facts.dense.score_validation, min_score=least) == max(
        record.front, key=objectives.ratio
    )
    assert choose(record.trials, objectives, dense_score=record.facts.dense.score_validation) == figures.knee(
        record.front, objectives
    )


# --- the search ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minimize", "sampler"),
    [*((costs, "rank") for costs in MINIMIZED), *((MINIMIZED[2], sampler) for sampler in ("tpe", "nsga2", "random"))],
    ids=str,
)
def test_every_sampler_proposes_by_any_costs_and_resumes(minimize, sampler):
    whole, parts = (Books(sampler=sampler, minimize=minimize) for _ in range(2))
    whole.run(14)
    for trials in (5, 9, 14):
        parts.run(trials)
    assert [trial.plan for trial in whole.trained] == [trial.plan for trial in parts.trained]
    done = [trial for trial in whole.study.trials if trial.values]
    for trial in done:
        size = size_of(SPACE.plan(trial.params), FOUND)
        assert trial.values[1:] == pytest.approx([math.log10(x) for x in Objectives(minimize, FOUND.costs).ratios(size)])


@pytest.mark.slow
@settings(deadline=None, max_examples=2)
@given(st.integers(0, 99))
def test_what_is_minimised_gets_smaller(seed):
    """All plans have the same score, so only size counts."""
    sizes = {}
    for cost in ("params", "macs"):
        books = Books(sampler="rank", seed=seed, minimize=(cost,))
        ledger = books.ledger()
        for job in ledger.jobs(12):
            ledger.receive(job, Result(Outcome.DONE, (CurvePoint(0, 0.4), CurvePoint(1, 0.8))))
        sizes[cost] = min(getattr(trial, cost) for trial in ledger.records())
    assert sizes["params"] <= 1.5 * size_of(SPACE.smallest("params"), FOUND).params
    assert sizes["macs"] <= 1.5 * size_of(SPACE.smallest("macs"), FOUND).macs


def test_predicted_fronts_of_two_costs_differ():
    table = knowledge(minimize=("params", "macs")).table
    weights = [1.0] * len(table.layers)
    corners = [table.predicted_front(weights, at) for at in range(3)]
    sizes = [table.sizes(rows) for rows in corners]
    params, macs = ([np.array([size.costs[cost] for size in each]) for each in sizes] for cost in ("params", "macs"))
    # A front at the price of one cost saves more of that cost early on.
    assert len({rows.tobytes() for rows in corners}) == 3
    assert params[1].sum() / len(params[1]) <= params[2].sum() / len(params[2])
    assert macs[2].sum() / len(macs[2]) <= macs[1].sum() / len(macs[1])


# --- studies and reports ---


@pytest.mark.slow
@pytest.mark.parametrize("costs", [("macs",), ("params", "macs")], ids="+".join)
def test_a_study(costs, tmp_path, bare):
    spec = searching(*costs)
    found = run_study(spec, tmp_path, Options(Local(0)))
    study = stored(tmp_path)
    assert len(study.directions) == 1 + len(costs)
    assert study.metric_names == [
        "validation score",
        *({"params": "log10 ratio", "macs": "log10 MACs ratio"}[c] for c in costs),
    ]
    objectives = found.facts.objectives
    values = [objectives.point(t.score_validation, t) for t in found.front]
    assert len(pareto.front(values)) == len(values) > 0
    assert (
        essence(run_study(spec, tmp_path, Options(Local(0))).trials)
        == essence(found.trials)
        == essence(read_study(study).trials)
    )
    load_model(nets.small(), tmp_path / "models" / str(found.front[0].number))
    with pytest.raises(StudyError, match=r"is another study \(search.minimize is \[.*\] there and \['params'\] here\)"):
        run_study(tiny_spec(), tmp_path, Options(Local(0)))


@pytest.mark.parametrize("minimize", [("macs",), ("params", "macs")], ids="+".join)
def test_the_report_shows_the_front_against_each_cost(minimize, tmp_path):
    record = minimizing(*minimize)
    page = write_report(record, tmp_path).read_text()
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])
    costs = [*minimize, "latency"]  # which the finalists have whether or not it is minimised
    names = ["front", *(f"front-{cost}" for cost in costs[1:])]
    assert {name for name in charts if "front" in name} == {f"chart-{name}" for name in names}
    assert all(f'id="chart-{name}"' in page and (tmp_path / f"{name}.png").exists() for name in names)
    for name, cost in zip(names, costs, strict=True):
        rows = charts[f"chart-{name}"]["datasets"]["points"]
        drawn = {int(row["trial"]): row["ratio"] for row in rows if row["kind"] == points.FRONT}
        wanted = {t.number: record.facts.dense.costs[cost] / t.costs[cost] for t in record.front}
        assert drawn
        assert {number: wanted[number] for number in drawn} == pytest.approx(drawn)
    assert f"Front of accuracy against {summary.ratio_names(record)}" in page
    assert json.loads((tmp_path / "front.json").read_text())["minimize"] == list(minimize)


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        (
            ("params",),
            r"[\d.]+x smaller \([\d,]+ parameters instead of [\d,]+\) and [\d.]+x faster \([\d.]+ ms instead of [\d.]+ ms\), \d",
        ),
        (("macs",), r"[\d.]+x fewer MACs \([\d,]+ instead of [\d,]+\) and [\d.]+x faster \("),
        (
            ("params", "macs"),
            r"[\d.]+x smaller \([\d,]+ parameters instead of [\d,]+\), [\d.]+x fewer MACs \([\d,]+ instead of [\d,]+\) and [\d.]+x f",
        ),
    ],
)
def test_the_headline_says_how_much_smaller(costs, words):
    assert re.search(words, summary.headline(minimizing(*costs)))
