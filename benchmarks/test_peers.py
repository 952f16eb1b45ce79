# SPDX-License-Identifier: BSD-3-Clause
"""Whole MobileNetV1s beside other engines, at batches 1 and 8. An engine that is not installed is skipped by name."""

from __future__ import annotations

import pytest
import shapes
import subjects

ENGINES = subjects.PEER_ENGINES


@pytest.fixture(scope="module", params=shapes.PEER_NETWORKS, ids=lambda network: "{}-{}-batch{}".format(*network))
def network(request):
    return subjects.peer_network(*request.param)


def test_peers(network, time_variant):
    time_variant(network)
