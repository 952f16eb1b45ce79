# SPDX-License-Identifier: BSD-3-Clause
"""Charts as inline SVG: no scripts, colors from the page's style sheet, a title and a description in each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_WIDTH = 860
_ROW = 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 270, 90, 16, 40
_LABEL = 40  # characters of the left margin
_NEAR = 22, 11  # pixels across and up within which marks share a label
_ids = itertools.count()

#: Marks differ in form too, so that they can be told apart without colors: unit polygons, ``None`` for a circle.
_FORMS: tuple[Sequence[tuple[float, float]] | None, ...] = (
    None,
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
    ((-1.1, -0.9), (1.1, -0.9), (0, 1.1)),
)


class Row(NamedTuple):
    """What a chart of rows shows beside one label: a value for each series, and a text behind them."""

    label: str
    values: Mapping[str, float]
    note: str = ""


class Point(NamedTuple):
    """A measured piece of work: operations per byte, GFLOP/s, the number it has in the table, and its name."""

    intensity: float
    gflops: float
    number: int
    name: str


class Roof(NamedTuple):
    """A bandwidth in GB/s, or with ``gbs=None`` a rate in GFLOP/s."""

    name: str
    gbs: float | None
    gflops: float


#: Names of what the values of rows belong to, each with the number of its color (``.series0`` and on) and form.
Series = Mapping[str, int]


def ratios(title: str, description: str, rows: Sequence[Row], series: Series) -> str:
    """Marks on a common logarithmic axis; 1 is a line. ``values`` are ratios."""
    values = [value for row in rows for value in row.values.values()]
    low, high = math.log2(min([0.9, *values]) * 0.97), math.log2(max([2.0, *values]) * 1.05)
    height = _TOP + _ROW * len(rows) + _BOTTOM

    def x(value: float) -> float:
        return _LEFT + (math.log2(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    ticks = [tick for tick in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 32) if low <= math.log2(tick) <= high]
    parts = [_vertical(x(tick), _TOP - 6, height - _BOTTOM, "axis" if tick == 1 else "grid") for tick in ticks]
    parts += [_text(x(tick), height - _BOTTOM + 18, f"{tick:g}x", "middle", "muted") for tick in ticks]
    for index, row in enumerate(rows):
        y = _TOP + _ROW * (index + 0.5)
        parts.append(_text(_LEFT - 12, y + 4, _shortened(row.label), "end"))
        for name, number in series.items():
            if name in row.values:
                value = row.values[name]
                parts.append(_mark(x(value), y, number, f"{row.label}, {name}: {value:.2f}x"))
        parts.append(_text(_WIDTH - 4, y + 4, row.note, "end", "muted"))
    legend = {name: _mark(7, 7, number) for name, number in series.items()}
    return _figure(title, description, height, parts, legend)


def bars(title: str, description: str, rows: Sequence[Row], series: Series, unit: str) -> str:
    """Stacked bars from zero."""
    height = _TOP + _ROW * len(rows) + _BOTTOM
    longest = max([sum(row.values.values()) for row in rows], default=0) or 1.0
    step = 10 ** math.floor(math.log10(longest))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2) if longest / (step * factor) <= 6)

    def x(value: float) -> float:
        return _LEFT + value / (1.04 * longest) * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for index in range(int(longest / step) + 1):
        parts.append(_vertical(x(index * step), _TOP - 6, height - _BOTTOM, "axis" if index == 0 else "grid"))
        label = f"{index * step:g}" + (f" {unit}" if index == 0 else "")
        parts.append(_text(x(index * step), height - _BOTTOM + 18, label, "middle", "muted"))
    for index, row in enumerate(rows):
        top, begin = _TOP + _ROW * index + 4, 0.0
        parts.append(_text(_LEFT - 12, top + 13, _shortened(row.label), "end"))
        for name, number in series.items():
            value = row.values.get(name, 0.0)
            if value > 0:
                what = escape(f"{row.label}, {name}: {value:.3g} {unit}")
                parts.append(
                    f'<rect x="{x(begin):.1f}" y="{top}" width="{x(begin + value) - x(begin):.1f}" height="{_ROW - 8}" '
                    f'class="series{number}"><title>{what}</title></rect>'
                )
                begin += value
        parts.append(_text(x(begin) + 6, top + 13, row.note, "start", "muted"))
    legend = {
        name: f'<rect y="1" width="12" height="12" class="series{number}"/>'
        for name, number in series.items()
        if len(series) > 1 and any(row.values.get(name) for row in rows)
    }
    return _figure(title, description, height, parts, legend)


def roofline(title: str, description: str, points: Sequence[Point], roofs: Sequence[Roof]) -> str:
    """GFLOP/s over operations per byte, both logarithmic, under the roofs."""
    height, left, right = 420, 60, 150
    peak = max(roof.gflops for roof in roofs)
    xs = [point.intensity for point in points]
    x_low, x_high = math.log2(min([0.5, *xs]) / 1.5), math.log2(max([64, *xs]) * 1.5)
    y_low, y_high = math.log2(min([peak / 8, *(point.gflops for point in points)]) / 1.5), math.log2(peak * 1.35)

    def x(value: float) -> float:
        return left + (math.log2(value) - x_low) / (x_high - x_low) * (_WIDTH - left - right)

    def y(value: float) -> float:
        return height - _BOTTOM - (math.log2(value) - y_low) / (y_high - y_low) * (height - _BOTTOM - 12)

    parts = []
    for power in range(math.ceil(x_low), math.floor(x_high) + 1):
        parts.append(_vertical(x(2**power), 12, height - _BOTTOM, "grid"))
        parts.append(_text(x(2**power), height - _BOTTOM + 16, f"{2.0**power:g}", "middle", "muted"))
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        parts.append(_line(left, y(2**power), _WIDTH - right, y(2**power), "grid"))
        parts.append(_text(left - 8, y(2**power) + 4, f"{2.0**power:g}", "end", "muted"))
    parts.append(_text(left + (_WIDTH - left - right) / 2, height - 6, "operations per byte moved", "middle", "muted"))
    parts.append(_text(4, 10, "GFLOP/s", "start", "muted"))
    for roof in roofs:
        if roof.gbs is None:
            parts.append(_line(left, y(roof.gflops), _WIDTH - right, y(roof.gflops), "roof"))
            parts.append(_text(_WIDTH - right + 8, y(roof.gflops) + 4, f"{roof.name}: {roof.gflops:.0f}", "start"))
    slopes = [roof for roof in roofs if roof.gbs is not None]
    for index, roof in enumerate(slopes):
        # From where the slope enters the frame to where it meets the highest rate.
        begin, end = max(x_low, y_low - math.log2(roof.gbs)), math.log2(peak / roof.gbs)
        if begin >= end:
            continue
        parts.append(_line(x(2**begin), y(roof.gbs * 2**begin), x(2**end), y(peak), "slope"))
        # The fastest has its name on the left of it, the others lower and on the right: two may be close.
        at = 2 ** (begin + (end - begin) * (0.8 - 0.25 * index))
        side, anchor = (-8, "end") if index == 0 else (8, "start")
        parts.append(_text(x(at) + side, y(roof.gbs * at) + 4, f"{roof.name}: {roof.gbs:.0f} GB/s", anchor, "muted"))
    for point in points:
        what = f"{point.name}: {point.gflops:.1f} GFLOP/s at {point.intensity:.1f} operations per byte"
        parts.append(_mark(x(point.intensity), y(point.gflops), 0, what))
    labels: list[tuple[float, float, list[int]]] = []
    for at_x, at_y, number in sorted((x(point.intensity), y(point.gflops), point.number) for point in points):
        near = next(
            (names for lx, ly, names in labels if abs(at_x - lx) < _NEAR[0] and abs(at_y - ly) < _NEAR[1]), None
        )
        if near is None:
            labels.append((at_x, at_y, [number]))
        else:
            near.append(number)
    parts += [_text(at_x, at_y + 20, _ranges(names), "middle", "number") for at_x, at_y, names in labels]
    return _figure(title, description, height, parts, {})


def _figure(title: str, description: str, height: float, parts: Sequence[str], legend: Mapping[str, str]) -> str:
    identity = f"chart{next(_ids)}"
    keys = "".join(
        f'<span class="key"><svg width="14" height="14" aria-hidden="true">{mark}</svg>{escape(name)}</span>'
        for name, mark in legend.items()
    )
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong><br>{escape(description)}</figcaption>"
        f'<div class="legend">{keys}</div><div class="scroll">'
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-labelledby="{identity} {identity}d">'
        f'<title id="{identity}">{escape(title)}</title><desc id="{identity}d">{escape(description)}</desc>'
        f"{''.join(parts)}</svg></div></figure>"
    )


def _shortened(label: str) -> str:
    """To what fits into the left margin."""
    return label if len(label) <= _LABEL else f"…{label[1 - _LABEL :]}"


def _ranges(numbers: Sequence[int]) -> str:
    """``[3, 1, 2, 5]`` as ``1-3, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>' if text else ""


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _vertical(x: float, y1: float, y2: float, kind: str) -> str:
    return _line(x, y1, x, y2, kind)


def _mark(x: float, y: float, number: int, what: str = "") -> str:
    title = f"<title>{escape(what)}</title>" if what else ""
    form = _FORMS[number % len(_FORMS)]
    if form is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="series{number}">{title}</circle>'
    corners = " ".join(f"{x + 5 * dx:.1f},{y + 5 * dy:.1f}" for dx, dy in form)
    return f'<polygon points="{corners}" class="series{number}">{title}</polygon>'
