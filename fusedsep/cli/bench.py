# SPDX-License-Identifier: BSD-3-Clause
"""Time MobileNetV1 or your own network in torch eager, other engines, fused and frozen, part by part; or train it."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from . import _inference_page, _training_bench
from ._arguments import add_model, output_file, positive_int, positive_ints
from ._inference import FORMATS, Case, measure, measure_network_parts, subjects_of
from ._limits import Limits, measure_limits
from ._output import machine, machine_line, print_table, progress, write_json, write_text
from ._peers import add_peers, versions

HELP = "time a network, its parts and its blocks against torch eager and other engines"

_ENGINES_FIRST, _ENGINES_LAST = ("eager nchw", "eager channels_last"), ("fused", "frozen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, several=True)
    parser.add_argument(
        "--threads", type=positive_ints, metavar="N,...", help="intra-op threads (default: torch's own)"
    )
    parser.add_argument(
        "--batch", type=positive_ints, metavar="N,...", help="images at once (default: 1, with --train 8)"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="time training steps instead, their memory and passes; of the other engines only compile trains",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="channels_last",
        help="memory format of fused and frozen (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=positive_int, default=30, metavar="N", help="timed calls each (default: 30)")
    parser.add_argument(
        "--blocks",
        action=argparse.BooleanOptionalAction,
        help="the distinct blocks of MobileNetV1 in every engine too (default: unless lists give several cases)",
    )
    add_peers(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--html", type=output_file, metavar="FILE", help="write a page of charts and tables to FILE")


def run(arguments: argparse.Namespace) -> int:
    arguments.batch = arguments.batch or ((8,) if arguments.train else (1,))
    if arguments.train:
        return _training_bench.run(arguments)
    document = _measure_all(arguments)
    for limits in document["limits"]:
        facts = {**document["machine"], "threads": limits["threads"]}
        print(f"\n{machine_line(facts)}\n{limits['text']}")
        for batch in document["settings"]["batch"]:
            _print_results(document, limits["threads"], batch)
            _print_parts(document, limits["threads"], batch)
    _print_legend(document)
    if arguments.json is not None:
        write_json(arguments.json, document)
    if arguments.html is not None:
        write_text(arguments.html, _inference_page.render(document))
    return 0 if all(result["ok"] for result in document["results"]) else 1


def _measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is written to the JSON."""
    threads = arguments.threads or (torch.get_num_threads(),)
    widths = arguments.width if arguments.model is None else arguments.width[:1]
    cases = [
        Case(arguments.model, *case)
        for case in itertools.product(threads, arguments.batch, widths, arguments.resolution)
    ]
    with_blocks = arguments.model is None and (len(cases) == 1 if arguments.blocks is None else arguments.blocks)
    results, parts = [], []
    limits: dict[int, Limits] = {}
    with progress(len(cases) * (11 if with_blocks else 2) + len(threads)) as begin:
        for case in cases:
            torch.set_num_threads(case.threads)
            if case.threads not in limits:
                begin("the limits of this machine")
                limits[case.threads] = measure_limits()
            known = limits[case.threads]
            for subject in subjects_of(case, with_blocks):
                begin(subject.name)
                results.append(measure(subject, arguments.format, arguments.peers, arguments.repeats, known))
            begin(f"the parts of {subject.name}")
            parts.append(measure_network_parts(subject, arguments.format, arguments.repeats, known))
    return {
        "subject": "parts",
        "machine": {**machine(), "threads": list(threads), "peers": versions(arguments.peers)},
        "limits": [{**known.as_json(), "text": str(known)} for known in limits.values()],
        "settings": {
            "model": arguments.model,
            "width": list(widths),
            "resolution": list(arguments.resolution),
            "batch": list(arguments.batch),
            "format": arguments.format,
            "repeats": arguments.repeats,
        },
        "results": results,
        "parts": parts,
    }


def _print_results(document: dict[str, Any], threads: int, batch: int) -> None:
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


def _print_legend(document: dict[str, Any]) -> None:
    print("result: checked against float64 first; GFLOP/s: of the faster of fused and frozen, two for each Mult-Add")
    print(
        "speedup: the fastest of the other engines over the faster of fused and frozen; peak: the loop of multiply-adds"
    )
    print("arithmetic ms: the operations at peak; MiB: maps and weights, each once, in the cache that holds them;")
    print("bytes ms: these, and the map between the two convolutions to L2 and back, at the speed of a copy there")
    reasons = (f"{peer}: {why}" for result in document["results"] for peer, why in result["left_out"].items())
    for reason in dict.fromkeys(reasons):
        print(f"not timed: {reason}")
