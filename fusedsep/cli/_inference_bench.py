# SPDX-License-Identifier: BSD-3-Clause
"""``bench``: networks and blocks beside other engines, and the parts of the frozen networks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ._cases import Case, Cases
from ._inference import measure, measure_network_parts, subjects_of
from ._inference_page import render
from ._limits import Limits
from ._output import print_table
from ._peers import versions

__all__ = ["measure_all", "print_legend", "print_results", "render"]

_ENGINES_FIRST, _ENGINES_LAST = ("eager nchw", "eager channels_last"), ("fused", "frozen")


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is written to the JSON."""
    cases = Cases(arguments)
    with_blocks = arguments.model is None and (len(cases) == 1 if arguments.blocks is None else arguments.blocks)
    results, parts = [], []

    def measure_case(case: Case, limits: Limits, begin: Callable[[str], None]) -> None:
        for subject in subjects_of(case, with_blocks):
            begin(subject.name)
            results.append(measure(subject, arguments.format, arguments.peers, arguments.repeats, limits))
        begin(f"the parts of {subject.name}")
        parts.append(measure_network_parts(subject, arguments.format, arguments.repeats, limits))

    cases.measure(11 if with_blocks else 2, measure_case)
    facts, settings = {"peers": versions(arguments.peers)}, {"format": arguments.format}
    return cases.document("parts", facts=facts, settings=settings, results=results, parts=parts)


def print_results(document: dict[str, Any], threads: int) -> None:
    for batch in document["settings"]["batch"]:
        _print_times(document, threads, batch)
        _print_parts(document, threads, batch)


def _print_times(document: dict[str, Any], threads: int, batch: int) -> None:
    results = [r for r in document["results"] if (r["threads"], r["batch"]) == (threads, batch)]
    peers = [engine for result in results for engine in result["times"] if engine not in _ENGINES_FIRST + _ENGINES_LAST]
    engines = [*_ENGINES_FIRST, *dict.fromkeys(peers), *_ENGINES_LAST]
    rows = []
    for result in results:
        times = [result["times"].get(engine) for engine in engines]
        rows.append(
            (
                result["name"],
                *("" if time is None else f"{time['median_ms']:.3g}" for time in times),
                f"{result['speedup']:.2f}x",
                f"{result['gflops']:.0f}",
                f"{result['share_of_peak']:.0%}",
                "pass" if result["ok"] else "FAIL",
            )
        )
    print_table(
        f"batch {batch}, fused and frozen in {document['settings']['format']}",
        ("median ms", *engines, "speedup", "GFLOP/s", "of peak", "result"),
        rows,
        failed=[not result["ok"] for result in results],
    )


def _print_parts(document: dict[str, Any], threads: int, batch: int) -> None:
    for network in document["parts"]:
        if (network["threads"], network["batch"]) != (threads, batch) or not network["parts"]:
            continue
        rows = [
            (
                part["name"],
                f"{part['ms']:.3g}",
                f"{part['gflops']:.0f}",
                f"{part['share_of_peak']:.0%}",
                f"{part['arithmetic_ms']:.3g}",
                f"{part['moved_bytes'] / 2**20:.3g}",
                part["level"],
                f"{part['moved_ms'] + part['scratch_ms']:.3g}",
            )
            for part in network["parts"]
        ]
        print_table(
            f"the parts of {network['name']}, frozen, batch {batch}: alone {network['sum_ms']:.3g} ms together, "
            f"as one call {network['whole_ms']:.3g} ms",
            ("part", "ms", "GFLOP/s", "of peak", "arithmetic ms", "MiB", "from", "bytes ms"),
            rows,
        )


def print_legend(document: dict[str, Any]) -> None:
    print("result: checked against float64 first; GFLOP/s: of the faster of fused and frozen, two for each Mult-Add")
    print(
        "speedup: the fastest of the other engines over the faster of fused and frozen; peak: the loop of multiply-adds"
    )
    print("arithmetic ms: the operations at peak; MiB: maps and weights, each once, in the cache that holds them;")
    print("bytes ms: these, and the map between the two convolutions to L2 and back, at the speed of a copy there")
    reasons = (f"{peer}: {why}" for result in document["results"] for peer, why in result["left_out"].items())
    for reason in dict.fromkeys(reasons):
        print(f"not timed: {reason}")
