# SPDX-License-Identifier: BSD-3-Clause
"""The page of ``bench --html``: against other engines, a roofline of the parts, and time per kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._output import machine_line
from ._page import case_names, folded, heading, page, paragraph, table
from ._parts import CLASSIFIER, DEPTHWISE, GATE, GATED, OTHER, POINTWISE, SEPARABLE, WHOLE
from ._svg import Point, Roof, Row, bars, ratios, roofline

_OURS = ("frozen", "fused")
#: Each engine has its color and form on every page; the two of eager torch are greys.
_SERIES = {
    "frozen": 0,
    "fused": 1,
    "onnxruntime": 2,
    "openvino": 3,
    "compile": 4,
    "eager nchw": 5,
    "eager channels_last": 6,
}
_KINDS = {SEPARABLE: 0, WHOLE: 1, CLASSIFIER: 2, OTHER: 3, POINTWISE: 4, DEPTHWISE: 5, "whole": 6, GATED: 7, GATE: 7}
_CLOSE_TO_PEAK = 0.8


def render(document: Mapping[str, Any]) -> str:
    """The page for what is written to the JSON."""
    networks = [result for result in document["results"] if not result["block"]]
    blocks = [result for result in document["results"] if result["block"]]
    limits = {known["threads"]: known for known in document["limits"]}
    sections = [heading("Against other engines"), _against("Networks", networks)]
    if blocks:
        sections.append(_against("Blocks of MobileNetV1", blocks))
    sections.append(heading("How near the processor's limits"))
    for index, (name, network) in enumerate(zip(case_names(document["parts"]), document["parts"], strict=True)):
        content = _roofline(network, limits[network["threads"]]) + _kinds(network)
        sections.append(folded(name, content, is_open=index == 0))
    lead = [
        f"{machine_line({**document['machine'], 'threads': known['threads']}, with_peers=True)}: {known['text']}."
        for known in document["limits"]
    ]
    settings = document["settings"]
    batches = ", ".join(map(str, settings["batch"]))
    lead.append(
        f"Batch {batches}; fused and frozen in {settings['format']}; medians of {settings['repeats']} calls, "
        "those of different engines in turns."
    )
    return page("fusedsep bench", lead, sections)


def _against(title: str, results: list[dict[str, Any]]) -> str:
    present = [name for name in _SERIES if any(name in result["times"] for result in results)]
    rows, cells = [], []
    for case, result in zip(case_names(results), results, strict=True):
        medians = {name: result["times"][name]["median_ms"] for name in present if name in result["times"]}
        best = min(medians[name] for name in _OURS)
        ours = f"{best:.3g} ms"
        rows.append(Row(case, {name: ms / best for name, ms in medians.items()}, ours))
        cells.append(
            [
                case,
                *(f"{medians[name]:.3g}" if name in medians else "" for name in present),
                f"{result['speedup']:.2f}x",
                f"{result['share_of_peak']:.0%}",
                "pass" if result["ok"] else "FAIL",
            ]
        )
    description = (
        "Median time of each engine over that of the faster of frozen and fused, whose milliseconds stand on the "
        "right; to the right of 1 is slower than these. Answers were checked against float64 first."
    )
    chart = ratios(title, description, rows, {name: _SERIES[name] for name in present})
    missing = dict.fromkeys(f"{peer}: {why}" for result in results for peer, why in result["left_out"].items())
    notes = "".join(paragraph(f"Not timed: {reason}") for reason in missing)
    columns = ["median ms", *present, "speedup", "of peak", "result"]
    return chart + notes + folded("The numbers", table(columns, cells))


def _roofline(network: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    if not network["parts"]:
        return paragraph("Nothing in this network runs in the kernels.")
    points = [
        Point(part["intensity"], part["gflops"], number, part["name"]) for number, part in enumerate(network["parts"])
    ]
    roofs = [Roof(level["name"], level["gbs"], limits["fma_gflops"]) for level in limits["levels"]]
    roofs += [Roof("multiply-adds", None, limits["fma_gflops"])]
    chart = roofline(
        f"The parts of {network['name']}",
        "Each part of the frozen network, alone on its map. Bytes are those of the maps that it reads and writes and "
        "of its weights. Slopes are copies in a cache or memory.",
        points,
        roofs,
    )
    rows = [
        [
            part["name"],
            f"{part['ms']:.3g}",
            f"{part['gflops']:.0f}",
            f"{part['share_of_peak']:.0%}",
            f"{part['intensity']:.1f}",
            _explanation(part),
        ]
        for part in network["parts"]
    ]
    return chart + table(["part", "ms", "GFLOP/s", "of peak", "operations / byte", "bound by"], rows, text_column=5)


def _explanation(part: Mapping[str, Any]) -> str:
    if part["share_of_peak"] >= _CLOSE_TO_PEAK:
        return "arithmetic"
    text = f"arithmetic {part['arithmetic_ms']:.3g} ms; maps and weights, {_mib(part['moved_bytes'])} "
    text += f"{'in' if part['level'] == 'memory' else 'from'} {part['level']} at {part['level_gbs']:.0f} GB/s, "
    text += f"{part['moved_ms']:.3g} ms"
    if part["scratch_bytes"]:
        text += f"; {_mib(part['scratch_bytes'])} between the convolutions to L2 and back, {part['scratch_ms']:.3g} ms"
    rest = part["ms"] - part["arithmetic_ms"] - part["moved_ms"] - part["scratch_ms"]
    return text + (f"; the rest, {rest:.3g} ms, is loads in L1 and the call" if rest > 0 else "; these overlap")


def _kinds(network: Mapping[str, Any]) -> str:
    rows = [
        Row("parts, each alone", network["kinds_ms"], f"{network['sum_ms']:.3g} ms"),
        Row("as one call", {"whole": network["whole_ms"]}, f"{network['whole_ms']:.3g} ms"),
    ]
    return bars(
        "Time per kind of layer",
        "The parts timed one by one, and the network as one call. Other is what the whole takes beyond its parts.",
        rows,
        _KINDS,
        "ms",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"
