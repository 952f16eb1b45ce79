# SPDX-License-Identifier: BSD-3-Clause
"""Forward and backward of one depthwise-separable block at a time, batch 8."""

from __future__ import annotations

import pytest
import shapes
import training

ENGINES = training.TRAINING_ENGINES


@pytest.fixture(scope="module", params=shapes.BLOCKS, ids=lambda shape: shape.test_id)
def block(request):
    return training.block(request.param, batch=8)


def test_training_block(block, time_variant):
    time_variant(block)
