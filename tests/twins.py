# SPDX-License-Identifier: BSD-3-Clause
"""A block and its unfused twin, and how near they must be."""

from __future__ import annotations

import torch
from randomize import randomized

from fusedsep import DepthwiseSeparableBlock, reference


def twins(*args, dtype=torch.double, **kwargs):
    """A block with random BNs and its unfused twin with the same numbers, both in eval mode."""
    block = randomized(DepthwiseSeparableBlock(*args, dtype=dtype, **kwargs)).eval()
    twin = reference.DepthwiseSeparableBlock(*args, dtype=dtype, **kwargs).eval()
    twin.load_state_dict(block.state_dict())
    return block, twin


def random(*shape, seed=0, dtype=torch.double):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_close(actual, expected):
    single = actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4 if single else 1e-10, atol=1e-5 if single else 1e-12)
