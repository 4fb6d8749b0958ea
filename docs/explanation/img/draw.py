"""Draws the pictures of docs/explanation: `python docs/explanation/img/draw.py` writes them beside this file.

They have a light panel of their own, so they read the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

INK, SOFT, PANEL = "#333b45", "#8a94a0", "#fbfbfa"
BLUE, ORANGE, GREEN, PALE = "#3b73b9", "#d9792b", "#4c956c", "#e9edf2"
FONT = "font-family='system-ui, sans-serif'"


def text(x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: str = "middle", style: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{fill}' text-anchor='{anchor}' {FONT} {style}>{words}</text>"


def line(points: list[tuple[float, float]], *, stroke: str = INK, width: float = 1.5, dash: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f" stroke-dasharray='{dash}'" if dash else ""
    return f"<polyline points='{path}' fill='none' stroke='{stroke}' stroke-width='{width}'{dashed}/>"


def box(x: float, y: float, width: float, height: float, *, fill: str, stroke: str = INK) -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}' stroke='{stroke}' stroke-width='1'/>"


def picture(width: float, height: float, title: str, parts: list[str]) -> str:
    frame = f"<rect width='{width:g}' height='{height:g}' rx='8' fill='{PANEL}' stroke='#d8dde3'/>"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' role='img'>"
    return "\n".join([head, f"<title>{title}</title>", frame, *parts, "</svg>", ""])


@dataclass(frozen=True)
class Conv:
    """One convolution of a row: how many rows and columns its kernel has, what it is called, and its parameters."""

    rows: int
    columns: int
    name: str
    params: str
    depthwise: bool = False


SIDE, SLANT, CELL = 52.0, 0.45, 11.0
"""The side of a map, the rise of its depth, and the side of a kernel's cell."""
DEPTHS = {"S": 40.0, "T": 48.0}
"""How deep a map with so many channels is drawn; R and its like are small."""


def cuboid(x: float, y: float, depth: float) -> str:
    """A map whose channels go back; (x, y) is the lower left corner of its front."""
    rise = depth * SLANT
    corners = [
        [(x, y - SIDE), (x + depth, y - SIDE - rise), (x + depth + SIDE, y - SIDE - rise), (x + SIDE, y - SIDE)],
        [(x + SIDE, y - SIDE), (x + SIDE + depth, y - SIDE - rise), (x + SIDE + depth, y - rise), (x + SIDE, y)],
    ]
    faces = [
        f"<polygon points='{' '.join(f'{a:.1f},{b:.1f}' for a, b in face)}' fill='{shade}' stroke='{INK}' stroke-width='1'/>"
        for face, shade in zip(corners, ("#f4f6f9", "#d5dde7"), strict=True)
    ]
    return "\n".join([*faces, box(x, y - SIDE, SIDE, SIDE, fill=PALE)])


def kernel(x: float, y: float, conv: Conv) -> list[str]:
    """A grid of 3 x 3 cells around (x, y), those filled that the kernel covers."""
    colour, parts = ORANGE if conv.depthwise else BLUE, []
    for row in range(3):
        for column in range(3):
            inside = (conv.rows == 3 or row == 1) and (conv.columns == 3 or column == 1)
            left, top = x + (column - 1.5) * CELL, y + (row - 1.5) * CELL
            parts.append(box(left, top, CELL, CELL, fill=colour if inside else "white", stroke=SOFT))
    parts.append(text(x, y - 2.6 * CELL, conv.name, fill=colour))
    if conv.depthwise:
        parts.append(text(x, y - 4.0 * CELL, "depthwise", size=11, fill=colour))
    return [*parts, text(x, y + 3.1 * CELL, conv.params, size=12)]


def row_of(title: str, channels: list[str], convs: list[Conv]) -> str:
    """Maps with these channels, and between them these convolutions."""
    base, x, parts = 106.0, 24.0, []
    for number, name in enumerate(channels):
        depth = DEPTHS.get(name, 13.0)
        parts += [cuboid(x, base, depth), text(x + SIDE / 2, base + 20, name, size=14, style="font-style='italic'")]
        x += SIDE + depth
        if number < len(convs):
            parts.append(line([(x + 5, base - 30), (x + 16, base - 30)], stroke=SOFT))
            parts += kernel(x + 44, base - 30, convs[number])
            parts.append(line([(x + 72, base - 30), (x + 84, base - 30)], stroke=SOFT))
            x += 92
    return picture(x + 24, 142, title, parts)


def rows() -> dict[str, str]:
    one, small = Conv(1, 1, "1 x 1", ""), "R"

    def full(params: str, rows: int = 3, columns: int = 3, depthwise: bool = False) -> Conv:
        name = {(3, 3): "d x d", (3, 1): "d x 1", (1, 3): "1 x d", (1, 1): one.name}[rows, columns]
        return Conv(rows, columns, name, params, depthwise)

    return {
        "dense": row_of("A dense convolution", ["S", "T"], [full("S T d²")]),
        "svd": row_of("SVD of a 1 x 1 convolution", ["S", "R", "T"], [full("S R", 1, 1), full("R T", 1, 1)]),
        "spatial": row_of("Spatial SVD", ["S", small, "T"], [full("S R d", 3, 1), full("R T d", 1, 3)]),
        "tucker2": row_of(
            "Tucker-2", ["S", "R₁", "R₂", "T"], [full("S R₁", 1, 1), full("R₁ R₂ d²"), full("R₂ T", 1, 1)]
        ),
        "cp": row_of(
            "CP with merged kernel modes", ["S", "R", "R", "T"],
            [full("S R", 1, 1), full("R d²", depthwise=True), full("R T", 1, 1)],
        ),
        "cp4": row_of(
            "CP-4, the TD block", ["S", "R", "R", "R", "T"],
            [full("S R", 1, 1), full("R d", 3, 1, True), full("R d", 1, 3, True), full("R T", 1, 1)],
        ),
        "tt": row_of(
            "Tensor train", ["S", "R₁", "R₂", "R₃", "T"],
            [full("S R₁", 1, 1), full("R₁ R₂ d", 3, 1), full("R₂ R₃ d", 1, 3), full("R₃ T", 1, 1)],
        ),
    }  # fmt: skip


