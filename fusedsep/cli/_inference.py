# SPDX-License-Identifier: BSD-3-Clause
"""One module in every engine: verified, then timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn as nn

import fusedsep

from .. import reference
from ..mobilenet import FIRST_CHANNELS, STAGES, scaled_channels
from ._arguments import CommandError, describe, make_model
from ._cases import Case, images_for
from ._limits import Limits
from ._measure import compare, pause_between_engines, time_interleaved
from ._parts import measure_parts
from ._peers import Unavailable, make_call

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_OURS = ("fused", "frozen")


class Subject(NamedTuple):
    """A network or a block, unfused, and an input in NCHW."""

    name: str
    case: Case
    module: nn.Module
    x: torch.Tensor


def subjects_of(case: Case, with_blocks: bool) -> list[Subject]:
    """The network, last, and before it the distinct blocks of MobileNetV1 if they are wanted."""
    name, network = make_model(case.model, case.width, case.resolution)
    return [*(_blocks(case) if with_blocks else ()), Subject(name, case, network, images_for(network, case))]


def _blocks(case: Case) -> list[Subject]:
    subjects: dict[str, Subject] = {}
    channels, size = scaled_channels(FIRST_CHANNELS, case.width), -(-case.resolution // 2)
    for base_channels, stride in STAGES:
        out_channels = scaled_channels(base_channels, case.width)
        name = f"{channels} -> {out_channels}, {size}x{size}" + (" /2" if stride == 2 else "")
        block = reference.DepthwiseSeparableBlock(channels, out_channels, stride).eval()
        subjects.setdefault(name, Subject(name, case, block, torch.randn(case.batch, channels, size, size)))
        channels, size = out_channels, -(-size // stride)
    return list(subjects.values())


def measure(subject: Subject, memory_format: str, peers: Iterable[str], repeats: int, limits: Limits) -> dict[str, Any]:
    """Verify and time one subject, at torch's threads; as it goes into the JSON.

    Args:
        memory_format: of fused and frozen, a key of ``FORMATS``.
        peers: names of other engines; one that cannot run it or gives a wrong answer is left out, with the reason.

    Raises:
        CommandError: the user's network does not take the input.
    """
    unfused, x = subject.module, subject.x
    ours = x.to(memory_format=FORMATS[memory_format])
    x_last = x.to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            torchs, exact = unfused(x), copy.deepcopy(unfused).double()(x.double())
        unfused_last = copy.deepcopy(unfused).to(memory_format=torch.channels_last)
        fused = fusedsep.fuse(unfused).to(memory_format=FORMATS[memory_format])
        frozen = fusedsep.freeze(fused)
        with torch.inference_mode():
            checks = [compare(module(ours), torchs, exact) for module in (fused, frozen)]
    except Exception as error:
        if subject.case.model is None:
            raise
        raise CommandError(f"--model: {subject.name} does not run on {list(x.shape)}: {describe(error)}") from error
    calls = {
        "eager nchw": lambda: unfused(x),
        "eager channels_last": lambda: unfused_last(x_last),
        "fused": lambda: fused(ours),
        "frozen": lambda: frozen(ours),
    }
    left_out = {}
    for peer in peers:
        try:
            with torch.inference_mode():
                call, answer = make_call(peer, unfused, x)
            accuracy = compare(answer, torchs, exact)
            if not accuracy.ok:
                raise Unavailable(f"error {accuracy.error:.1e} against float64, allowed {accuracy.allowed:.1e}")
            calls[peer] = call
        except Unavailable as reason:
            left_out[peer] = str(reason)
    times = time_interleaved(calls, repeats, pause=pause_between_engines())
    ours_best = min(times[engine].median for engine in _OURS)
    gflops = 2e-6 * fusedsep.complexity(unfused, tuple(x.shape)).mult_adds / ours_best
    return {
        **_case_as_json(subject),
        "ok": all(check.ok for check in checks),
        "largest_error": max(check.error for check in checks),
        "torch_error": checks[0].torch_error,
        "speedup": min(times[engine].median for engine in times if engine not in _OURS) / ours_best,
        "gflops": gflops,
        "share_of_peak": gflops / limits.fma_gflops,
        "left_out": left_out,
        "times": {engine: samples.as_json() for engine, samples in times.items()},
    }


def measure_network_parts(subject: Subject, memory_format: str, repeats: int, limits: Limits) -> dict[str, Any]:
    """The parts of the frozen network, for the JSON."""
    frozen = fusedsep.freeze(copy.deepcopy(subject.module).to(memory_format=FORMATS[memory_format]))
    x = subject.x.to(memory_format=FORMATS[memory_format])
    return {**_case_as_json(subject), **measure_parts(frozen, x, repeats, limits)}


def _case_as_json(subject: Subject) -> dict[str, Any]:
    case = subject.case
    return {
        "name": subject.name,
        "block": case.model is None and isinstance(subject.module, reference.DepthwiseSeparableBlock),
        "threads": case.threads,
        "batch": case.batch,
        "width": case.width if case.model is None else None,
        "resolution": case.resolution,
    }
