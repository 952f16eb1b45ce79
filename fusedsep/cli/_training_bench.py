# SPDX-License-Identifier: BSD-3-Clause
"""``bench --train``: whole steps against torch, what they keep and take of memory, and the passes of the operator."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

import fusedsep

from ._arguments import CommandError, describe
from ._cases import Case, Cases
from ._limits import Limits
from ._output import print_table
from ._passes import measure_passes
from ._training_memory import resident_peak
from ._training_page import render
from ._training_steps import (
    EAGER,
    ENGINES,
    OURS,
    PHASES,
    Trainee,
    compare_losses,
    first_losses,
    make_subject,
    time_steps,
)

__all__ = ["measure_all", "print_legend", "print_results", "render"]

_PASS_REPEATS = 5


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is written to the JSON."""
    cases = Cases(arguments)
    engines = [engine for engine in ENGINES if engine != "compile" or "compile" in arguments.peers]
    results = []

    def measure_case(case: Case, limits: Limits, begin: Callable[[str], None]) -> None:
        results.append(_measure(case, engines, arguments.repeats, limits, begin))

    cases.measure(2 + len(engines), measure_case)
    return cases.document("training", facts={}, settings={}, results=results)


def _measure(
    case: Case, engines: Sequence[str], repeats: int, limits: Limits, begin: Callable[[str], None]
) -> dict[str, Any]:
    try:
        name, network, images, labels = make_subject(case)
    except Exception as error:
        if case.model is None or isinstance(error, CommandError):
            raise
        raise CommandError(
            f"--model: {case.model} does not train on {case.resolution}x{case.resolution} images: {describe(error)}"
        ) from error
    title = f"{name}, batch {case.batch}"
    begin(f"steps of {title}")
    result = {"name": name, **case._asdict(), **_measure_steps(network, images, labels, engines, repeats)}
    result["resident_bytes"] = {}
    for engine in result["times"]:
        begin(f"memory of {engine}, {title}")
        result["resident_bytes"][engine] = resident_peak(case, engine)
    begin(f"passes of {title}")
    result["blocks"] = measure_passes(network.train(), images, _PASS_REPEATS, limits)
    gflop = 3 * 2e-9 * fusedsep.complexity(network, tuple(images.shape)).mult_adds
    fastest = min(result["times"][engine]["step"]["median_ms"] for engine in OURS)
    result["share_of_peak"] = 1e3 * gflop / fastest / limits.fma_gflops
    return result


def print_results(document: dict[str, Any], threads: int) -> None:
    results = [result for result in document["results"] if result["threads"] == threads]
    _print_steps(results)
    for result in results:
        _print_passes(result)


def _measure_steps(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor | None, engines: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Losses, times and saved bytes; an engine other than ours that fails is left out, with the reason.

    So is one whose losses differ, except for eager torch, which is what others are measured by: it is timed and named.
    """
    exact = first_losses(Trainee(network, images, labels, "eager nchw", torch.double))
    torchs = first_losses(Trainee(network, images, labels, "eager nchw"))
    checks, trainees, saved, left_out, inexact = {}, {}, {}, {}, {}
    for engine in engines:
        try:
            trainee = Trainee(network, images, labels, engine)
            checks[engine] = compare_losses(first_losses(trainee), torchs, exact)
            if engine not in OURS and not checks[engine].ok:
                named = inexact if engine in EAGER else left_out
                named[engine] = f"losses are off by {checks[engine].error:.1e}"
                if engine not in EAGER:
                    continue
            saved[engine] = trainee.saved_bytes()
            trainees[engine] = trainee
        except Exception as error:
            if engine in OURS:
                raise
            left_out[engine] = describe(error)
    times = time_steps(trainees, repeats)
    steps = {engine: phases["step"].median for engine, phases in times.items()}
    ours = min(steps[engine] for engine in OURS)
    return {
        "ok": all(checks[engine].ok for engine in OURS),
        "largest_error": max(checks[engine].error for engine in OURS),
        "torch_error": checks[OURS[0]].torch_error,
        "speedup": min(ms for engine, ms in steps.items() if engine not in OURS) / ours,
        "left_out": left_out,
        "inexact": inexact,
        "times": {engine: {phase: t.as_json() for phase, t in phases.items()} for engine, phases in times.items()},
        "saved_bytes": saved,
    }


def _print_steps(results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        for engine, phases in result["times"].items():
            resident = result["resident_bytes"][engine]
            rows.append(
                (
                    f"{result['name']}, batch {result['batch']}",
                    engine,
                    f"{phases['step']['median_ms']:.3g}",
                    *(f"{phases[phase]['median_ms']:.3g}" for phase in PHASES),
                    f"{result['saved_bytes'][engine] / 2**20:.1f}",
                    "" if resident is None else f"{resident / 2**20:.1f}",
                )
            )
    columns = ("network", "engine", "step ms", *(f"{phase} ms" for phase in PHASES), "saved MiB", "resident MiB")
    print_table("training steps", columns, rows, text_columns=2)
    for result in results:
        verdict = "pass" if result["ok"] else "FAIL"
        print(
            f"{result['name']}, batch {result['batch']}: {result['speedup']:.2f}x the fastest of torch, "
            f"{result['share_of_peak']:.0%} of peak; "
            f"losses {verdict} (off by {result['largest_error']:.1e}, float32 eager by {result['torch_error']:.1e})"
        )


def _print_passes(result: dict[str, Any]) -> None:
    rows = [
        (
            one["name"],
            f"{one['ms']:.3g}",
            f"{one['gflops']:.0f}",
            f"{one['arithmetic_ms']:.3g}",
            f"{one['moved_bytes'] / 2**20:.1f}",
            f"{one['moved_ms']:.3g}",
        )
        for one in result["blocks"]["passes"]
    ]
    if rows:
        whole = result["blocks"]["whole"]
        print_table(
            f"the blocks of {result['name']}, batch {result['batch']}, channels_last: pass by pass; forward and "
            f"backward as one operation {whole['ms']:.3g} ms, {whole['share_of_peak']:.0%} of peak",
            ("pass", "ms", "GFLOP/s", "arithmetic ms", "MiB", "bytes ms"),
            rows,
        )


def print_legend(document: dict[str, Any]) -> None:
    print(
        "step: forward with loss, backward, SGD with momentum; losses of the first steps were checked against float64"
    )
    print("of peak: counting three times the operations of the forward")
    print("saved: what autograd keeps from forward to backward, besides parameters")
    print(
        "resident: by how much the resident set of a process of its own grows at most, gradients and momentum included"
    )
    print("bytes ms: what a pass reads and writes, each once, at the speed of a copy in the cache that holds it")
    reasons = (f"{engine}: {why}" for result in document["results"] for engine, why in result["left_out"].items())
    for reason in dict.fromkeys(reasons):
        print(f"not timed: {reason}")
    reasons = (f"{engine}: {why}" for result in document["results"] for engine, why in result["inexact"].items())
    for reason in dict.fromkeys(reasons):
        print(f"timed all the same: {reason}")
    if not any("compile" in result["times"] or "compile" in result["left_out"] for result in document["results"]):
        print("not timed: compile: takes minutes, ask for it with --peers compile")
