# SPDX-License-Identifier: BSD-3-Clause
"""Products of pixels that are normalized over their channels, as layers of the chain operator: against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from chain_layers import EPS, arguments, assert_close, exact, normalized, normalized_network, pixels, run
from test_chain_op_errors import changed_text

from fusedsep import _ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_float64(isa, dtype):
    """Channels around vectors, chains of sums and tiles; maps of a pixel, and of several tiles."""
    torch.manual_seed(0)
    for channels, (height, width) in itertools.product((1, 3, 8, 15, 16, 17, 40, 150, 400), ((1, 1), (5, 7), (30, 31))):
        layers = [normalized(channels, 37, activation=1)]
        x = 3 * torch.randn(2, channels, height, width, dtype=dtype) + 1
        assert_close(run(layers, x), exact(layers, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks(isa, dtype):
    torch.manual_seed(1)
    layers = normalized_network()
    x = torch.randn(3, 9, 14, 11, dtype=dtype)
    for length in range(1, len(layers) + 1):
        assert_close(run(layers[:length], x), exact(layers[:length], x))


def test_channels_of_a_map(isa):
    """Only those that it reads count for the mean."""
    torch.manual_seed(2)
    layers = [pixels(9, 40), normalized(21, 17, input=1, input_begin=4, in_channels=21)]
    x = torch.randn(2, 9, 6, 5)
    assert_close(run(layers, x), exact(layers, x))


@pytest.mark.parametrize(("mean", "deviation"), [(1000.0, 1.0), (0.0, 1e-6), (-3.0, 0.0), (0.0, 1e15)])
def test_as_exact_as_torch(isa, mean, deviation):
    """Where a formula with the mean of squares would lose everything, and where eps counts."""
    torch.manual_seed(3)
    layers = [normalized(100, 100)]
    layers[0].weight.copy_(torch.eye(100)), layers[0].bias.zero_()
    x = mean + deviation * torch.randn(2, 100, 9, 8)
    expected = exact(layers, x)
    torchs = F.layer_norm(x.movedim(1, -1), (100,), eps=EPS).movedim(-1, 1)
    allowed = 3 * (torchs.double() - expected).abs().max() + 4 * torch.finfo(torch.float).eps * expected.abs().max()
    assert (run(layers, x).double() - expected).abs().max() <= allowed


def test_what_is_not_finite_stays_in_its_pixel(isa):
    x = torch.randn(1, 20, 3, 3)
    layers = [normalized(20, 5)]
    x[0, 7, 0, 1], x[0, 3, 2, 2] = float("nan"), float("inf")
    isnan = run(layers, x).isnan()
    assert isnan[0, :, 0, 1].all() and isnan[0, :, 2, 2].all() and isnan.sum() == 10


def test_refuses_what_it_cannot_run():
    x, packed, text = arguments([normalized(8, 8), normalized(8, 8)], torch.randn(1, 8, 4, 4))
    for message, fields in {
        "have no stride": {"stride": 2},
        "has no padding": {"pad_top": 1},
        "must be a 1x1 convolution, or a sum": {"gated": 0},
        "packed must hold": {"out_channels": 7},
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(x, packed, changed_text(text, 1, **fields))
