# SPDX-License-Identifier: BSD-3-Clause
"""The operator of a chain of layers: against ATen in float64, on every ISA, batch and number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from chain_layers import Layer, arguments, exact, network, run

from fusedsep import _ops
from fusedsep._ops import MEANS, PATCHES, PATCHES_OF_NCHW, ChainLayer


def assert_close(ours, exact):
    eps = torch.finfo(ours.dtype).eps
    assert ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= 64 * eps * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [PATCHES, PATCHES_OF_NCHW])
def test_matches_float64(isa, dtype, first):
    torch.manual_seed(0)
    for channels, (height, width), batch in itertools.product((1, 3, 5), ((9, 12), (33, 31)), (1, 2, 5)):
        layers = network(first, channels)
        x = torch.randn(batch, channels, height, width, dtype=dtype)
        for length in range(1, len(layers) + 1):
            assert_close(run(layers[:length], x), exact(layers[:length], x))


@pytest.mark.parametrize(
    ("stride", "dilation", "pads"), [(1, 1, (1, 1, 1, 1)), (1, 3, (3, 0, 1, 4)), (2, 2, (5, 6, 7, 8))]
)
def test_first_convolution_of_any_geometry(isa, stride, dilation, pads):
    torch.manual_seed(1)
    for first, size in itertools.product((PATCHES, PATCHES_OF_NCHW), (7, 8, 15)):
        layers = [Layer(first, 3, 37, stride, dilation, pads, (0, 1))]
        x = torch.randn(2, 3, size, size + 1)
        y = run(layers, x)
        assert_close(y, exact(layers, x))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_convolution_of_any_channels(isa, dtype):
    """Output channels around whole, half and several vectors; depths of one chain of sums and of several."""
    torch.manual_seed(6)
    for first, channels, out_channels in itertools.product(
        (PATCHES, PATCHES_OF_NCHW), (3, 15), (1, 4, 5, 8, 9, 16, 24, 40, 45, 70)
    ):
        layers = [Layer(first, channels, out_channels, 2, activations=(0, 3))]
        x = torch.randn(2, channels, 9, 70, dtype=dtype)
        assert_close(run(layers, x), exact(layers, x))


def test_map_wider_than_a_chain_of_sums():
    torch.manual_seed(2)
    layers = [Layer(MEANS, 5, 3, pads=(0, 0, 0, 0), activations=(0, 0))]
    for size in (1, 11, 12, 40):
        x = 1000 + torch.randn(3, 5, size, size)
        assert_close(run(layers, x), exact(layers, x))


def test_same_bits_for_every_batch_and_thread_count():
    torch.manual_seed(3)
    layers = network(PATCHES, 3, 32)
    x = torch.randn(7, 3, 40, 36)
    torch.set_num_threads(1)
    alone = torch.cat([run(layers, image) for image in x.split(1)])
    for threads, batch in itertools.product((1, 2, 3, 8), (1, 2, 3, 7)):
        torch.set_num_threads(threads)
        assert torch.equal(run(layers, x[:batch]), alone[:batch])


def test_more_images_than_stay_in_the_cache():
    torch.manual_seed(4)
    layers = network(PATCHES_OF_NCHW)
    x = torch.randn(301, 3, 20, 20)  # some dozens at once
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_close(run(layers, x), exact(layers, x))


def test_empty_batch():
    assert run(network(PATCHES), torch.randn(0, 3, 16, 16)).shape == (0, 13)


def test_shapes_while_tracing():
    for length in range(1, 6):
        layers = network(PATCHES)[:length]
        inputs = arguments(layers, torch.randn(2, 3, 16, 18))
        torch.library.opcheck(_ops.chain, inputs, test_utils=("test_schema", "test_faketensor"))


def test_refuses_what_it_cannot_run():
    layers = network(PATCHES)
    x, packed, numbers = arguments(layers, torch.randn(1, 3, 16, 16))
    width = len(ChainLayer._fields)
    for message, wrong in {
        "multiple of 10 numbers, got 9": (x, packed, numbers[:9]),
        "multiple of 10 numbers, got 0": (x, packed, []),
        "packed must hold the weights of layer 4": (x, packed[:-1], numbers),
        "and nothing else": (x, packed, numbers[:-width]),
        "of the dtype of x": (x.double(), packed, numbers),
        "contiguous in channels_last": (x.contiguous(), packed, numbers),
        "must be the first layer": (x, packed, numbers + numbers[:width]),
        "nothing may follow": (x, packed, numbers + numbers[-width:]),
        "rows must be from 0 to 3, got 4": (x, packed, [4, *numbers[1:]]),
        "stride must be from 1 to 2, got 3": (x, packed, [*numbers[:2], 3, *numbers[3:]]),
        "x is too small": (x[:, :, :1, :1].contiguous(memory_format=torch.channels_last), packed, numbers),
        "x must be a CPU tensor of shape": (x[0], packed, numbers),
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(*wrong)
