# SPDX-License-Identifier: BSD-3-Clause
"""Draw how long other engines take for whole networks, beside frozen; one panel for each number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import PEER_LABELS, best_ms

from fusedsep.cli._output import machine_line

_TEXT, _MUTED, _LINE = "#24292f", "#57606a", "#d0d7de"
#: Color and mark of each engine, which differ both.
_MARKS = {
    "eager": ("#57606a", "s"),
    "compiled": ("#1a7f37", "v"),
    "onnxruntime": ("#bc4c00", "D"),
    "openvino": ("#8250df", "^"),
    "frozen": ("#0969da", "o"),
}
# Inches.
_WIDTH, _ROW, _HEADER, _FOOTER, _LEFT, _GAP, _RIGHT = 9.5, 0.24, 1.3, 0.55, 1.35, 0.25, 0.25


def draw(documents: list[dict[str, Any]], path: Path) -> None:
    """Write the picture to ``path``: times over those of frozen, on a logarithmic axis."""
    first = documents[0]
    names = [result["name"] for result in first["results"]]
    height = _HEADER + _ROW * len(names) + _FOOTER
    panel = (_WIDTH - _LEFT - _RIGHT - _GAP * (len(documents) - 1)) / len(documents)
    # Text as text keeps the file small; no date and a fixed salt make the same file of the same numbers.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusedsep"}):
        figure = Figure(figsize=(_WIDTH, height), dpi=130, facecolor="white")
        left = 0.3 / _WIDTH
        title = f"{first['results'][0]['network']}: other engines beside fusedsep.freeze"
        figure.text(left, 1 - 0.25 / height, title, va="top", fontsize=14, weight="bold", color=_TEXT)
        subtitle = machine_line(first["machine"]).replace(", 1 thread", "")
        figure.text(left, 1 - 0.58 / height, subtitle, va="top", fontsize=9.5, color=_MUTED)
        for index, document in enumerate(documents):
            place = (_LEFT + index * (panel + _GAP)) / _WIDTH, _FOOTER / height, panel / _WIDTH
            axes = figure.add_axes((*place, 1 - (_HEADER + _FOOTER) / height))
            _draw_panel(axes, document, names, with_names=index == 0)
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(0.21 / _WIDTH, 1 - 0.78 / height),
            borderaxespad=0,
            ncols=len(_MARKS),
            frameon=False,
            fontsize=9,
            labelcolor=_TEXT,
            handletextpad=0.1,
        )
        figure.text(
            0.5,
            0.12 / height,
            "times as long as frozen, each in the memory format that suits it better",
            ha="center",
            fontsize=9,
            color=_MUTED,
        )
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw_panel(axes: Axes, document: dict[str, Any], names: list[str], with_names: bool) -> None:
    rows = {name: row for row, name in enumerate(names)}
    for engine, (color, mark) in _MARKS.items():
        points = [
            (best_ms(result, engine) / best_ms(result, "frozen"), rows[result["name"]])
            for result in document["results"]
            if any(variant.split()[0] == engine for variant in result["times"])
        ]
        if points:
            label = PEER_LABELS[engine] if engine != "frozen" else "fusedsep.freeze"
            axes.scatter(*zip(*points, strict=True), s=30, color=color, marker=mark, label=label, zorder=3)
    threads = document["machine"]["threads"]
    axes.set_title(f"{threads} thread{'s' * (threads > 1)}", fontsize=10, color=_TEXT, loc="left")
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(names)), names if with_names else [""] * len(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_TEXT)
    axes.grid(axis="both", color=_LINE, linewidth=0.6)
    axes.axvline(1, color=_MUTED, linewidth=1.2)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
