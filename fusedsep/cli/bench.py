# SPDX-License-Identifier: BSD-3-Clause
"""Time the nine distinct block shapes of MobileNetV1 and a whole network: other engines, torch eager, fused, frozen."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

import fusedsep

from .. import reference
from ..mobilenet import FIRST_CHANNELS, STAGES, scaled_channels
from ._arguments import (
    CommandError,
    add_model,
    add_threads,
    describe,
    make_model,
    output_file,
    positive_int,
    set_threads,
)
from ._measure import compare, time_interleaved
from ._output import machine, machine_line, print_table, write_json
from ._peers import Unavailable, add_peers, make_call

HELP = "time the blocks and a whole network against torch eager and other engines"

_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_TORCHS = ("eager nchw", "eager channels_last")
_OURS = ("fused", "frozen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_threads(parser)
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="channels_last",
        help="memory format of fused and frozen (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=positive_int, default=30, metavar="N", help="timed calls each (default: 30)")
    add_peers(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every sample to FILE")


def run(arguments: argparse.Namespace) -> int:
    set_threads(arguments)
    name, network = make_model(arguments)
    facts = machine()
    print(machine_line(facts))
    subjects = [] if arguments.model else _blocks(arguments)
    subjects.append((name, network, _images(network, arguments)))
    results = [_bench(*subject, arguments) for subject in subjects]
    engines = [*_TORCHS, *(peer for peer in arguments.peers if any(peer in r["times"] for r in results)), *_OURS]
    print_table(
        f"batch {arguments.batch}, fused and frozen in {arguments.format}",
        ("median ms", *engines, "speedup", "GFLOP/s", "result"),
        [_row(result, engines) for result in results],
        failed=[not result["ok"] for result in results],
    )
    print("result: checked against float64 first; GFLOP/s: of the faster of fused and frozen")
    print("speedup: the fastest of the other engines over the faster of fused and frozen")
    for reason in dict.fromkeys(f"{peer}: {why}" for result in results for peer, why in result["left_out"].items()):
        print(f"not timed: {reason}")
    if arguments.json is not None:
        settings = {"batch": arguments.batch, "format": arguments.format, "repeats": arguments.repeats}
        for result in results:
            result["times"] = {engine: times.as_json() for engine, times in result["times"].items()}
        write_json(arguments.json, {"machine": facts, "settings": settings, "results": results})
    return 0 if all(result["ok"] for result in results) else 1


def _blocks(arguments: argparse.Namespace) -> list[tuple[str, nn.Module, torch.Tensor]]:
    """The distinct blocks of the network, each with an input of its map's size."""
    subjects: dict[str, tuple[str, nn.Module, torch.Tensor]] = {}
    channels = scaled_channels(FIRST_CHANNELS, arguments.width)
    size = -(-arguments.resolution // 2)
    for base_channels, stride in STAGES:
        out_channels = scaled_channels(base_channels, arguments.width)
        name = f"{channels} -> {out_channels}, {size}x{size}" + (" /2" if stride == 2 else "")
        block = reference.DepthwiseSeparableBlock(channels, out_channels, stride).eval()
        subjects.setdefault(name, (name, block, torch.randn(arguments.batch, channels, size, size)))
        channels, size = out_channels, -(-size // stride)
    return list(subjects.values())


def _images(network: nn.Module, arguments: argparse.Namespace) -> torch.Tensor:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    return torch.randn(arguments.batch, channels, arguments.resolution, arguments.resolution)


def _bench(name: str, unfused: nn.Module, x: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verify, then time, one module in every engine."""
    memory_format = _FORMATS[arguments.format]
    ours, x_last = x.to(memory_format=memory_format), x.to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            torchs, exact = unfused(x), copy.deepcopy(unfused).double()(x.double())
        unfused_last = copy.deepcopy(unfused).to(memory_format=torch.channels_last)
        fused = fusedsep.fuse(unfused).to(memory_format=memory_format)
        frozen = fusedsep.freeze(fused)
        with torch.inference_mode():
            checks = [compare(module(ours), torchs, exact) for module in (fused, frozen)]
    except Exception as error:
        if arguments.model is None:
            raise
        raise CommandError(f"--model: {name} does not run on {list(x.shape)}: {describe(error)}") from error
    calls = {
        "eager nchw": lambda: unfused(x),
        "eager channels_last": lambda: unfused_last(x_last),
        "fused": lambda: fused(ours),
        "frozen": lambda: frozen(ours),
    }
    left_out = {}
    for peer in arguments.peers:
        try:
            with torch.inference_mode():
                call, answer = make_call(peer, unfused, x)
            accuracy = compare(answer, torchs, exact)
            if not accuracy.ok:
                raise Unavailable(f"error {accuracy.error:.1e} against float64, allowed {accuracy.allowed:.1e}")
            calls[peer] = call
        except Unavailable as reason:
            left_out[peer] = str(reason)
    # Threads of an engine that has just run may spin for some milliseconds, and would have a core of the next one's.
    times = time_interleaved(calls, arguments.repeats, pause=0.02 if torch.get_num_threads() > 1 else 0)
    ours_best = min(times[engine].median for engine in _OURS)
    return {
        "name": name,
        "ok": all(check.ok for check in checks),
        "largest_error": max(check.error for check in checks),
        "torch_error": checks[0].torch_error,
        "speedup": min(times[engine].median for engine in times if engine not in _OURS) / ours_best,
        "gflops": 2e-6 * fusedsep.complexity(unfused, tuple(x.shape)).mult_adds / ours_best,
        "left_out": left_out,
        "times": times,
    }


def _row(result: dict[str, Any], engines: Sequence[str]) -> tuple[str, ...]:
    times = [result["times"].get(engine) for engine in engines]
    cells = ["" if time is None else f"{time.median:.3g}" for time in times]
    verdict = "pass" if result["ok"] else "FAIL"
    return (result["name"], *cells, f"{result['speedup']:.2f}x", f"{result['gflops']:.0f}", verdict)
