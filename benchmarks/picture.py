# SPDX-License-Identifier: BSD-3-Clause
"""Draw the blocks of the first network in a file of results, or networks in other engines. Needs matplotlib.

python benchmarks/picture.py benchmarks/results/blocks-avx512.json benchmarks/results/blocks.png
python benchmarks/picture.py benchmarks/results/peers-avx512*.json benchmarks/results/peers.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import peers_picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import best_ms, speed

from fusedsep.cli._arguments import picture_file
from fusedsep.cli._output import machine_line

_TEXT, _MUTED, _LINE = "#24292f", "#57606a", "#d0d7de"
_BARS = {"eager": "#afb8c1", "fused": "#54aeff", "frozen": "#0969da"}
_LABELS = {"eager": "torch eager", "fused": "fusedsep.fuse", "frozen": "fusedsep.freeze"}
_BAR = 0.26  # height of one bar; a block has three, and its distance to the next is 1
# Inches.
_WIDTH, _ROW, _HEADER, _FOOTER, _LEFT, _RIGHT = 9.5, 0.56, 1.45, 0.65, 1.85, 0.35


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=picture_file)
    arguments = parser.parse_args(argv)
    documents = [json.loads(path.read_text()) for path in arguments.results]
    kinds = [document["subject"] for document in documents]
    if set(kinds) == {"peers"}:
        peers_picture.draw(documents, arguments.picture)
    elif len(kinds) == 1:
        draw(documents[0], arguments.picture)
    else:
        raise ValueError(f"several files of results must all be of peers, got {', '.join(kinds)}")
    return 0


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture to ``path``: GFLOP/s of each block, eager and ours, beside those of ``torch.mm``."""
    network = document["results"][0]["network"]
    results = [result for result in document["results"] if result["network"] == network]
    height = _HEADER + _ROW * len(results) + _FOOTER
    # Text as outlines looks the same everywhere; no date and a fixed salt make the same file of the same numbers.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fusedsep"}):
        figure = Figure(figsize=(_WIDTH, height), dpi=130, facecolor="white")
        axes = figure.add_axes(
            (_LEFT / _WIDTH, _FOOTER / height, 1 - (_LEFT + _RIGHT) / _WIDTH, 1 - (_HEADER + _FOOTER) / height)
        )
        title = f"The blocks of {network}: how much of the processor they use"
        figure.text(0.3 / _WIDTH, 1 - 0.28 / height, title, va="top", fontsize=14, weight="bold", color=_TEXT)
        subtitle = f"batch {document['settings']['batch']}, {machine_line(document['machine'])}"
        figure.text(0.3 / _WIDTH, 1 - 0.63 / height, subtitle, va="top", fontsize=9.5, color=_MUTED)
        _draw_blocks(axes, results)
        _draw_sgemm(axes, document["machine"]["sgemm_gflops"])
        axes.set_xlabel("GFLOP/s, each in the memory format that suits it better", fontsize=9.5, color=_MUTED)
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(0.21 / _WIDTH, 1 - 0.83 / height),
            borderaxespad=0,
            ncols=len(_BARS),
            frameon=False,
            fontsize=9.5,
            labelcolor=_TEXT,
            handlelength=1,
        )
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw_blocks(axes: Axes, results: list[dict[str, Any]]) -> None:
    for index, (engine, color) in enumerate(_BARS.items()):
        positions = [row + (index - 1) * _BAR for row in range(len(results))]
        gflops = [result["gflop"] / best_ms(result, engine) * 1e3 for result in results]
        axes.barh(positions, gflops, height=_BAR, color=color, label=_LABELS[engine], edgecolor="white", linewidth=0.8)
        if engine == "eager":
            continue
        for result, position, value in zip(results, positions, gflops, strict=True):
            axes.annotate(
                f"{speed(result, engine):.2f}x",
                (value, position),
                (-5, 0),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                fontsize=7.5,
                weight="bold",
                color="white" if engine == "frozen" else _TEXT,
            )
    axes.set_yticks(range(len(results)), [result["name"].replace("->", "→") for result in results])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_TEXT)
    axes.grid(axis="x", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_sgemm(axes: Axes, sgemm_gflops: float) -> None:
    axes.axvline(sgemm_gflops, color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.08 * max(sgemm_gflops, axes.get_xlim()[1] / 1.05))
    axes.annotate(
        f"torch.mm: {sgemm_gflops:.0f}",
        (sgemm_gflops, 1),
        (0, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
        color=_MUTED,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"picture.py: {error}")
