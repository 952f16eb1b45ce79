# SPDX-License-Identifier: BSD-3-Clause
"""The operator of a chain of layers: against ATen in float64, on every ISA, batch and number of threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from chain_layers import (
    Layer,
    arguments,
    depthwise_map,
    exact,
    excited_network,
    expand,
    gate,
    network,
    residual_network,
    run,
    whole_network,
)

from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, MEANS, PATCHES, PATCHES_OF_NCHW, PIXELS, ChainLayer


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_alone_of_any_channels(isa, dtype, kernel):
    """Channels around vectors and cache lines, columns around register tiles."""
    torch.manual_seed(8)
    for channels, stride, activation in itertools.product((1, 3, 4, 8, 15, 16, 17, 31, 40, 70), (1, 2), (0, 3)):
        layers = [depthwise_map(channels, kernel, stride, activation=activation)]
        for height, width in ((1, 1), (kernel, 5), (9, 12), (12, 13), (3, 29), (15, 50)):
            x = torch.randn(2, channels, height, width, dtype=dtype)
            assert_close(run(layers, x), exact(layers, x))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (0, 1, 2, 0), (2, 1, 0, 3), (9, 11, 12, 10)])
def test_depthwise_alone_of_any_padding(isa, kernel, pads):
    torch.manual_seed(8)
    for stride, size in itertools.product((1, 2), (7, 8, 15)):
        layers = [depthwise_map(19, kernel, stride, pads, activation=2)]
        x = torch.randn(2, 19, size, size + 1)
        y = run(layers, x)
        assert_close(y, exact(layers, x))
        assert y.is_contiguous(memory_format=torch.channels_last)


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


def test_the_input_of_a_chain_is_gated(isa):
    torch.manual_seed(6)
    for channels, size in itertools.product((1, 8, 17, 40), (1, 5, 14)):
        layers = [*gate(channels, 6, (4, 6), 0, 19, activation=4), expand(19, 3)]
        x = torch.randn(3, channels, size, size + 1)
        for length in (3, 4):
            assert_close(run(layers[:length], x), exact(layers[:length], x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [4, 5, 6])
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


def test_activations_of_what_is_not_finite(isa):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, -0.0, *4 * [nan]]).view(1, 1, 2, 5)
    for activation, expected in {
        4: [nan, inf, nan, 3e38, 0, 0],
        5: [nan, 1, 0, 1, 0, 0.5],
        6: [nan, 1, 0, 1, 0, 0.5],
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
        excited_network(),
        *(excited_network()[:length] for length in (3, 4, 5)),
        [depthwise_map(3, 7, 2)],
    ):
        inputs = arguments(layers, torch.randn(2, 3, 16, 18))
        torch.library.opcheck(_ops.chain, inputs, test_utils=utils)
    for kernel in (3, 5, 7):
        weight, scale = torch.randn(5, 1, kernel, kernel), torch.ones(5).double()
        torch.library.opcheck(_ops.pack_depthwise, (weight, scale, scale), test_utils=utils)


def test_refuses_what_it_cannot_run():
    layers = network(PATCHES)
    x, packed, numbers = arguments(layers, torch.randn(1, 3, 16, 16))
    width = len(ChainLayer._fields)
    for message, wrong in {
        "multiple of 13 numbers, got 9": (x, packed, numbers[:9]),
        "multiple of 13 numbers, got 0": (x, packed, []),
        "packed must hold the weights of layer 4": (x, packed[:-1], numbers),
        "and nothing else": (x, packed, numbers[:-width]),
        "of the dtype of x": (x.double(), packed, numbers),
        "contiguous in channels_last": (x.contiguous(), packed, numbers),
        "only the first layer of a chain can read NCHW": (x, packed, [*numbers[:width], 2, *numbers[width + 1 :]]),
        "rows must be from 0 to 5, got 6": (x, packed, [6, *numbers[1:]]),
        "stride must be from 1 to 2, got 3": (x, packed, [*numbers[:2], 3, *numbers[3:]]),
        "residual must be from -1 to 0, got 1": (x, packed, [*numbers[:10], 1, *numbers[11:]]),
        "cannot have a residual": (x, packed, [*numbers[:62], 0, *numbers[63:]]),
        "a map of the same shape": (x, packed, [*numbers[:23], 1, *numbers[24:]]),
        "kernel must be from 3 to 3, got 5": (x, packed, [*numbers[:11], 5, *numbers[12:]]),
        "gated must be from -1 to 0, got 1": (x, packed, [*numbers[:25], 1, *numbers[26:]]),
        "with a gated map must be a 1x1 convolution": (x, packed, [*numbers[:25], 0, *numbers[26:]]),
        "activation must be from 0 to 6, got 7": (x, packed, [*numbers[:9], 7, *numbers[10:]]),
        "separable convolution in a chain, activation must be from 0 to 3": (
            *(x, packed),
            [*numbers[:21], 4, *numbers[22:]],
        ),
        "neither stride nor padding": (x, packed, [4, *numbers[1:]]),
        "x is too small": (x[:, :, :1, :1].contiguous(memory_format=torch.channels_last), packed, numbers),
        "x must be a CPU tensor of shape": (x[0], packed, numbers),
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(*wrong)


def test_gates_refuse_what_they_cannot_run():
    x, packed, numbers = arguments(gate(8, 5, (1, 5), 0, 3), torch.randn(1, 8, 6, 6))
    width = len(ChainLayer._fields)

    def changed(layer, **fields):
        layers = [ChainLayer(*numbers[i : i + width]) for i in range(0, len(numbers), width)]
        layers[layer] = layers[layer]._replace(**fields)
        return [number for layer in layers for number in layer]

    for message, wrong in {
        "must give a factor for each of its channels": (x, packed, changed(2, gated=1)),
        "gated must be from -1 to 1, got 2": (x, packed, changed(2, gated=2)),
        "must be a 1x1 convolution": (x, packed, changed(2, gated=0, rows=DEPTHWISE)),
        "a map of the same shape": (x, packed, changed(2, residual=0)),
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(*wrong)
    large = [expand(8, 8), Layer(PIXELS, 8, 3, 1, 1, (0, 0, 0, 0), gated=0)]
    with pytest.raises(RuntimeError, match="must give a factor for each"):
        run(large, torch.randn(1, 8, 6, 6))
    first = [Layer(PATCHES_OF_NCHW, 3, 3, 2), *gate(3, 2, (1, 5), 0, 3)]
    with pytest.raises(RuntimeError, match="an input in NCHW cannot be gated"):
        run(first, torch.randn(1, 3, 6, 6))


def test_depthwise_alone_refuses_what_it_cannot_run():
    x, packed, numbers = arguments([depthwise_map(8, 5)], torch.randn(1, 8, 16, 16))

    def changed(**fields):
        return list(ChainLayer(*numbers)._replace(**fields))

    for message, wrong in {
        "kernel must be from 3 to 7, got 9": (x, packed, changed(kernel=9)),
        "kernel must be odd": (x, packed, changed(kernel=4)),
        "weights of layer 0": (x, packed, changed(kernel=7)),
        "has dilation 1 and one activation": (x, packed, changed(dilation=2)),
        "one activation": (x, packed, changed(pointwise_activation=1)),
        "as many output channels as input channels": (x, packed, changed(out_channels=9)),
        "does not hold a 5x5 kernel": (x[:, :, :3, :], packed, changed(pad_top=0, pad_bottom=1)),
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(*wrong)
    weight = torch.randn(8, 1, 5, 5)
    for message, arguments_of_pack in {
        r"weight must be a contiguous CPU tensor of shape \[C, 1, K, K\]": (weight[:, :, :4], None, None),
        "with K 3, 5 or 7": (torch.randn(8, 1, 4, 4), None, None),
        "float32 or float64": (weight.half(), None, None),
        "scale must be a contiguous float64 CPU tensor of 8 elements": (weight, torch.ones(8), None),
        "bias must be a contiguous float64 CPU tensor of 8 elements": (weight, None, torch.ones(7).double()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            _ops.pack_depthwise(*arguments_of_pack)
