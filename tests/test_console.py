"""Progress on the screen: plain lines and the live view."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ranksearch import console
from ranksearch.plan import SVD, Plan
from ranksearch.results.messages import CurvePoint, Outcome
from tests.books import trial


def printed(renderable, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def test_the_front_stands_beside_the_dense_model(finished):
    _, record = finished
    text = printed(console.front_table(record.front, record.facts, title="the front"), width=180)
    assert "dense" in text
    for point in record.front:
        assert re.search(rf"^ *{point.number} +{point.ratio:.1f}x +{point.params:,}", text, re.MULTILINE)
        assert str(point.plan) in text


@pytest.mark.parametrize(
    ("costs", "words", "columns"),
    [
        (["params"], "{ratio:.1f}x, ", ["ratio", "parameters"]),
        (["macs"], "{macs:.1f}x MACs, ", ["MACs ratio", "parameters"]),
        (["params", "macs"], "{ratio:.1f}x, {macs:.1f}x MACs, ", ["ratio", "MACs ratio", "parameters"]),
    ],
)
def test_a_screen_names_the_ratios_that_are_minimised(finished, costs, words, columns):
    _, record = finished
    facts = replace(record.facts, spec={"search": {"minimize": costs}})
    point = record.front[0]
    expected = words.format(ratio=point.ratio, macs=facts.dense.macs / point.macs)
    assert console.short_outcome(point, facts).startswith(expected)
    assert f" {expected}" in console.trial_line(point, facts)
    heading, _, first, *_ = printed(console.front_table([point], facts), width=180).splitlines()
    assert re.match(r" *trial +" + " +".join(columns), heading)
    assert [float(found) for found in re.findall(r"([\d.]+)x ", first)[: len(costs)]] == pytest.approx(
        facts.objectives.ratios(point), abs=0.05
    )


def test_figures_survive_a_narrow_screen(finished):
    _, record = finished
    text = printed(console.front_table(record.front, record.facts), width=72)
    for point in record.front:
        assert f"{point.params:,}" in text


def test_a_live_view_draws_progress_and_front(finished):
    _, record = finished
    out = io.StringIO()
    screen = Console(file=out, force_terminal=True, width=120, height=40)
    with console.Terminal(screen) as view:
        view.stage("training the dense net", 2)
        view.step()
        view.step()
        view.facts(record.facts)
        view.stage("trials", 8, 2)
        view.curve_point("trial 7", CurvePoint(2, 0.931))
        view._live.refresh()
        view.trial(record.trials[0], record.trials[:1])
        view.trial(trial(9, None, 1.0, Outcome.OVER_BUDGET), record.trials[:1])
        view._live.refresh()
    text = out.getvalue()
    for words in ("training the dense net", "3/8", "left", "trial 7: epoch 2, 93.1 %", "front so far", "trial 9: over budget"):
        assert words in text


def test_plain_lines_for_every_kind_of_trial(finished):
    _, record = finished
    out = io.StringIO()
    view = console.Lines(Console(file=out, width=200))
    view.stage("trials", 8, 3)
    view.facts(record.facts)
    lost = trial(9, None, 1.0, Outcome.DIVERGED)
    again = replace(trial(12, 0.5, 2.0), same_as=3, costs={"params": record.facts.dense.params / 2, "macs": 100})
    done = next(t for t in record.trials if t.finalist)
    view.trial(done, record.trials)
    view.trial(lost, record.trials)
    view.curve_point("trial 10", CurvePoint(1, 0.4))
    view.trial(trial(11, None, 1.0, Outcome.OVER_BUDGET), record.trials)
    view.trial(again, record.trials)
    lines = out.getvalue().splitlines()
    assert lines[0] == "trials: 8 steps, 3 of them done by an earlier run"
    assert lines[1].startswith("dense: ")
    assert lines[2].startswith(f"finalist {done.number} [{done.origin}] {done.ratio:.1f}x, ")
    assert lines[3].startswith("trial 9 [tpe] diverged, 0.0 s: ")
    assert len(lines) == 5
    assert lines[4].startswith("trial 12 [tpe] 2.0x, 50.0 %, same plan as trial 3, 0.0 s: ")


def test_a_log_is_told_once_a_minute_how_far_a_long_stage_is(finished, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    view = console.Lines(Console(file=out, width=200))
    view.stage("training the dense net", 50, 10)
    for _ in range(4):
        now += 40
        view.step()
    view.facts(finished[1].facts)
    for epoch in range(4):
        now += 31
        view.curve_point("trial 3", CurvePoint(epoch, 0.5))
    assert out.getvalue().splitlines()[1:3] == ["training the dense net: 12 of 50", "training the dense net: 14 of 50"]
    assert out.getvalue().splitlines()[4:] == ["trial 3: epoch 1, 50.0 %", "trial 3: epoch 3, 50.0 %"]


def test_scores_and_clocks_for_people():
    assert console.score_text(0.9777, "accuracy") == "97.8 %"
    assert console.score_text(0.87654, "one_minus_auc") == "0.8765"
    assert console.score_text(None, "accuracy") == "-"
    assert [console.clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


@pytest.mark.parametrize("name", ["x[/bold]", "heads[left]", "enc:star:x"])
def test_names_of_layers_are_no_markup(finished, name):
    _, record = finished
    odd = replace(record.front[0], plan=Plan.of({name: SVD(2)}))
    assert f"{name} SVD 2" in printed(console.front_table([odd], record.facts, title="the front"), width=180)
    layer = replace(record.facts.layers[0], name=name)
    look = console.Look(layers=(layer,), account=(), permanent={}, params=100, macs=100, costs={}, trained=True)
    assert name in printed(console.layers_table(look), width=180)
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    with console.Terminal(screen) as view:
        view.facts(record.facts)
        view.stage("probing layers", 1)
        view.step(str(odd.plan))
        assert f"{name} SVD 2" in printed(view._render(), width=200)
        view.trial(odd, [odd])
        assert f"{name} SVD 2" in printed(view._render(), width=200)


def test_the_last_command_is_one_for_a_shell(finished):
    _, record = finished
    words = console.next_steps(Path("my runs/lenet"), record, "")
    assert words.endswith("ranksearch export 'my runs/lenet' --knee --format onnx")
