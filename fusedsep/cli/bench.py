# SPDX-License-Identifier: BSD-3-Clause
"""Time MobileNetV1 or your own network in torch eager, other engines, fused and frozen, part by part; or train it."""

from __future__ import annotations

import argparse

from . import _inference_bench, _training_bench
from ._arguments import add_model, output_file, positive_int, positive_ints
from ._inference import FORMATS
from ._output import machine_line, write_json, write_text
from ._peers import add_peers

HELP = "time a network, its parts and its blocks against torch eager and other engines"


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
    bench, usual_batch = (_training_bench, 8) if arguments.train else (_inference_bench, 1)
    arguments.batch = arguments.batch or (usual_batch,)
    document = bench.measure_all(arguments)
    for known in document["limits"]:
        facts = {**document["machine"], "threads": known["threads"]}
        print(f"\n{machine_line(facts, with_peers=True)}\n{known['text']}")
        bench.print_results(document, known["threads"])
    bench.print_legend(document)
    if arguments.json is not None:
        write_json(arguments.json, document)
    if arguments.html is not None:
        write_text(arguments.html, bench.render(document))
    return 0 if all(result["ok"] for result in document["results"]) else 1
