"""The report's charts as Vega-Lite, which the reader's browser draws as SVG; the front also as PNG.

Colours are middle tones, visible on white and on black; the page's style sheet recolours text and lines in dark mode.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from ranksearch.report import figures, points, summary, text
from ranksearch.results.costs import COSTS, costs_of
from ranksearch.results.record import StudyRecord
from ranksearch.results.scores import is_percent

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY, INK = "#2563eb", "#d97706", "#059669", "#dc2626", "#9333ea", "#94a3b8", "#1f2937"

MAX_EPOCH_TICKS = 30
"""Maximum number of ticks on the axis of epochs; a finalist may have hundreds of epochs."""

_TRANSPARENT = "transparent"
# To the upper right of the point, where no line of a front runs.
_LABEL_STYLE: dict[str, Any] = {"align": "left", "dx": 7, "dy": -9, "fontSize": 11.5, "fontWeight": 600, "fill": INK}
# By kind of point: fill, stroke, shape, size, opacity.
_MARK_STYLES = {
    points.TRIAL: (GREY, GREY, "circle", 36, 0.75),
    points.VBMF: (ORANGE, ORANGE, "triangle-up", 90, 0.95),
    points.PREDICTED: (GREEN, GREEN, "triangle-down", 90, 0.95),
    points.FINALIST: ("#93b4f5", BLUE, "circle", 70, 0.9),
    points.FRONT: (BLUE, BLUE, "circle", 90, 1.0),
    points.TEST: (_TRANSPARENT, BLUE, "circle", 70, 1.0),
    points.CONTROL: (PURPLE, PURPLE, "square", 80, 0.95),
    points.DENSE: (INK, INK, "diamond", 130, 1.0),
}


@dataclass(frozen=True)
class Drawing:
    """A chart, and the rows it draws by name. They are separate because Altair copies and checks rows many times."""

    chart: alt.LayerChart
    rows: Mapping[str, Sequence[Mapping[str, Any]]]


def front_chart(record: StudyRecord, cost: str) -> Drawing:
    """Validation score against the ratio in one cost (log axis): trials, front, test scores, controls, dense model."""
    window = points.window(record, cost)
    dense = record.facts.dense.score_validation
    min_score, min_ratio = points.limit_lines(record, cost)
    rows = {
        "points": [row for row in points.front_points(record, cost) if row["score"] >= window.low],
        "labels": [row for row in points.front_labels(record, cost) if row["score"] >= window.low],
        "front": points.front_line(record, cost),
        "search": points.search_line(record, cost),
        "baseline": points.baseline_line(record, cost),
        "near": [{"score": dense, "low": dense - figures.NEAR_DENSE}],
        "min score": min_score,
        "min ratio": min_ratio,
    }
    x = alt.X(
        "ratio:Q",
        scale=alt.Scale(type="log", domain=window.ratios, nice=False),
        axis=_ratio_axis(window.ratios, COSTS[cost].ratio),
    )
    y = _score_y(record, (window.low, window.high))
    line: dict[str, Any] = {"interpolate": "step-before", "clip": True}
    layers = [
        _chart("near").mark_rect(fill=BLUE, opacity=0.07).encode(y, y2="low:Q"),
        _chart("near").mark_rule(stroke=GREY, strokeDash=[2, 3]).encode(y),
        _chart("min score").mark_rule(stroke=RED, strokeDash=[6, 3]).encode(y),
        _chart("min ratio").mark_rule(stroke=RED, strokeDash=[6, 3]).encode(x),
        _chart("baseline").mark_line(**line, stroke=GREEN, strokeWidth=1, opacity=0.6, strokeDash=[2, 3]).encode(x, y),
        _chart("search").mark_line(**line, stroke=BLUE, strokeWidth=1, opacity=0.35, strokeDash=[4, 3]).encode(x, y),
        _chart("front").mark_line(**line, stroke=BLUE, strokeWidth=2).encode(x, y),
        _chart("points")
        .mark_point(strokeWidth=1.6)
        .encode(x, y, tooltip=_tooltip(record, cost), **_styles_by_kind(rows["points"])),
        _chart("labels").mark_text(**_LABEL_STYLE).encode(x, y, text="text:N"),
    ]
    return Drawing(alt.LayerChart(layer=layers).properties(height=400), rows)


def hypervolume_chart(record: StudyRecord) -> Drawing:
    """Hypervolume of the search's front after each trial, with a mark at every trial that raised it."""
    rows = points.hypervolume_points(record)
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y("hypervolume:Q", title="hypervolume", axis=alt.Axis(tickCount=5))
    tooltip = ["trial:Q", "origin:N", alt.Tooltip("hypervolume:Q", format=".4f"), "plan:N"]
    line = _chart("all").mark_line(interpolate="step-after", stroke=BLUE, strokeWidth=2).encode(x, y)
    marks = _chart("raised").mark_point(filled=True, size=45, fill=BLUE, opacity=1).encode(x, y, tooltip=tooltip)
    chart = alt.LayerChart(layer=[line, marks]).properties(height=220)
    return Drawing(chart, {"all": rows, "raised": [row for row in rows if row["raised"]]})


