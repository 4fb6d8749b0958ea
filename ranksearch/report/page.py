"""`report.html`: one page that contains its data, charts and scripts, and needs no network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from ranksearch.plan import Dense, Factorization
from ranksearch.report import charts, figures, points, summary, text
from ranksearch.report.pictures import Row
from ranksearch.results.costs import COSTS
from ranksearch.results.record import LayerFacts, StudyRecord
from ranksearch.results.scores import is_percent
from ranksearch.results.trials import TrialRecord


def html(record: StudyRecord, folder: Path, drawn: Sequence[Row] = ()) -> str:
    """The page of the study in `folder` as HTML, with the pictures `drawn`.

    All text from the record is escaped, in the page and in the charts' data.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("template.html")
    return template.render(**_context(record, folder), drawn=drawn, bundle=_bundle(), font=charts.FONT)


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; building it takes about a second."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _context(record: StudyRecord, folder: Path) -> dict[str, Any]:
    facts, name = record.facts, record.facts.score_name
    window = points.window(record, facts.objectives.minimize[0])  # its scores are the same for every cost
    return {
        "facts": facts,
        "headline": _glue_percent_signs(summary.headline(record)),
        "near": best.number if (best := figures.near_dense(record)) else None,
        "exports": {trial.number: summary.export_command(record, trial, folder) for trial in record.shown},
        "against_controls": _glue_percent_signs(summary.against_controls(record)),
        "no_scores": summary.no_scores(record),
        "cards": _cards(record),
        "charts": _charts(record),
        "dense": summary.dense_line(record),
        "front": summary.front_lines(record),
        "controls": summary.control_lines(record),
        "controls_note": summary.controls_note(record),
        "finalists": len(figures.finalists(record)),
        "timing_head": summary.timing_head(record),
        "timing_rows": summary.timing_rows(record),
        "timing_note": summary.timing_note(record) if facts.dense.timings else "",
        "gain": figures.hypervolume_gain(record),
        "notes": record.notes,
        "limits": str(facts.limits),
        "trials": text.with_noun(len(figures.trained(record.trials)), "trial"),
        "below": window.below,
        "lowest_score": text.score(window.low, name),
        "ratio_names": summary.ratio_names(record),
        "minimized": [COSTS[cost] for cost in facts.objectives.minimize],
        "costs": summary.shown_costs(record),
        "pictures": {name: _element_id(name) for name in summary.pictures(record)},
        "log_ratios": ", ".join(f"log10 of the {COSTS[cost].ratio}" for cost in facts.objectives.minimize),
        "near_margin": text.margin(figures.NEAR_DENSE, name),
        "worst_that_counts": summary.worst_that_counts(record),
        "score_unit": "points" if is_percent(name) else name,
        "rank_rows": _rank_rows(record),
        "correlations": _correlations(record),
        "unfinished": summary.unfinished(record),
        "layers": [_layer(layer, facts.dense.params) for layer in facts.layers],
        "account": summary.account_lines(record),
        "narrow": summary.narrow_lines(record),
        "settings": summary.settings(facts.spec),
        "stages": [(stage, text.duration(seconds)) for stage, seconds in record.seconds.items()],
        "total": text.duration(sum(record.seconds.values())),
    }


def _charts(record: StudyRecord) -> dict[str, Any]:
    """The charts that have data, by the id of their HTML element."""
    drawings = {_element_id(name): charts.front_chart(record, cost) for name, cost in summary.pictures(record).items()}
    if figures.scored(record.trials):
        drawings["chart-hypervolume"] = charts.hypervolume_chart(record)
    if points.curve_points(record):
        drawings["chart-curves"] = charts.curves_chart(record)
    if points.layer_bars(record):
        drawings["chart-layers"] = charts.layers_chart(record)
    return {name: charts.page_spec(drawing) for name, drawing in drawings.items()}


def _element_id(picture: str) -> str:
    """Id of the HTML element for the chart that the picture file also shows."""
    return f"chart-{Path(picture).stem}"


