# SPDX-License-Identifier: BSD-3-Clause
"""What the times depend on besides the code."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusedsep import _C
from fusedsep.cli import _limits, _output, _peers


def machine() -> dict[str, Any]:
    """Processor, ISA, threads and versions; how far torch's own kernels go, how fast a matrix product is here, and how
    fast multiply-adds in registers are."""
    return {
        **_output.machine(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sgemm_gflops": sgemm_gflops(),
        "fma_gflops": fma_gflops(),
        "peers": _peers.versions(_peers.PEERS),
    }


@functools.cache
def fma_gflops() -> float:
    """Of the ISA in use; at the threads of the first call. Nothing comes out above."""
    return _limits.fma_gflops(torch.get_num_threads(), _C.active_isa())


@functools.cache
def sgemm_gflops() -> float:
    """GFLOP/s of the fastest of 20 calls of ``torch.mm`` on float32 matrices of 1024 x 1024.

    At the threads of the first call. It stands for the processor's limit, and is not it: a block may come out above.
    """
    return _limits.mm_gflops()