def curves_chart(record: StudyRecord) -> Drawing:
    """Learning curves: score against epochs of fine-tuning, one line per trial and one more per finalist."""
    rows = points.curve_points(record)
    styles = {points.SEARCH: (GREY, 0.6), points.UNFINISHED: (ORANGE, 0.45), points.FINALIST: (BLUE, 0.95)}
    present = [kind for kind in styles if any(row["kind"] == kind for row in rows)]
    epochs = sorted({row["epochs"] for row in rows})
    axis = alt.Axis(values=epochs[:: math.ceil(len(epochs) / MAX_EPOCH_TICKS)], format="~g", labelOverlap=True)
    x = alt.X("epochs:Q", title="epochs of fine-tuning", scale=alt.Scale(type="sqrt", nice=False), axis=axis)
    y = _score_y(record, points.curve_domain(record))
    colour = alt.Color(
        "kind:N",
        sort=present,
        scale=alt.Scale(domain=present, range=[styles[kind][0] for kind in present]),
        legend=_legend(),
    )
    opacities = alt.Scale(type="ordinal", domain=present, range=[styles[kind][1] for kind in present])
    opacity = alt.Opacity("kind:N", sort=present, scale=opacities, legend=_legend())
    base = _chart("curves")
    lines = base.mark_line(strokeWidth=1.3, clip=True).encode(x, y, color=colour, opacity=opacity, detail="line:N")
    tooltip = ["trial:N", "origin:N", alt.Tooltip("epochs:Q", format="~g"), alt.Tooltip("text:N", title="score")]
    dots = base.mark_point(filled=True, size=28, clip=True).encode(x, y, color=colour, opacity=opacity, tooltip=tooltip)
    return Drawing(alt.LayerChart(layer=[lines, dots]).properties(height=260), {"curves": rows})


def layers_chart(record: StudyRecord) -> Drawing:
    """The predicted latency of each layer: one bar for the dense model, one for the model that the report names."""
    rows = points.layer_bars(record)
    models = list(dict.fromkeys(row["model"] for row in rows))
    y = alt.Y("layer:N", sort=None, title=None)
    x = alt.X("ms:Q", title="milliseconds", axis=alt.Axis(tickCount=6))
    colour = alt.Color("model:N", sort=models, scale=alt.Scale(domain=models, range=[GREY, BLUE]), legend=_legend())
    tooltip = ["layer:N", "model:N", alt.Tooltip("how:N", title="stored as"), alt.Tooltip("ms:Q", format=".3f")]
    bars = _chart("layers").mark_bar().encode(x, y, yOffset=alt.YOffset("model:N", sort=models), color=colour, tooltip=tooltip)
    return Drawing(alt.LayerChart(layer=[bars]).properties(height=alt.Step(14)), {"layers": rows})


def page_spec(drawing: Drawing) -> dict[str, Any]:
    """The chart as a Vega-Lite specification that fills the width of its HTML element."""
    return _spec(drawing.chart.properties(width="container"), drawing.rows, background=_TRANSPARENT)


