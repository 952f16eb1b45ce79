# SPDX-License-Identifier: BSD-3-Clause
"""One depthwise-separable block at a time, batch 1."""

from __future__ import annotations

import pytest
import shapes
import subjects

ENGINES = subjects.ENGINES


@pytest.fixture(scope="module", params=shapes.BLOCKS, ids=lambda shape: shape.test_id)
def block(request):
    return subjects.block(request.param)


def test_block(block, time_variant):
    time_variant(block)
