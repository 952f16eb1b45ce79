# SPDX-License-Identifier: BSD-3-Clause
"""What the operator of a chain refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from chain_layers import Layer, arguments, combined, depthwise_map, expand, gate, max_pool, network, run, upsample

from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, INTERLEAVED, PATCHES, PATCHES_OF_NCHW, PIXELS, SUM


def test_refuses_what_it_cannot_run():
    layers = network(PATCHES)
    x, packed, text = arguments(layers, torch.randn(1, 3, 16, 16))

    def changed(layer, **fields):
        return changed_text(text, layer, **fields)

    for message, wrong in {
        "multiple of 21 numbers, got 9": (x, packed, text[: 2 * 9]),
        "multiple of 21 numbers, got 0": (x, packed, ""),
        "layers must be numbers, got 'x 1'": (x, packed, text + "\nx 1"),
        "packed must hold the weights of layer 4": (x, packed[:-1], text),
        "and nothing else": (x, packed, text.rpartition("\n")[0]),
        "of the dtype of x": (x.double(), packed, text),
        "contiguous in NCHW or in channels_last": (x[:, :, ::2], packed, text),
        "contiguous in NCHW memory format": (x, packed, changed(0, rows=PATCHES_OF_NCHW)),
        "only the first layer of a chain can read NCHW": (x, packed, changed(1, rows=PATCHES_OF_NCHW)),
        "rows must be from 0 to 10, got 11": (x, packed, changed(0, rows=11)),
        "stride must be from 1 to 2, got 3": (x, packed, changed(0, stride=3)),
        "residual must be from -1 to 0, got 1": (x, packed, changed(0, residual=1)),
        "cannot have a residual": (x, packed, changed(4, residual=0)),
        "a map of the same shape": (x, packed, changed(1, residual=1)),
        "kernel must be from 3 to 3, got 5": (x, packed, changed(0, kernel=5)),
        "gated must be from -1 to 0, got 1": (x, packed, changed(1, gated=1)),
        "with a gated map must be a 1x1 convolution": (x, packed, changed(1, gated=0)),
        "activation must be from 0 to 7, got 8": (x, packed, changed(0, pointwise_activation=8)),
        "separable convolution in a chain, activation must be from 0 to 3": (x, packed, changed(1, activation=4)),
        "a 1x1 convolution in a chain has no padding": (x, packed, changed(0, rows=PIXELS)),
        "input must be from -1 to 1, got 2": (x, packed, changed(1, input=2)),
        "input_begin must be from 0": (x, packed, changed(1, input=1, input_begin=-1)),
        "in_channels must be from 1 to 8, got 9": (x, packed, changed(1, input=1, in_channels=9)),
        "layer 1 reads channels 1 to 9 of map 1": (x, packed, changed(1, input=1, input_begin=1, in_channels=8)),
        "output must be from -1 to 2, got 3": (x, packed, changed(1, output=3)),
        "cannot write to the input": (x, packed, changed(0, output=0)),
        "layer 1 writes what another layer has written": (x, packed, changed(1, output=1, output_begin=7)),
        "must give the same height and width": (x, packed, changed(2, output=2, output_begin=17)),
        "must write all channels of the output": (x, packed, changed(4, output_begin=1)),
        "x is too small": (x[:, :, :1, :1].contiguous(memory_format=torch.channels_last), packed, text),
        "x must be a CPU tensor of shape": (x[0], packed, text),
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(*wrong)


def changed_text(text, layer, **fields):
    layers = _ops.layers_of(text)
    layers[layer] = layers[layer]._replace(**fields)
    return _ops.text_of(layers)


def test_layers_without_weights_refuse_what_they_cannot_run():
    for layer, fields, message in (
        (max_pool(3), {"kernel": 14}, "kernel must be from 2 to 13, got 14"),
        (max_pool(3), {"pad_left": 2}, "padding of half its kernel at most"),
        (max_pool(3), {"dilation": 2}, "a max pool in a chain has dilation 1"),
        (max_pool(3), {"residual": 0}, "and no residual"),
        (max_pool(3), {"activation": 1}, "a layer without weights in a chain has no activation"),
        (max_pool(3), {"out_channels": 4}, "as many channels as what it reads"),
        (combined(SUM, 3), {"pointwise_activation": 1}, "a layer without weights in a chain has no activation"),
        (max_pool(3), {"joined_activation": 1}, "upsampled map in a chain has a joined_activation"),
        (combined(SUM, 3), {"joined_activation": 8}, "joined_activation must be from 0 to 7, got 8"),
        (combined(SUM, 3), {"out_channels": 2}, "as many channels as what it reads"),
        (combined(SUM, 3), {"stride": 2}, "combined or upsampled in a chain have no stride"),
        (combined(SUM, 3), {"multiplies": 1}, "a layer that multiplies in a chain has a residual"),
        (combined(SUM, 3, 0), {"multiplies": 2}, "multiplies must be from 0 to 1, got 2"),
        (combined(INTERLEAVED, 3, 0), {"multiplies": 1}, "has a residual, and is a sum or has weights"),
        (upsample(3), {"multiplies": 1, "residual": 0}, "has a residual, and is a sum or has weights"),
        (expand(3, 3), {"pad_left": 1}, "a 1x1 convolution in a chain has no padding"),
        (upsample(3), {"stride": 2}, "combined or upsampled in a chain have no stride"),
        (upsample(3), {"residual": 0}, "a map of the same shape"),
        (upsample(3), {"activation": 1}, "a layer without weights in a chain has no activation"),
        (upsample(3), {"joined_activation": 1}, "upsampled map in a chain has a joined_activation"),
        (upsample(3), {"out_channels": 4}, "as many channels as what it reads"),
        (combined(INTERLEAVED, 3), {}, "a map is interleaved with a second one"),
        (combined(INTERLEAVED, 3, 0), {"out_channels": 5}, "twice as many channels"),
        (combined(INTERLEAVED, 3, 0), {"residual_begin": 1}, "a map of the same shape"),
        (combined(INTERLEAVED, 3, 0), {"joined_activation": 1}, "no interleaved, pooled or upsampled map"),
    ):
        layer.numbers = layer.numbers._replace(**fields)
        with pytest.raises((RuntimeError, ValueError), match=message):
            run([layer], torch.randn(1, 3, 9, 9))


def test_gates_refuse_what_they_cannot_run():
    x, packed, text = arguments(gate(8, 5, (1, 5), 0, 3), torch.randn(1, 8, 6, 6))

    def changed(layer, **fields):
        return changed_text(text, layer, **fields)

    for message, wrong in {
        "must give a factor for each of its channels": (x, packed, changed(2, gated=1)),
        "gated must be from -1 to 1, got 2": (x, packed, changed(2, gated=2)),
        "must be a 1x1 convolution": (x, packed, changed(2, gated=0, rows=DEPTHWISE)),
        "or a sum without a residual": (x, packed, changed(2, gated=0, rows=SUM, residual=0)),
        "a map of the same shape": (x, packed, changed(2, residual=1)),
        "for each of its channels": (x, packed, changed(2, input_begin=1)),
        "reads that map": (x, packed, changed(2, input=0)),
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
    x, packed, text = arguments([depthwise_map(8, 5)], torch.randn(1, 8, 16, 16))

    def changed(**fields):
        return changed_text(text, 0, **fields)

    for message, wrong in {
        "kernel must be from 3 to 11, got 13": (x, packed, changed(kernel=13)),
        "kernel must be odd": (x, packed, changed(kernel=4)),
        "weights of layer 0": (x, packed, changed(kernel=7)),
        "does not hold a 5x5 kernel of dilation 5": (x, packed, changed(dilation=5)),
        "one activation": (x, packed, changed(pointwise_activation=1)),
        "as many output channels as input channels": (x, packed, changed(out_channels=9)),
        "does not hold a 5x5 kernel": (x[:, :, :3, :], packed, changed(pad_top=0, pad_bottom=1)),
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            _ops.chain(*wrong)
    weight = torch.randn(8, 1, 5, 5)
    for message, arguments_of_pack in {
        r"weight must be a contiguous CPU tensor of shape \[C, 1, K, K\]": (weight[:, :, :4], None, None),
        "with K odd and from 3 to 11": (torch.randn(8, 1, 4, 4), None, None),
        "float32 or float64": (weight.half(), None, None),
        "scale must be a contiguous float64 CPU tensor of 8 elements": (weight, torch.ones(8), None),
        "bias must be a contiguous float64 CPU tensor of 8 elements": (weight, None, torch.ones(7).double()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            _ops.pack_depthwise(*arguments_of_pack)