def _cards(record: StudyRecord) -> list[dict[str, str]]:
    """The cards at the top of the page: a title, a figure, and a line below it."""
    facts, name = record.facts, record.facts.score_name
    best = figures.near_dense(record)
    at_knee = figures.knee(record.shown, facts.objectives)
    dense = f"{text.count(facts.dense.params)} parameters, {text.score(facts.dense.score_test, name)} on test"
    finalists, trials = len(figures.finalists(record)), len(figures.trained(record.trials))
    work = f"in {text.duration(sum(record.seconds.values()))}; "
    work += f"{text.with_noun(finalists, 'finalist')}, " if finalists else ""
    return [
        {
            "title": f"Dense {name}",
            "figure": text.score(facts.dense.score_validation, name),
            "line": _glue_percent_signs(dense),
        },
        _trial_card(record, f"Within {text.margin(figures.NEAR_DENSE, name)} of dense", best),
        _trial_card(record, "Knee of the front", at_knee),
        {"title": "Trials", "figure": f"{trials:,}", "line": f"{work}{len(record.front)} on the front"},
    ]


def _trial_card(record: StudyRecord, title: str, trial: TrialRecord | None) -> dict[str, str]:
    if trial is None:
        return {"title": title, "figure": text.NO_VALUE, "line": "no model yet"}
    name = record.facts.score_name
    test = f", {text.score(trial.finalist.score_test, name)} on test" if trial.finalist else ""
    (figure, words), *others = summary.ratio_words(record, trial)
    ratios = " and ".join([words, *(f"{other} {its_words}" for other, its_words in others)])
    line = f"{ratios}, trial {trial.number}: {text.score(trial.score_validation, name)} on validation{test}"
    return {"title": title, "figure": figure, "line": _glue_percent_signs(line)}


def _glue_percent_signs(words: str) -> str:
    """Put a no-break space before every per cent sign, so that no line begins with one."""
    return words.replace(" %", "\N{NO-BREAK SPACE}%")


def _rank_rows(record: StudyRecord) -> list[dict[str, Any]]:
    """One row per layer: its VBMF ranks, and its factorization in each trial of the front. Above them the nets' widths."""
    rows = []
    if record.facts.narrow:
        widths = [{"title": "width", "ranks": f"{trial.plan.width:g}", "method": "width"} for trial in record.shown]
        rows.append({"name": "net", "vbmf": "", "cells": [{**cell, "depth": "0"} for cell in widths]})
    for layer in record.facts.layers:
        chosen = [trial.plan[layer.name] for trial in record.shown]
        largest = max((_mean_rank(value) for value in chosen), default=0)
        cells = [_rank_cell(value, largest) for value in chosen]
        rows.append({"name": layer.name, "vbmf": _vbmf(layer), "cells": cells})
    return rows


def _rank_cell(value: Factorization, largest: float) -> dict[str, str]:
    """Text and shade of one cell; the square root makes small ranks distinguishable."""
    if isinstance(value, Dense):
        return {"title": "dense", "ranks": "", "method": "dense", "depth": "1"}
    depth = 0.15 + 0.85 * math.sqrt(_mean_rank(value) / largest)
    ranks = "x".join(map(str, value.ranks))
    return {"title": value.title, "ranks": ranks, "method": value.method, "depth": f"{depth:.2f}"}


def _mean_rank(value: Factorization) -> float:
    return math.prod(value.ranks) ** (1 / len(value.ranks)) if value.ranks else 0.0


def _vbmf(layer: LayerFacts) -> str:
    return " x ".join(text.NO_VALUE if rank is None else str(rank) for rank in layer.vbmf)


def _layer(layer: LayerFacts, dense_params: int) -> dict[str, str]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "params": text.count(layer.params),
        "share": text.share(layer.params / dense_params),
        "macs": text.count(layer.macs),
        "vbmf": _vbmf(layer),
    }


def _correlations(record: StudyRecord) -> list[dict[str, str]]:
    last = max((curve_point.epochs for trial in figures.scored(record.trials) for curve_point in trial.curve), default=0)
    return [
        *_correlation_rows(figures.curve_correlations(record), f"score after {last:g} epochs"),
        *_correlation_rows(figures.finalist_correlations(record), "score as a finalist"),
    ]


def _correlation_rows(correlations: Sequence[figures.Correlation], target: str) -> list[dict[str, str]]:
    return [
        {
            "epochs": f"{entry.epochs:g}",
            "target": target,
            "trials": str(entry.trials),
            "value": f"{entry.value:.2f}",
        }
        for entry in correlations
    ]
