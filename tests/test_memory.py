# SPDX-License-Identifier: BSD-3-Clause
"""The map between the two convolutions never exists: scratch is a few hundred KiB a thread, whatever the image size."""

from __future__ import annotations

import itertools
import mmap
import threading

import pytest
import torch
from memory_growth import CANNOT_MEASURE
from subprocesses import run_script
from torch.profiler import ProfilerActivity, profile

from fusedsep import DepthwiseSeparableBlock

KIB = 1024
#: Of one thread. Above the 128 KiB that a tile takes are pages of code and stack that are touched for the first time.
LIMIT = 512 * KIB

FORMATS = pytest.mark.parametrize("memory_format", ["nchw", "channels_last"])


def growth(what: str, memory_format: str, threads: int, channels: int, size: int) -> int:
    """Bytes by which one call raises the peak of a fresh process, beyond operands and result."""
    result = run_script("memory_growth.py", what, memory_format, "portable", str(threads), str(channels), str(size))
    if result.returncode == CANNOT_MEASURE:
        pytest.skip("peak memory: this system does not reset it (/proc/self/clear_refs)")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@FORMATS
@pytest.mark.parametrize(("channels", "size", "threads"), [(16, 900, 1), (16, 900, 4), (1024, 90, 4)])
def test_kernels_need_scratch_for_a_tile(memory_format, channels, size, threads):
    assert growth("kernels", memory_format, threads, channels, size) <= threads * LIMIT


@FORMATS
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_need_scratch_for_a_tile(memory_format, threads):
    assert growth("block", memory_format, threads, 16, 900) <= threads * LIMIT


@FORMATS
@pytest.mark.parametrize("threads", [1, 2])
def test_a_frozen_network_needs_two_of_its_largest_maps(memory_format, threads):
    size = 900
    largest_map = 16 * (size // 2) ** 2 * 4
    assert growth("network", memory_format, threads, 3, size) <= 2 * largest_map + threads * LIMIT


def test_the_measurement_sees_the_map_of_unfused_torch():
    intermediate_map = 16 * 900 * 900 * 4
    assert growth("unfused", "nchw", 1, 16, 900) > intermediate_map / 2 > 40 * LIMIT


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_torch_allocates_the_output_and_nothing_else(memory_format):
    block = DepthwiseSeparableBlock(16, 4, 2).eval()
    x = torch.randn(2, 16, 60, 60).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        block(x)  # packs the weights
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            y = block(x)
    allocated = sum(max(event.cpu_memory_usage, 0) for event in recorded.events() if event.cpu_parent is None)
    assert allocated == y.nbytes


def test_threads_that_end_give_their_scratch_back():
    block = DepthwiseSeparableBlock(64, 8).eval()
    x = torch.randn(1, 64, 40, 40)

    def call() -> None:
        with torch.inference_mode():
            block(x)

    def in_fresh_threads(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    in_fresh_threads(20)
    sizes = [resident_bytes()]
    for _ in range(3):
        in_fresh_threads(100)
        sizes.append(resident_bytes())
    # 100 leaked tiles would take five times as much each time; once the allocator of an old process may take more.
    assert min(after - before for before, after in itertools.pairwise(sizes)) < 20 * 128 * KIB


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
