# SPDX-License-Identifier: BSD-3-Clause
"""Whole MobileNetV1s, batch 1."""

from __future__ import annotations

import pytest
import shapes
import subjects

ENGINES = subjects.ENGINES


@pytest.fixture(scope="module", params=shapes.NETWORKS, ids=lambda network: "{}-{}".format(*network))
def network(request):
    return subjects.network(*request.param)


def test_network(network, time_variant):
    time_variant(network)
