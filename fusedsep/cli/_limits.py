# SPDX-License-Identifier: BSD-3-Clause
"""How fast this machine multiplies and copies, measured in this process at torch's threads: the roofs of a roofline."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _C
from ._measure import time_interleaved

_MATRIX = 1024
_REPEATS = 20
_LOOP_FLOP = 1_000_000_000  # of one thread in one timed call: some milliseconds, beside which starting it is nothing
_SMALLEST_MEMORY_COPY = 1 << 28  # bytes of source and destination together
_USUAL_CACHES = {"L2": 1 << 18, "L3": 1 << 23}  # bytes, where the system does not tell
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Level:
    """A cache or the memory. A copy of n bytes counts 2n: n are read and n written.

    Attributes:
        name: ``"L2"``, ``"L3"`` or ``"memory"``.
        capacity: bytes that it holds; of all threads' own ones together for L2.
        gbs: GB/s of copies within it, the fastest of 20.
    """

    name: str
    capacity: float
    gbs: float


@dataclass(frozen=True)
class Limits:
    """What no program on this machine can exceed, or (``mm_gflops``) what a very good one reaches.

    Attributes:
        threads, isa: what it was measured with.
        fma_gflops: a loop of float32 multiply-adds in registers, on all threads at once.
        mm_gflops: ``torch.mm`` on float32 matrices of 1024 x 1024.
        levels: from the fastest to the largest.
    """

    threads: int
    isa: str
    fma_gflops: float
    mm_gflops: float
    levels: tuple[Level, ...]

    def level_for(self, size: float) -> Level:
        """The smallest that holds ``size`` bytes."""
        return next((level for level in self.levels if size <= level.capacity), self.levels[-1])

    def as_json(self) -> dict[str, Any]:
        levels = [asdict(level) for level in self.levels]
        return {**asdict(self), "levels": [{**level, "capacity": _finite(level["capacity"])} for level in levels]}

    def __str__(self) -> str:
        levels = ", ".join(f"{level.name} {level.gbs:.0f}" for level in self.levels)
        return (
            f"{self.fma_gflops:.0f} GFLOP/s of multiply-adds in {self.isa} registers, "
            f"{self.mm_gflops:.0f} of torch.mm; copies (read + written) in GB/s: {levels}"
        )


def measure_limits() -> Limits:
    """Takes about two seconds."""
    threads, isa = torch.get_num_threads(), _C.active_isa()
    l2, l3 = cache_bytes("L2"), cache_bytes("L3")
    return Limits(
        threads,
        isa,
        fma_gflops(threads, isa),
        mm_gflops(),
        (
            Level("L2", threads * l2, threads * _copy_gbs(l2 // 2)),
            Level("L3", l3, _torch_copy_gbs(max(l3 // 4, 2 * threads * l2))),
            Level("memory", float("inf"), _torch_copy_gbs(max(_SMALLEST_MEMORY_COPY, 4 * l3))),
        ),
    )


def cache_bytes(name: str) -> int:
    """Size of the first processor's cache of that name."""
    try:
        text = (_CACHES / f"index{name[1:]}" / "size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):  # not Linux, not there, or told in another unit
        return _USUAL_CACHES[name]


def fma_gflops(threads: int, isa: str) -> float:
    """GFLOP/s of a loop of float32 multiply-adds in the registers of ``isa``, on all threads at once."""
    flop_of_one_round = _C.multiply_adds(1, 0.5, 1.0, isa)[0]
    rounds = _LOOP_FLOP // flop_of_one_round
    with ThreadPoolExecutor(threads) as pool:

        def on_all_threads() -> None:
            for loop in [pool.submit(_C.multiply_adds, rounds, 0.5, 1.0, isa) for _ in range(threads)]:
                loop.result()

        return 1e-6 * threads * rounds * flop_of_one_round / _fastest(on_all_threads)


def mm_gflops() -> float:
    """GFLOP/s of ``torch.mm`` on float32 matrices of 1024 x 1024, at torch's threads."""
    a, b = torch.randn(_MATRIX, _MATRIX), torch.randn(_MATRIX, _MATRIX)
    return 2e-6 * _MATRIX**3 / _fastest(lambda: torch.mm(a, b))


def _copy_gbs(size: int) -> float:
    """Of one thread; source and destination have ``size`` bytes together. NumPy begins sooner than torch.

    A negation reads and writes what a copy does. It is not ``memcpy``, whose ``rep movsb`` takes AMD's Zen 3 from 50 to
    4 GB/s where the destination lies just behind the source, by their addresses modulo a page.
    """
    source = np.ones(size // 8, np.float32)
    destination = np.empty_like(source)
    copies = 50  # in one timed call, since one takes microseconds

    def copy() -> None:
        for _ in range(copies):
            np.negative(source, out=destination)

    return 1e-6 * copies * size / _fastest(copy)


def _torch_copy_gbs(size: int) -> float:
    """Of all threads; source and destination have ``size`` bytes together."""
    source = torch.ones(size // 8)
    destination = torch.empty_like(source)
    return 1e-6 * size / _fastest(lambda: destination.copy_(source))


def _fastest(call: Callable[[], object]) -> float:
    """Milliseconds."""
    return min(time_interleaved({"": call}, _REPEATS)[""].samples)


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
