# SPDX-License-Identifier: BSD-3-Clause
"""The training demo as one picture: losses and test accuracies of both twins. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ._demo_training import TWINS, Twin

_TEXT, _MUTED, _LINE = "#24292f", "#57606a", "#d0d7de"
# The one below is wide and pale, so that it shows where both agree.
_STYLES = {"unfused": {"color": "#afb8c1", "linewidth": 4.5}, "fused": {"color": "#0969da", "linewidth": 1.4}}


def draw(path: Path, twins: dict[str, Twin], results: dict[str, Any], machine: str) -> None:
    """Write the picture to ``path``."""
    figure = Figure(figsize=(11, 5.4), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    accuracy, saved, step = (results[name] for name in ("accuracy", "saved_bytes", "median_step_ms"))
    headline = (
        f"MobileNetV1 on handwritten digits: {accuracy['unfused']:.1%} unfused, {accuracy['fused']:.1%} fused, "
        f"a step in {step['unfused']:.1f} and {step['fused']:.1f} ms"
    )
    figure.text(0.04, 0.96, headline, va="top", fontsize=14, weight="bold", color=_TEXT)
    figure.text(0.04, 0.895, machine, va="top", fontsize=10, color=_MUTED)
    losses, accuracies = figure.add_axes((0.07, 0.16, 0.5, 0.65)), figure.add_axes((0.65, 0.16, 0.31, 0.65))
    for name in TWINS:
        loss = np.asarray(twins[name].losses)
        losses.plot(np.arange(1, len(loss) + 1), loss, label=name, **_STYLES[name])
        points = twins[name].accuracies
        accuracies.plot(np.arange(1, len(points) + 1), points, label=name, **_STYLES[name])
    losses.set_yscale("log")
    _finish(losses, "loss of each batch", "step")
    _finish(accuracies, "accuracy on the test digits", "epoch")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    note = (
        f"Largest difference of the first losses: {results['largest_difference_of_first_losses']:.1e}. Saved for the "
        f"backward: {saved['unfused'] / 2**20:.1f} MiB unfused, {saved['fused'] / 2**20:.1f} MiB fused."
    )
    figure.text(0.04, 0.025, note, fontsize=10, color=_MUTED)
    figure.savefig(path)


def _finish(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_TEXT)
    axes.set_xlabel(xlabel, color=_MUTED)
    axes.tick_params(colors=_MUTED)
    axes.legend(frameon=False, labelcolor=_TEXT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