def axes(x: float, y: float, width: float, height: float, below: str, beside: str) -> list[str]:
    """Two axes whose corner is (x, y), with their names."""
    middle = y - height / 2
    return [
        line([(x, y - height), (x, y), (x + width, y)]),
        text(x + width / 2, y + 20, below, fill=SOFT),
        text(x - 12, middle, beside, fill=SOFT, style=f"transform='rotate(-90 {x - 12:g} {middle:g})'"),
    ]


def spectrum() -> str:
    """Singular values: a few of the signal above the bulk of the noise."""
    values = [3.6, 2.9, 2.45, 2.1, 1.75] + [1.25 * math.sqrt(1 - (i / 34) ** 1.3) * 0.97 + 0.04 for i in range(30)]
    parts = axes(54, 190, 430, 160, "singular values, the largest first", "size")
    for number, value in enumerate(values):
        colour = BLUE if number < 5 else SOFT
        parts.append(box(60 + 12 * number, 190 - 42 * value, 8, 42 * value, fill=colour, stroke="none"))
    parts.append(line([(54, 190 - 42 * 1.5), (484, 190 - 42 * 1.5)], stroke=ORANGE, dash="5 4"))
    parts += [
        text(478, 190 - 42 * 1.5 - 8, "threshold, from the shape and the noise's variance", fill=ORANGE, anchor="end"),
        text(112, 40, "signal: the rank is 5", fill=BLUE, anchor="start"),
        text(478, 190 - 42 * 1.0 - 4, "noise", anchor="end", fill=INK),
    ]
    return picture(510, 226, "A spectrum with signal and noise, and the threshold of VBMF", parts)


def whitening() -> str:
    """Two errors of equal length: one along the inputs, one across them."""
    parts = []
    for x, title, radii, angle in ((130, "inputs of the layer", (92, 26), -30), (390, "whitened", (56, 56), 0)):
        ellipse = f"<ellipse cx='{x}' cy='116' rx='{radii[0]}' ry='{radii[1]}' transform='rotate({angle} {x} 116)'"
        parts += [f"{ellipse} fill='{PALE}' stroke='{SOFT}'/>", text(x, 26, title)]
    for x, scales in ((130, (50, 50)), (390, (88, 15))):
        for scale, turn, colour in ((scales[0], -30, ORANGE), (scales[1], 60, BLUE)):
            end = (x + scale * math.cos(math.radians(turn)), 116 + scale * math.sin(math.radians(turn)))
            parts.append(line([(x, 116), end], stroke=colour, width=3))
            parts.append(f"<circle cx='{end[0]:.1f}' cy='{end[1]:.1f}' r='4' fill='{colour}'/>")
    parts += [
        line([(236, 116), (296, 116)], stroke=SOFT), text(266, 106, "times L", size=12, fill=SOFT),
        text(260, 212, "Two errors of the same size in the weights. The orange one meets large inputs, and counts.", size=12),
    ]  # fmt: skip
    return picture(520, 230, "Errors of weights before and after whitening", parts)


def hulls() -> str:
    """The candidates of two layers, their lower hulls, and the front that merges the edges of both."""
    layers = {
        "layer 1": (BLUE, [(0, 0), (30, 6), (52, 12), (74, 22), (92, 44), (104, 96)], [(40, 22), (64, 40), (84, 60)]),
        "layer 2": (GREEN, [(0, 0), (26, 14), (48, 34), (64, 62), (76, 104)], [(20, 30), (38, 48), (58, 80)]),
    }
    parts, edges = [], []
    for number, (name, (colour, hull, others)) in enumerate(layers.items()):
        x, y = 50 + 180 * number, 170
        parts += [*axes(x, y, 130, 130, "saved cost", "loss increase"), text(x + 65, 28, name, fill=colour)]
        parts += [f"<circle cx='{x + a}' cy='{y - b}' r='3' fill='white' stroke='{SOFT}'/>" for a, b in others]
        parts.append(line([(x + a, y - b) for a, b in hull], stroke=colour, width=2))
        parts += [f"<circle cx='{x + a}' cy='{y - b}' r='3.5' fill='{colour}'/>" for a, b in hull]
        edges += [((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0], b[1] - a[1], colour) for a, b in pairwise(hull)]
    x, y = 410.0, 170.0
    parts += [*axes(x, y, 190, 130, "saved cost", "loss increase"), text(x + 95, 28, "both: edges by their slope")]
    at = (x, y)
    for _, across, up, colour in sorted(edges):
        end = (at[0] + across, at[1] - 0.62 * up)
        parts += [
            line([at, end], stroke=colour, width=2.5),
            f"<circle cx='{end[0]:.1f}' cy='{end[1]:.1f}' r='3' fill='{INK}'/>",
        ]
        at = end
    return picture(640, 206, "The predicted front of two layers", parts)


def drawings() -> dict[str, str]:
    """Every picture by its file's name."""
    found = rows() | {"vbmf": spectrum(), "whitening": whitening(), "front": hulls()}
    return {f"{name}.svg": drawn for name, drawn in found.items()}


if __name__ == "__main__":
    for name, drawn in drawings().items():
        Path(__file__).with_name(name).write_text(drawn, encoding="utf-8")
