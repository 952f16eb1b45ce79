# SPDX-License-Identifier: BSD-3-Clause
"""The operator of a chain of layers: against ATen in float64, on every ISA, batch and number of threads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from chain_layers import (
    Layer,
    arguments,
    assert_close,
    branching_network,
    combined,
    depthwise_map,
    exact,
    excited_network,
    expand,
    gate,
    joined_network,
    multiplied_network,
    network,
    normalized_network,
    pixels,
    residual_network,
    run,
    upsampling_network,
    whole_network,
)

from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, MEANS, PATCHES, PATCHES_OF_NCHW, SUM


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


@pytest.mark.parametrize(
    ("stride", "dilation", "pads"),
    [(1, 1, (1, 1, 1, 1)), (2, 1, (0, 1, 0, 1)), (1, 2, (2, 2, 2, 2)), (1, 1, (2, 2, 2, 2))],
)
def test_whole_convolutions_of_many_channels(isa, stride, dilation, pads):
    """Depths of several chains of sums; maps of a column, of fewer than a tile has pixels, and of several tiles."""
    torch.manual_seed(15)
    for channels, (height, width) in itertools.product((40, 150), ((5, 3), (14, 14), (60, 37))):
        layers = [Layer(PATCHES, channels, 37, stride, dilation, pads, (0, 1))]
        x = torch.randn(3, channels, height, width)
        assert_close(run(layers, x), exact(layers, x))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
def test_depthwise_alone_of_any_channels(isa, dtype, kernel):
    """Channels around vectors and cache lines, columns around register tiles."""
    torch.manual_seed(8)
    for channels, stride, activation in itertools.product((1, 3, 4, 8, 15, 16, 17, 31, 40, 70), (1, 2), (0, 3)):
        layers = [depthwise_map(channels, kernel, stride, activation=activation)]
        for height, width in ((1, 1), (kernel, 5), (9, 12), (12, 13), (3, 29), (15, 50)):
            x = torch.randn(2, channels, height, width, dtype=dtype)
            assert_close(run(layers, x), exact(layers, x))


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (0, 1, 2, 0), (2, 1, 0, 3), (9, 11, 12, 10)])
def test_depthwise_alone_of_any_padding(isa, kernel, pads):
    torch.manual_seed(8)
    for stride, size in itertools.product((1, 2), (kernel, kernel + 1, 15)):
        layers = [depthwise_map(19, kernel, stride, pads, activation=2)]
        x = torch.randn(2, 19, size, size + 1)
        y = run(layers, x)
        assert_close(y, exact(layers, x))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("dilation", [2, 3, 12])
def test_depthwise_alone_of_any_dilation(isa, dtype, kernel, dilation):
    """Of maps that are larger than the window and smaller, down to the tap in the middle."""
    torch.manual_seed(8)
    for stride, (height, width) in itertools.product((1, 2), ((1, 1), (2, 30), (7, 5), (14, 15), (41, 33))):
        for pads in (None, (11 * dilation, 10 * dilation, 9 * dilation, 12 * dilation)):
            layers = [depthwise_map(37, kernel, stride, pads, activation=3, dilation=dilation)]
            x = torch.randn(2, 37, height, width, dtype=dtype)
            assert_close(run(layers, x), exact(layers, x))


def test_dilated_depthwise_with_a_residual_in_threads(isa):
    torch.manual_seed(8)
    layers = [depthwise_map(70, 5, dilation=3), depthwise_map(70, 3, dilation=2, residual=0, joined_activation=2)]
    x = torch.randn(3, 70, 21, 20)
    expected = run(layers, x)
    assert_close(expected, exact(layers, x))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(layers, x), expected)


def test_map_wider_than_a_chain_of_sums():
    torch.manual_seed(2)
    layers = [Layer(MEANS, 5, 3, pads=(0, 0, 0, 0), activations=(0, 0))]
    for size in (1, 11, 12, 40):
        x = 1000 + torch.randn(3, 5, size, size)
        assert_close(run(layers, x), exact(layers, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [residual_network, excited_network, whole_network])
def test_networks(isa, make, dtype):
    torch.manual_seed(5)
    layers = make()
    for threads, batch in itertools.product((1, 2), (1, 2, 5)):
        torch.set_num_threads(threads)
        x = torch.randn(batch, 3, 21, 26, dtype=dtype)
        for length in range(2, len(layers) + 1):
            assert_close(run(layers[:length], x), exact(layers[:length], x))


#: Where all maps that have been written whole are also read, so that a chain may end.
ENDS_OF_BRANCHES = (6, 7, 9, 11, 14, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [1, 3, 4])
def test_channels_of_maps(isa, dtype, activation):
    """Layers that read and write some channels of a map, which begin and end anywhere in a vector."""
    torch.manual_seed(10)
    for width, batch in itertools.product((5, 8, 12, 16, 31), (1, 3)):
        layers = branching_network(width, activation)
        x = torch.randn(batch, 3, 21, 26, dtype=dtype)
        for length in ENDS_OF_BRANCHES:
            assert_close(run(layers[:length], x), exact(layers[:length], x))


def test_maps_side_by_side_are_the_same_bits(isa):
    """What is written into a larger map, and read from there, as what has a map of its own."""
    torch.manual_seed(13)
    layers = branching_network(12)[:6]
    alone = [Layer(DEPTHWISE, 29, 15), pixels(15, 9)]
    x = torch.randn(2, 3, 40, 38)
    whole = run(layers, x)
    for begin, end in ((0, 15), (15, 22), (22, 36)):
        read = {"input": 4, "input_begin": begin, "in_channels": end - begin}
        last = combined(SUM, end - begin, **read)
        assert torch.equal(run([*layers, last], x), whole[:, begin:end])
    first = run(alone, whole[:, 3:32].contiguous())
    alone[0].numbers = alone[0].numbers._replace(input=4, input_begin=3, in_channels=29)
    assert torch.equal(run([*layers, *alone], x), first)


def test_the_input_of_a_chain_is_gated(isa):
    torch.manual_seed(6)
    for channels, size in itertools.product((1, 8, 17, 40), (1, 5, 14)):
        layers = [*gate(channels, 6, (4, 6), 0, 19, activation=4), expand(19, 3)]
        x = torch.randn(3, channels, size, size + 1)
        for length in (3, 4):
            assert_close(run(layers[:length], x), exact(layers[:length], x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [4, 5, 6, 7])
def test_activations_of_what_was_stored(isa, dtype, activation):
    """Behind every kind of layer, in whole vectors and not."""
    torch.manual_seed(7)
    for channels in (1, 7, 16, 33):
        for layer in (
            expand(channels, 19, activation),
            Layer(PATCHES, channels, 19, 2, activations=(0, activation)),
            Layer(PATCHES_OF_NCHW, channels, 19, 2, activations=(0, activation)),
            Layer(DEPTHWISE, channels, 19, activations=(1, activation)),
            Layer(DEPTHWISE, channels, channels, activations=(1, activation), residual=0),
            depthwise_map(channels, 5, activation=activation),
            depthwise_map(channels, 3, activation=activation, residual=0),
            Layer(MEANS, channels, 19, pads=(0, 0, 0, 0), activations=(0, activation)),
        ):
            x = torch.randn(2, channels, 9, 11, dtype=dtype)
            assert_close(run([layer], x), exact([layer], x))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-36), (torch.float64, 1e-300)])
@pytest.mark.parametrize("activation", [4, 5])
def test_exp_is_exact_to_the_last_places(isa, dtype, least, activation):
    x = torch.cat([torch.linspace(-110, 110, 20_001), torch.linspace(-1, 1, 20_001), torch.linspace(-750, 750, 999)])
    x = x.to(dtype)
    layer = expand(1, 1, activation)
    layer.weight.fill_(1), layer.bias.zero_()
    ours = run([layer], x.view(1, 1, 1, -1)).flatten().numpy().astype(np.longdouble)
    values = x.numpy().astype(np.longdouble)
    exact = (values if activation == 4 else 1) / (1 + np.exp(-values))
    large = np.abs(exact) >= least
    assert large.mean() > 0.8
    assert (np.abs(ours - exact)[large] <= 2 * torch.finfo(dtype).eps * np.abs(exact)[large]).all()
    assert (np.abs(ours)[~large] <= 2 * least).all()


@pytest.mark.parametrize(("dtype", "most", "least"), [(torch.float32, 14, 1e-36), (torch.float64, 39, 1e-300)])
def test_gelu_is_exact_to_the_last_places(isa, dtype, most, least):
    x = torch.cat([torch.linspace(-most, most, 20_001), torch.linspace(-1, 1, 20_001)]).to(dtype)
    layer = combined(SUM, 1, joined_activation=7)
    ours = run([layer], x.view(1, 1, 1, -1)).flatten().numpy().astype(np.longdouble)
    values = x.numpy().astype(np.longdouble)
    # erfc in float64, and its slope times what is left of the argument.
    wide = -values / np.sqrt(np.longdouble(2))
    near = wide.astype(np.float64)
    slope = -2 / np.sqrt(np.longdouble(np.pi)) * np.exp(-wide * wide)
    exact = values / 2 * (np.array([math.erfc(z) for z in near]) + slope * (wide - near))
    large = np.abs(exact) >= least
    # Without fused multiply-adds the square in the exponent is rounded, to half a unit of up to (most ** 2) / 2.
    places = 4 if isa in ("avx2", "avx512") else 4 + most**2 / 4
    assert (np.abs(ours - exact)[large] <= places * torch.finfo(dtype).eps * np.abs(exact)[large]).all()
    assert large.mean() > 0.9 and (np.abs(ours)[~large] <= 2 * least).all()


def test_activations_of_what_is_not_finite(isa):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, -0.0, *4 * [nan]]).view(1, 1, 2, 5)
    for activation, expected in {
        4: [nan, inf, nan, 3e38, 0, 0],
        5: [nan, 1, 0, 1, 0, 0.5],
        6: [nan, 1, 0, 1, 0, 0.5],
        7: [nan, inf, 0, 3e38, 0, 0],
    }.items():
        layer = expand(1, 1, activation)
        layer.weight.fill_(1), layer.bias.zero_()
        y = run([layer], x).flatten()
        torch.testing.assert_close(y[:6], torch.tensor(expected, dtype=torch.float32), equal_nan=True)
        assert y[6:].isnan().all()


def test_the_input_of_a_chain_is_added(isa):
    torch.manual_seed(6)
    for channels, size in itertools.product((1, 8, 17, 40), (1, 5, 14)):
        layers = [
            expand(channels, 35),
            Layer(DEPTHWISE, 35, channels, residual=0),
            depthwise_map(channels, 5, residual=0),
            expand(channels, 3),
        ]
        x = torch.randn(3, channels, size, size + 1)
        for length in (1, 2, 3, 4):
            assert_close(run(layers[:length], x), exact(layers[:length], x))


def test_a_map_for_much_later_is_kept():
    torch.manual_seed(7)
    layers = [Layer(DEPTHWISE, 16, 16, residual=i if i in (0, 3) else -1) for i in range(8)]
    layers[5].numbers = layers[5].numbers._replace(residual=1)
    layers[6].numbers = layers[6].numbers._replace(residual=2)
    layers[7].numbers = layers[7].numbers._replace(residual=1)
    x = torch.randn(2, 16, 9, 9)
    assert_close(run(layers, x), exact(layers, x))


def test_no_map_lies_on_another_one():
    """Small and large maps in turns, and two large ones."""
    torch.manual_seed(9)
    channels = [4, 40, 4, 40, 40, 3, 17, 16]
    layers = [Layer(DEPTHWISE, a, b) for a, b in itertools.pairwise(channels)]
    x = torch.randn(2, 4, 11, 12)
    y = x
    for layer in layers:
        y = run([layer], y)
    assert torch.equal(run(layers, x), y)


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: network(PATCHES, 3, 32), 3),
        (lambda: residual_network(24), 3),
        (lambda: whole_network(24), 3),
        (lambda: excited_network(24), 3),
        (lambda: joined_network(24), 3),
        (lambda: branching_network(24), 3),
        (lambda: normalized_network(40), 40),
        (lambda: [depthwise_map(24, 5, 2), depthwise_map(24, 7, activation=3)], 24),
    ],
)
def test_same_bits_for_every_batch_and_thread_count(isa, make, channels):
    torch.manual_seed(3)
    layers = make()
    x = torch.randn(7, channels, 40, 36)
    torch.set_num_threads(1)
    alone = torch.cat([run(layers, image) for image in x.split(1)])
    for threads, batch in itertools.product((1, 2, 3, 8), (1, 2, 3, 7)):
        torch.set_num_threads(threads)
        assert torch.equal(run(layers, x[:batch]), alone[:batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_of_either_memory_format(isa, dtype):
    torch.manual_seed(9)
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    for channels, out_channels, size in itertools.product((1, 7, 16, 33), (1, 8, 19), ((1, 1), (1, 5), (13, 31))):
        x, packed, text = arguments([pixels(channels, out_channels, 1)], torch.randn(3, channels, *size, dtype=dtype))
        expected = _ops.chain(x, packed, text)
        for threads, from_last, to_last in itertools.product((1, 3), formats, formats):
            torch.set_num_threads(threads)
            y = _ops.chain(x.contiguous(memory_format=formats[from_last]), packed, text, to_last)
            assert torch.equal(y, expected) and y.is_contiguous(memory_format=formats[to_last])
    x, packed, text = arguments([Layer(PATCHES_OF_NCHW, 3, 17, 2, activations=(0, 1))], torch.randn(2, 3, 40, 42))
    assert torch.equal(_ops.chain(x, packed, text, False), _ops.chain(x, packed, text))


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
    utils = ("test_schema", "test_faketensor")
    for layers in (
        *(network(PATCHES)[:length] for length in range(1, 6)),
        residual_network(),
        whole_network(),
        joined_network(),
        multiplied_network(),
        normalized_network(3),
        *(upsampling_network()[:length] for length in (6, 7, 9, 10)),
        *(joined_network()[:length] for length in (8, 14)),
        excited_network(),
        *(excited_network()[:length] for length in (3, 4, 5)),
        *(branching_network()[:length] for length in ENDS_OF_BRANCHES),
        [depthwise_map(3, 7, 2)],
    ):
        inputs = arguments(layers, torch.randn(2, 3, 16, 24))
        torch.library.opcheck(_ops.chain, inputs, test_utils=utils)
        torch.library.opcheck(_ops.chain, (*inputs, False), test_utils=utils)
    for kernel in (3, 7, 11):
        weight, scale = torch.randn(5, 1, kernel, kernel), torch.ones(5).double()
        torch.library.opcheck(_ops.pack_depthwise, (weight, scale, scale), test_utils=utils)
