# SPDX-License-Identifier: BSD-3-Clause
"""Layers of the chain operator without weights, and what is added to, multiplied by or applied to what others give."""

from __future__ import annotations

import itertools

import pytest
import torch
from chain_layers import (
    assert_close,
    combined,
    exact,
    joined_network,
    max_pool,
    multiplied_network,
    run,
    upsample,
    upsampling_network,
)

from fusedsep._ops import INTERLEAVED, SUM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", range(8))
def test_activations_of_sums(isa, dtype, activation):
    torch.manual_seed(14)
    for width, batch in itertools.product((5, 16), (1, 3)):
        layers = joined_network(width, activation)
        x = torch.randn(batch, 3, 21, 26, dtype=dtype)
        for length in range(2, len(layers) + 1):
            assert_close(run(layers[:length], x), exact(layers[:length], x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", range(8))
def test_products_of_maps(isa, dtype, activation):
    torch.manual_seed(15)
    for width, batch in itertools.product((5, 16), (1, 3)):
        layers = multiplied_network(width, activation)
        x = torch.randn(batch, 3, 21, 26, dtype=dtype)
        for threads, length in itertools.product((1, 3), (2, 3, 4, 5, 6, 7, 8, 11, 12)):
            torch.set_num_threads(threads)
            assert_close(run(layers[:length], x), exact(layers[:length], x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_maps_as_one(isa, dtype):
    torch.manual_seed(11)
    for channels, begin in itertools.product((1, 2, 4, 7, 8, 9, 16, 23, 33), (0, 1, 5)):
        x = torch.randn(2, channels + begin, 5, 6, dtype=dtype)
        a, b = x[:, begin:], x[:, :channels]
        read = {"input": 0, "input_begin": begin, "in_channels": channels}
        assert torch.equal(run([combined(SUM, channels, **read)], x), a)
        assert torch.equal(run([combined(SUM, channels, 0, **read)], x), a + b)
        assert torch.equal(run([combined(SUM, channels, 0, multiplies=1, **read)], x), a * b)
        expected = torch.stack([a, b], 2).flatten(1, 2)
        assert torch.equal(run([combined(INTERLEAVED, channels, 0, **read)], x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_max_pools(isa, dtype):
    """As torch's, with numbers that are not finite too."""
    torch.manual_seed(12)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    for channels, kernel, stride in itertools.product((1, 4, 9, 16, 40), (2, 3, 4, 5, 13), (1, 2)):
        for padding, size in itertools.product({0, 1, kernel // 2}, (kernel, kernel + 5, kernel + 6)):
            x = torch.randn(2, channels, size, size + 1, dtype=dtype)
            where = torch.rand_like(x) < 0.1
            x[where] = special[torch.randint(4, (int(where.sum()),))]
            y = run([max_pool(channels, kernel, stride, padding)], x)
            expected = torch.nn.functional.max_pool2d(x, kernel, stride, padding)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upsampling(isa, dtype):
    torch.manual_seed(12)
    for channels, batch in itertools.product((1, 3, 4, 8, 9, 16, 40), (1, 2)):
        for height, width in ((1, 1), (1, 5), (6, 3)):
            x = torch.randn(batch, channels, height, width, dtype=dtype)
            assert torch.equal(run([upsample(channels)], x), torch.nn.functional.interpolate(x, scale_factor=2))
    for width, batch in itertools.product((5, 16), (1, 3)):
        layers = upsampling_network(width)
        x = torch.randn(batch, 3, 24, 28, dtype=dtype)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for length in (6, 7, 9, 10):
                assert_close(run(layers[:length], x), exact(layers[:length], x))
