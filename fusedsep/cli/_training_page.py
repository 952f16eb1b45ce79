# SPDX-License-Identifier: BSD-3-Clause
"""The page of ``bench --train --html``: steps against torch, memory, and a roofline of the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._output import machine_line
from ._page import case_names, folded, heading, page, paragraph, table
from ._svg import Point, Roof, Row, bars, ratios, roofline
from ._training_steps import OURS, PHASES

#: Each engine's color and form, as on the page of inference.
_SERIES = {"fused channels_last": 0, "fused nchw": 1, "compile": 4, "eager nchw": 5, "eager channels_last": 6}
_PHASES = dict(zip(PHASES, (0, 1, 2), strict=True))


def render(document: Mapping[str, Any]) -> str:
    """The page for what is written to the JSON."""
    results = document["results"]
    names = case_names(results)
    limits = {known["threads"]: known for known in document["limits"]}
    lead = [
        f"{machine_line({**document['machine'], 'threads': known['threads']})}: {known['text']}."
        for known in document["limits"]
    ]
    settings = document["settings"]
    lead.append(
        f"Batch {', '.join(map(str, settings['batch']))}; a step is forward, loss, backward and SGD with momentum; "
        f"medians of {settings['repeats']} steps, the engines in turns. Losses of the first steps were checked first."
    )
    sections = [heading("Training steps"), _steps(names, results)]
    for index, (name, result) in enumerate(zip(names, results, strict=True)):
        content = _phases(result) + _memory(result) + _passes(result, limits[result["threads"]])
        sections.append(folded(name, content, is_open=index == 0))
    return page("fusedsep bench --train", lead, sections)


def _steps(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    rows, cells = [], []
    present = {name: number for name, number in _SERIES.items() if any(name in result["times"] for result in results)}
    for name, result in zip(names, results, strict=True):
        medians = {
            engine: result["times"][engine]["step"]["median_ms"] for engine in present if engine in result["times"]
        }
        best = min(medians[engine] for engine in OURS)
        rows.append(Row(name, {engine: ms / best for engine, ms in medians.items()}, f"{best:.3g} ms"))
        cells.append(
            [
                name,
                *(f"{medians[engine]:.3g}" if engine in medians else "" for engine in present),
                f"{result['speedup']:.2f}x",
                f"{result['share_of_peak']:.0%}",
                "pass" if result["ok"] else "FAIL",
            ]
        )
    description = (
        "Median time of a step in each engine over that of the faster memory format of fused, whose milliseconds stand "
        "on the right."
    )
    missing, inexact = (
        dict.fromkeys(f"{engine}: {why}" for result in results for engine, why in result[key].items())
        for key in ("left_out", "inexact")
    )
    return (
        ratios("Steps", description, rows, present)
        + "".join(paragraph(f"Not timed: {reason}") for reason in missing)
        + "".join(paragraph(f"Timed all the same: {reason}") for reason in inexact)
        + folded("The numbers", table(["median ms", *present, "speedup", "of peak", "losses"], cells))
    )


def _phases(result: Mapping[str, Any]) -> str:
    rows = [
        Row(
            engine,
            {phase: result["times"][engine][phase]["median_ms"] for phase in PHASES},
            f"{result['times'][engine]['step']['median_ms']:.3g} ms",
        )
        for engine in _SERIES
        if engine in result["times"]
    ]
    return bars("Time per phase", "The loss counts as forward.", rows, _PHASES, "ms")


def _memory(result: Mapping[str, Any]) -> str:
    charts = []
    for title, key, description in (
        ("Saved for the backward", "saved_bytes", "Distinct storages, without parameters and buffers."),
        (
            "Resident memory",
            "resident_bytes",
            "By how much the resident set of a process of its own grows at most in three steps, told by the operating "
            "system; gradients and momentum included.",
        ),
    ):
        sizes = {engine: result[key][engine] for engine in _SERIES if result[key].get(engine) is not None}
        rows = [Row(engine, {key: size / 2**20}, f"{size / 2**20:.3g} MiB") for engine, size in sizes.items()]
        if rows:
            charts.append(bars(title, description, rows, {key: 0}, "MiB"))
    return "".join(charts)


def _passes(result: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    passes, whole = result["blocks"]["passes"], result["blocks"]["whole"]
    if not passes:
        return paragraph("No 3x3 depthwise-separable blocks whose passes could be timed.")
    points = [Point(one["intensity"], one["gflops"], number, one["name"]) for number, one in enumerate(passes, 1)]
    roofs = [Roof(level["name"], level["gbs"], limits["fma_gflops"]) for level in limits["levels"]]
    roofs.append(Roof("multiply-adds", None, limits["fma_gflops"]))
    chart = roofline(
        "The passes of the training operator",
        "Summed over all blocks, in channels_last, one pass after the other. Bytes are those that a pass has to read "
        f"and write, each once. Forward and backward as one operation take {whole['ms']:.3g} ms, "
        f"{whole['share_of_peak']:.0%} of peak if they count as three times the forward.",
        points,
        roofs,
    )
    cells = [
        [
            f"{number}: {one['name']}",
            f"{one['ms']:.3g}",
            f"{one['gflops']:.0f}",
            f"{one['arithmetic_ms']:.3g}",
            f"{one['moved_bytes'] / 2**20:.3g}",
            f"{one['moved_ms']:.3g}",
            f"{(one['arithmetic_ms'] + one['moved_ms']) / one['ms']:.0%}",
        ]
        for number, one in enumerate(passes, 1)
    ]
    columns = ["pass", "ms", "GFLOP/s", "arithmetic ms", "MiB", "bytes ms", "of both"]
    times = bars(
        "Time per pass",
        "The fastest of some runs, summed over all blocks.",
        [Row(one["name"], {"ms": one["ms"]}, f"{one['ms']:.3g} ms") for one in passes],
        {"ms": 0},
        "ms",
    )
    return chart + table(columns, cells) + times