def picture(record: StudyRecord, cost: str) -> bytes:
    """The front's chart against one cost as PNG, with a heading in place of the page's text."""
    window, facts = points.window(record, cost), record.facts
    title = f"{facts.name}: {facts.score_name} against {COSTS[cost].ratio}"
    below = f"; {text.with_noun(window.below, 'trial')} below {text.score(window.low, facts.score_name)} not shown"
    subtitle = summary.effort(record) + (below if window.below else "")
    return png(front_chart(record, cost), title=title, subtitle=subtitle)


def png(drawing: Drawing, *, title: str, subtitle: str) -> bytes:
    """The chart as PNG, about 900 pixels wide at twice the resolution."""
    heading = alt.TitleParams(title, subtitle=subtitle, anchor="start", offset=14, fontSize=15, subtitleColor="#6b7280")
    spec = _spec(drawing.chart.properties(width=820, title=heading), drawing.rows, background="white")
    return vl_convert.vegalite_to_png(json.dumps(spec), scale=2)


def _chart(rows: str) -> alt.Chart:
    """A chart of the rows with this name in its `Drawing`."""
    return alt.Chart(alt.NamedData(name=rows))


def _styles_by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fill, stroke, shape, size and opacity by kind of point; one legend for all, with only the kinds that occur."""
    present = [kind for kind in _MARK_STYLES if any(row["kind"] == kind for row in rows)]
    return {
        name: getattr(alt, name.capitalize())(
            "kind:N",
            sort=present,
            # Without the type "ordinal" Vega-Lite interpolates sizes between the first and the last of the range.
            scale=alt.Scale(type="ordinal", domain=present, range=[_MARK_STYLES[kind][index] for kind in present]),
            legend=_legend(),
        )
        for index, name in enumerate(("fill", "stroke", "shape", "size", "opacity"))
    }


def _legend() -> alt.Legend:
    columns = alt.ExprRef("width < 420 ? 2 : width < 640 ? 4 : 8")
    return alt.Legend(title=None, orient="bottom", columns=columns, symbolOpacity=1)


def _tooltip(record: StudyRecord, cost: str) -> list[alt.Tooltip]:
    name = record.facts.score_name
    titles = {
        "trial": "trial", "origin": "origin", "outcome": "outcome", "ratio_text": COSTS[cost].ratio,
        **{each.name: each.title for each in costs_of(record.facts.dense)},
        "validation": f"validation {name}", "test": f"test {name}",
        "plan": "plan",
    }  # fmt: skip
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in titles.items()]


def _ratio_axis(ratios: tuple[float, float], title: str) -> alt.Axis:
    """An axis with ticks at 1, 2, 5, 10 and so on; by default Vega labels 2, 3, 4, 5 on a logarithmic axis."""
    decades = range(math.floor(math.log10(ratios[0])), math.ceil(math.log10(ratios[1])) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    inside = [tick for tick in ticks if ratios[0] <= tick <= ratios[1]]
    return alt.Axis(values=inside, title=title, labelExpr="format(datum.value, ',~g') + 'x'", grid=False)


def _score_y(record: StudyRecord, domain: tuple[float, float]) -> alt.Y:
    name = record.facts.score_name
    label = "format(100 * datum.value, '.1~f') + ' %'" if is_percent(name) else "format(datum.value, '.3~f')"
    scale = alt.Scale(zero=False, nice=False, domain=domain)
    axis = alt.Axis(labelExpr=label, tickCount=7, tickMinStep=0.001)
    return alt.Y("score:Q", title=f"validation {name}", scale=scale, axis=axis)


def _spec(chart: alt.LayerChart, rows: Mapping[str, Any], *, background: str) -> dict[str, Any]:
    """The Vega-Lite specification of a chart with its rows, in the report's style."""
    styled = (
        chart.configure(font=FONT, background=background, padding={"left": 4, "right": 12, "top": 8, "bottom": 4})
        .configure_view(stroke=None)
        .configure_axis(
            gridColor="#e5e7eb", domainColor="#9ca3af", tickColor="#9ca3af", labelColor="#4b5563", titleColor="#4b5563",
            labelFontSize=11, titleFontSize=12, titleFontWeight="normal", titlePadding=8,
        )
        .configure_legend(labelColor="#4b5563", labelFontSize=11.5, symbolSize=70, columnPadding=14)
    )  # fmt: skip
    return styled.to_dict() | {"datasets": dict(rows)}
