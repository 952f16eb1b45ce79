# SPDX-License-Identifier: BSD-3-Clause
"""The demo as one picture: the photographs with their answers above a bar chart of the times. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ._demo_results import ENGINES, Answer, class_name

_TEXT, _MUTED, _LINE = "#24292f", "#57606a", "#d0d7de"
_RIGHT, _IN_TOP_5, _WRONG = "#1a7f37", "#b35900", "#cf222e"
_BARS = {"unfused": "#afb8c1", "fused": "#54aeff", "frozen": "#0969da"}

_MOST_PHOTOS = 35
_PHOTO_PIXELS = 260
_DPI = 130
# Inches.
_MARGIN, _HEADER, _TILE, _GAP, _CAPTION, _CHART, _FOOTER = 0.35, 1.05, 1.8, 0.15, 0.55, 1.5, 0.6
# Characters that fit below a tile.
_NAME_LENGTH, _LABEL_LENGTH = 24, 22


def draw(path: Path, answers: Sequence[Answer], names: Sequence[str], results: dict[str, Any], machine: str) -> None:
    """Write the picture to ``path``; of more than 35 photographs it shows the first 35."""
    shown = answers[:_MOST_PHOTOS]
    columns = max(5, math.ceil(math.sqrt(2.2 * len(shown))))
    rows = math.ceil(len(shown) / columns)
    width = 2 * _MARGIN + columns * (_TILE + _GAP) - _GAP
    height = _HEADER + rows * (_TILE + _CAPTION) + _MARGIN + _CHART + _FOOTER
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def box(left: float, top: float, box_width: float, box_height: float) -> tuple[float, float, float, float]:
        """Inches from the upper left corner as the fractions that matplotlib wants."""
        return left / width, 1 - (top + box_height) / height, box_width / width, box_height / height

    def text(top: float, content: str, **style: Any) -> None:
        figure.text(_MARGIN / width, 1 - top / height, content, va="top", **style)

    text(0.28, _headline(results), fontsize=16, weight="bold", color=_TEXT)
    text(0.65, machine, fontsize=10.5, color=_MUTED)
    for index, answer in enumerate(shown):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * (_TILE + _GAP), _HEADER + row * (_TILE + _CAPTION)
        _draw_photo(figure.add_axes(box(left, top, _TILE, _TILE)), answer, names)
    chart_top = _HEADER + rows * (_TILE + _CAPTION) + _MARGIN
    _draw_times(figure.add_axes(box(_MARGIN + 0.75, chart_top, width - 2 * _MARGIN - 0.75, _CHART)), results)
    difference = f"{results['largest_difference']:.1e}"
    note = (
        f"Time of one photograph. Largest difference of a logit from the unfused network (torch eager): {difference}."
    )
    text(height - _FOOTER + 0.15, note, fontsize=10.5, color=_MUTED)
    figure.savefig(path)


def _headline(results: dict[str, Any]) -> str:
    speed = f"{results['speedup']['frozen']:.2f}x the speed of torch eager"
    labelled = results["labelled"]
    if not labelled:
        return f"MobileNetV1: {speed}"
    return f"MobileNetV1: top-1 {results['top1']} of {labelled}, top-5 {results['top5']} of {labelled}, {speed}"


def _draw_photo(axes: Axes, answer: Answer, names: Sequence[str]) -> None:
    axes.imshow(ImageOps.fit(answer.photo.image, (_PHOTO_PIXELS, _PHOTO_PIXELS), Image.Resampling.LANCZOS))
    axes.set_xticks([])
    axes.set_yticks([])
    label = answer.photo.label
    color = _TEXT if label is None else _RIGHT if answer.rank == 1 else _IN_TOP_5 if answer.rank else _WRONG
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(2)
    name = _clip(class_name(answer.classes[0], names), _NAME_LENGTH)
    below = f"{answer.probability:.0%}"
    if label is not None and answer.rank != 1:
        below += f", is {_clip(class_name(label, names), _LABEL_LENGTH)}"
    axes.text(0, -0.04, name, transform=axes.transAxes, va="top", fontsize=9, weight="bold", color=color)
    axes.text(0, -0.14, below, transform=axes.transAxes, va="top", fontsize=8.5, color=_MUTED)


def _draw_times(axes: Axes, results: dict[str, Any]) -> None:
    medians = [results["median_ms"][engine] for engine in ENGINES]
    axes.barh(ENGINES, medians, color=[_BARS[engine] for engine in ENGINES], height=0.68)
    for position, (engine, median) in enumerate(zip(ENGINES, medians, strict=True)):
        speed = f"   {results['speedup'][engine]:.2f}x" if engine in results["speedup"] else ""
        axes.annotate(
            f"{median:.1f} ms{speed}",
            (median, position),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
            weight="bold",
            color=_TEXT,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(medians))
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=12, length=0, labelcolor=_TEXT)
    for side in ("right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_LINE)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
