# SPDX-License-Identifier: BSD-3-Clause
"""The two questions asked of a fast network: does it answer as exactly, and how long does it take?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: The largest of a few rounding errors is a coin toss: another order of summation alone moves it by a factor of 2.
_FACTOR = 3.0
#: Units in the last place of the largest output. In float64 the reference is torch's own result, whose error reads 0.
_ULPS = {torch.float32: 4.0, torch.float64: 64.0}
_WARM_UP = 2  # calls that are not timed: allocation, weight packing, caches
_REHEARSAL = 0.002  # seconds


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64, and the rule that judges them."""

    error: float
    torch_error: float  # of the same thing without fusedsep, in the same dtype
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def used(self) -> float:
        """The error as a fraction of what is allowed; infinite for NaN."""
        if not self.ok:
            return max(self.error / self.allowed, 1.0) if self.allowed > 0 and math.isfinite(self.error) else math.inf
        return self.error / self.allowed if self.allowed > 0 else 0.0


def compare(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, order: float = math.inf) -> Accuracy:
    """Judge ``ours`` by ``error <= 3 * error of torchs + ulps * eps * |exact|``.

    Args:
        torchs: the unfused result in the dtype of ``ours``.
        exact: the unfused result in float64.
        order: of the norm that makes one number of a difference and of ``exact``; the largest element by default.
    """
    torch_error = _norm(torchs.double() - exact, order)
    slack = _ULPS[ours.dtype] * torch.finfo(ours.dtype).eps * _norm(exact, order)
    return Accuracy(_norm(ours.double() - exact, order), torch_error, _FACTOR * torch_error + slack)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """``max|a - b|`` in float64; NaN if either holds one."""
    return _norm(a.double() - b.double(), math.inf)


def _norm(x: torch.Tensor, order: float) -> float:
    return torch.linalg.vector_norm(x, order).item()


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated calls."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2

    def as_json(self) -> dict[str, Any]:
        return {"median_ms": self.median, "spread_ms": self.spread, "samples_ms": list(self.samples)}


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, inference: bool = True, pause: float | None = None
) -> dict[str, Times]:
    """Time every call ``repeats`` times, in turns, so that a change of clock or load meets all of them alike.

    Args:
        inference: under ``torch.inference_mode()``.
        pause: seconds to wait before each timed call and as many of the same, 2 ms at least, that are not timed, which
            bring back to the caches what the others threw out, and the threads to cores of their own: an engine that
            pins its threads may leave all on one, and short calls then last from one tick of the scheduler to the next.
            Without it a call finds the caches as the one before left them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode(inference):
        for call in calls.values():
            for _ in range(_WARM_UP):
                call()
        for _ in range(repeats):
            for name, call in calls.items():
                if pause is not None:
                    time.sleep(pause)
                    _run_for(max(pause, _REHEARSAL), call)
                start = time.perf_counter_ns()
                call()
                samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: Times(tuple(values)) for name, values in samples.items()}


def pause_between_engines() -> float:
    """Seconds, for :func:`time_interleaved` at torch's threads.

    Threads of an engine that has just run may spin for some milliseconds, and would have a core of the next one's.
    """
    return 0.02 if torch.get_num_threads() > 1 else 0.0


def _run_for(seconds: float, call: Callable[[], object]) -> None:
    """At least once."""
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()
