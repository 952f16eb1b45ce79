# SPDX-License-Identifier: BSD-3-Clause
"""Layers of a chain with random weights: as the operator takes them, and as ATen computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusedsep import _ops
from fusedsep._ops import (
    DEPTHWISE,
    DEPTHWISE_MAP,
    INTERLEAVED,
    MAX_POOL,
    MEANS,
    NORMALIZED_PIXELS,
    PATCHES,
    PATCHES_OF_NCHW,
    PIXELS,
    SUM,
    UPSAMPLE,
    ChainLayer,
)

EPS = 1e-4  # of pixels that are normalized
ACTIVATIONS = (lambda x: x, torch.relu, F.relu6, F.hardswish, F.silu, torch.sigmoid, F.hardsigmoid, F.gelu)


class Layer:
    """A layer, its weights in float64, and what ATen makes of them."""

    def __init__(
        self,
        rows,
        channels,
        out_channels,
        stride=1,
        dilation=1,
        pads=(1, 1, 1, 1),
        activations=(1, 1),
        residual=-1,
        kernel=3,
        gated=-1,
        **places,
    ):
        self.channels = channels
        self.numbers = ChainLayer(
            rows, out_channels, stride, dilation, *pads, *activations, residual, kernel, gated, **places
        )
        depth = 9 * channels if rows in (PATCHES, PATCHES_OF_NCHW) else channels
        self.first = torch.randn(channels, 1, kernel, kernel, dtype=torch.double)
        self.first_bias = torch.randn(channels, dtype=torch.double)
        self.weight = torch.randn(out_channels, depth, dtype=torch.double) / depth**0.5
        self.bias = torch.randn(out_channels, dtype=torch.double)

    def packed(self, dtype):
        n = self.numbers
        if n.rows in (SUM, INTERLEAVED, MAX_POOL, UPSAMPLE):
            return torch.empty(0, dtype=dtype)
        if n.rows == DEPTHWISE_MAP:
            return _ops.pack_depthwise(self.first.to(dtype), None, self.first_bias)
        first, first_bias = torch.zeros(self.weight.shape[1], 1, 3, 3), None
        if n.rows == DEPTHWISE:
            first, first_bias = self.first, self.first_bias
        elif n.rows == NORMALIZED_PIXELS:
            first_bias = torch.full_like(self.first_bias, EPS)
        return _ops.pack(
            first.to(dtype),
            None,
            first_bias,
            self.weight.to(dtype)[:, :, None, None],
            None,
            self.bias,
            True,
        )

    def __call__(self, x):
        n = self.numbers
        pads = n.pad_left, n.pad_right, n.pad_top, n.pad_bottom
        if n.rows == UPSAMPLE:
            return F.interpolate(x, scale_factor=2)
        if n.rows == MAX_POOL:
            return F.max_pool2d(F.pad(x, pads, value=-torch.inf), n.kernel, n.stride)
        act, pointwise_act = ACTIVATIONS[n.activation], ACTIVATIONS[n.pointwise_activation]
        if n.rows == MEANS:
            return pointwise_act(F.linear(x.mean((2, 3)), self.weight, self.bias))[:, :, None, None]
        if n.rows == NORMALIZED_PIXELS:
            x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=EPS).movedim(-1, 1)
        if n.rows in (PIXELS, NORMALIZED_PIXELS):
            return pointwise_act(F.conv2d(x, self.weight[:, :, None, None], self.bias, n.stride))
        if n.rows in (DEPTHWISE, DEPTHWISE_MAP):
            h = F.conv2d(F.pad(x, pads), self.first, self.first_bias, n.stride, 0, n.dilation, x.shape[1])
            if n.rows == DEPTHWISE_MAP:
                return act(h)
            return pointwise_act(F.conv2d(act(h), self.weight[:, :, None, None], self.bias))
        if n.rows == PATCHES:
            weight = self.weight.view(-1, 3, 3, x.shape[1]).permute(0, 3, 1, 2)
        else:
            weight = self.weight.view(-1, x.shape[1], 3, 3)
        return pointwise_act(F.conv2d(F.pad(x, pads), weight, self.bias, n.stride, 0, n.dilation))


def arguments(layers, x):
    """What the operator takes."""
    packed = torch.cat([layer.packed(x.dtype) for layer in layers])
    text = _ops.text_of(layer.numbers for layer in layers)
    nchw = layers[0].numbers.rows == PATCHES_OF_NCHW
    return x.contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last), packed, text


def rows_of(calls):
    """Of the layers of each recorded call of the operator."""
    return [[layer.rows for layer in _ops.layers_of(text)] for _, _, text, *_ in calls]


def run(layers, x):
    return _ops.chain(*arguments(layers, x))


def exact(layers, x):
    maps = {0: x.double()}
    front = 0, 0, x.shape[1]  # the map that the layer in front wrote, and which of its channels
    for number, layer in enumerate(layers, 1):
        n = layer.numbers
        read = front
        if n.input >= 0 or n.gated >= 0:
            source = max(n.input, n.gated)
            read = source, n.input_begin, n.in_channels or maps[source].shape[1] - n.input_begin
        source = channels_of(maps, *read)
        if n.gated >= 0:
            source = source * channels_of(maps, *front)
        if n.rows == INTERLEAVED:
            y = torch.stack([source, channels_of(maps, n.residual, n.residual_begin, read[2])], 2).flatten(1, 2)
        else:
            y = source if n.rows == SUM else layer(source)
            if n.residual >= 0:
                other = channels_of(maps, n.residual, n.residual_begin, n.out_channels)
                y = y * other if n.multiplies else y + other
            y = ACTIVATIONS[n.joined_activation](y)
        written = number if n.output < 0 else n.output
        front = written, n.output_begin, n.out_channels
        if written not in maps:
            maps[written] = y.new_full((len(y), total_channels(layers, written), *y.shape[2:]), torch.nan)
        channels_of(maps, *front).copy_(y)
    y = maps[written]
    return y.flatten(1) if layers[-1].numbers.rows == MEANS else y


def assert_close(ours, exact):
    eps = torch.finfo(ours.dtype).eps
    assert ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= 64 * eps * max(1.0, exact.abs().max().item())


def channels_of(maps, number, begin, channels):
    return maps[number][:, begin : begin + channels]


def total_channels(layers, written):
    """Of a map that some layers write."""
    numbers = [layer.numbers for layer in layers]
    own = [n for i, n in enumerate(numbers, 1) if (i if n.output < 0 else n.output) == written]
    return max(n.output_begin + n.out_channels for n in own)


def network(first, channels=3, width=8):
    return [
        Layer(first, channels, width, 2, activations=(0, 2)),
        Layer(DEPTHWISE, width, 2 * width + 1, activations=(1, 1)),
        Layer(DEPTHWISE, 2 * width + 1, 21, 2, pads=(0, 1, 0, 1), activations=(3, 0)),
        Layer(DEPTHWISE, 21, 40, 1, 2, (2, 2, 2, 2), (2, 3)),
        Layer(MEANS, 40, 13, pads=(0, 0, 0, 0), activations=(0, 0)),
    ]


def expand(channels, out_channels, activation=2):
    return Layer(PIXELS, channels, out_channels, pads=(0, 0, 0, 0), activations=(0, activation))


def gate(channels, squeezed, activations, number, out_channels, activation=0, residual=-1):
    """Squeeze-and-excitation of map ``number``, which has ``channels``, and the 1x1 convolution behind it."""
    return [
        Layer(MEANS, channels, squeezed, pads=(0, 0, 0, 0), activations=(0, activations[0])),
        expand(squeezed, channels, activations[1]),
        pixels(channels, out_channels, activation, residual, gated=number),
    ]


def depthwise_map(channels, kernel, stride=1, pads=None, activation=1, residual=-1, dilation=1, **places):
    pads = 4 * (kernel // 2 * dilation,) if pads is None else pads
    return Layer(DEPTHWISE_MAP, channels, channels, stride, dilation, pads, (activation, 0), residual, kernel, **places)


def joined_network(width=8, activation=1):
    """Activations behind sums, in front of layers and behind a gate, and 1x1 convolutions of stride 2 beside others."""
    joined = {"joined_activation": activation}
    return [
        Layer(PATCHES, 3, width, 2, activations=(0, 2)),
        pixels(width, 19, 0, stride=2),
        Layer(DEPTHWISE, width, 19, 2, activations=(1, 0), residual=2, input=1, **joined),
        Layer(PATCHES, 19, 19, activations=(0, 3), residual=2, **joined),
        depthwise_map(19, 5, activation=4, residual=3, **joined),
        depthwise_map(19, 3, activation=0, residual=3, **joined),
        combined(SUM, 19, 4, **joined),
        combined(SUM, 17, input=7, input_begin=1, in_channels=17, **joined),
        depthwise_map(17, 7, activation=0, **joined),
        pixels(17, 37, 3, **joined),
        Layer(MEANS, 37, 5, pads=(0, 0, 0, 0), activations=(0, 1)),
        expand(5, 37, 5),
        combined(SUM, 37, gated=10, **joined),
        pixels(37, 40, 4, stride=2),
        Layer(DEPTHWISE, 40, 40, activations=(1, 0), residual=14, **joined),
        Layer(DEPTHWISE, 40, 40, activations=(1, 0), **joined),
        Layer(MEANS, 40, 13, pads=(0, 0, 0, 0), activations=(0, 0)),
    ]


def multiplied_network(width=8, activation=1):
    """Every kind of layer that may multiply another map, of which some are channels of a larger one."""
    w, multiplied = width, {"joined_activation": activation, "multiplies": 1}
    return [
        Layer(PATCHES, 3, 2 * w + 1, 2, activations=(0, 2)),
        pixels(2 * w + 1, w, 0, 1, residual_begin=w + 1, **multiplied),
        Layer(DEPTHWISE, w, w, activations=(1, 4), residual=2, **multiplied),
        Layer(PATCHES, w, w, activations=(0, 0), residual=3, **multiplied),
        normalized(w, w, 0, 4, **multiplied),
        depthwise_map(w, 3, activation=0, residual=1, residual_begin=1, **multiplied),
        depthwise_map(w, 7, activation=4, residual=6, multiplies=1),
        combined(SUM, w - 1, 1, residual_begin=2, input=7, in_channels=w - 1, **multiplied),
        *gate(w - 1, 5, (1, 6), 8, 40),
        Layer(MEANS, 40, 13, pads=(0, 0, 0, 0), activations=(0, 0)),
    ]


def residual_network(width=8):
    """A first convolution, residual blocks, two of them around each other, depthwise ones alone, and a classifier."""
    return [
        Layer(PATCHES, 3, width, 2, activations=(0, 2)),
        expand(width, 3 * width + 1),
        Layer(DEPTHWISE, 3 * width + 1, width, activations=(2, 0), residual=1),
        expand(width, 19),
        Layer(DEPTHWISE, 19, 21, 2, pads=(0, 1, 0, 1), activations=(2, 0)),
        expand(21, 35),
        Layer(DEPTHWISE, 35, 21, activations=(2, 0), residual=5),
        expand(21, 33),
        depthwise_map(33, 5, activation=3),
        expand(33, 21),
        depthwise_map(21, 3, activation=0, residual=5),
        expand(21, 40),
        Layer(MEANS, 40, 13, pads=(0, 0, 0, 0), activations=(0, 0)),
    ]


def whole_network(width=8):
    """Convolutions of all channels in the middle: of stride 2, with a residual and with a dilation."""
    return [
        Layer(PATCHES, 3, width, 2, activations=(0, 2)),
        Layer(PATCHES, width, 19, activations=(0, 4)),
        Layer(PATCHES, 19, 19, activations=(0, 3), residual=2),
        Layer(PATCHES, 19, 3 * width + 1, 2, pads=(0, 1, 0, 1), activations=(0, 1)),
        Layer(PATCHES, 3 * width + 1, 40, 1, 2, (2, 2, 2, 2), (0, 0)),
        Layer(DEPTHWISE, 40, 21, activations=(1, 0)),
        Layer(MEANS, 21, 13, pads=(0, 0, 0, 0), activations=(0, 0)),
    ]


def excited_network(width=8):
    """Blocks of EfficientNet and of MobileNetV3: a gate, and a gate in a residual block."""
    return [
        Layer(PATCHES, 3, width, 2, activations=(0, 4)),
        depthwise_map(width, 3, activation=4),
        *gate(width, 5, (4, 5), 2, 17),
        expand(17, 37, 4),
        depthwise_map(37, 5, activation=4),
        *gate(37, 3, (1, 6), 7, 17, residual=5),
        expand(17, 40, 3),
        Layer(MEANS, 40, 13, pads=(0, 0, 0, 0), activations=(0, 0)),
    ]


def normalized_network(width=9):
    """Blocks of depthwise convolutions of 7x7 taps, normalized pixels and two products, as ConvNeXt has them."""
    block = [depthwise_map(width, 7), normalized(width, 3 * width, 7), pixels(3 * width, width, residual=0)]
    more = [depthwise_map(width, 5), normalized(width, 40, 4), normalized(40, width, 1, residual=3)]
    return [*block, *more, Layer(MEANS, width, 13, pads=(0, 0, 0, 0), activations=(0, 0))]


def pixels(channels, out_channels, activation=0, residual=-1, stride=1, rows=PIXELS, **places):
    return Layer(rows, channels, out_channels, stride, 1, (0, 0, 0, 0), (0, activation), residual, **places)


def normalized(channels, out_channels, activation=0, residual=-1, **places):
    return pixels(channels, out_channels, activation, residual, rows=NORMALIZED_PIXELS, **places)


def combined(rows, channels, residual=-1, **places):
    """A sum or a product, or a map interleaved with another one."""
    out_channels = 2 * channels if rows == INTERLEAVED else channels
    return Layer(rows, channels, out_channels, 1, 1, (0, 0, 0, 0), (0, 0), residual, **places)


def max_pool(channels, kernel=3, stride=2, padding=1, **places):
    return Layer(MAX_POOL, channels, channels, stride, 1, 4 * (padding,), (0, 0), kernel=kernel, **places)


def upsample(channels, **places):
    return Layer(UPSAMPLE, channels, channels, pads=(0, 0, 0, 0), activations=(0, 0), **places)


def upsampling_network(width=8):
    """An encoder and a decoder, with what the encoder gave beside it and added to it, on maps of even sizes."""
    return [
        Layer(PATCHES, 3, width, 2),
        max_pool(width, 2, 2, 0),
        depthwise_map(width, 5),
        upsample(width, output_begin=3),
        pixels(width, 3, input=1, output=4),
        Layer(PATCHES, width + 3, width, activations=(0, 1), input=4),
        upsample(width - 1, input=6, input_begin=1, in_channels=width - 1),
        max_pool(width - 1, 2, 2, 0),
        upsample(width - 1, residual=7),
        Layer(DEPTHWISE, width - 1, 5, activations=(1, 0), dilation=3, pads=(3, 3, 3, 3)),
    ]


def branching_network(width=8, activation=1):
    """Every kind of layer reads some channels of a map and writes some of another, or of the same."""
    w = width
    return [
        Layer(PATCHES, 3, w, 2, activations=(0, activation), output_begin=5),
        depthwise_map(w, 5, activation=activation, input=1, input_begin=5, in_channels=w, output=1, output_begin=w + 5),
        pixels(w + 1, 5, activation, input=1, input_begin=w + 4, in_channels=w + 1, output=1),
        Layer(DEPTHWISE, 2 * w + 5, w + 3, activations=(1, activation), residual=1, residual_begin=2, input=1),
        Layer(
            *(PATCHES, w + 1, 7, 1, 1, (1, 1, 1, 1), (0, activation), 1),
            **{"input": 1, "input_begin": 3, "in_channels": w + 1, "output": 4, "output_begin": w + 3},
            residual_begin=1,
        ),
        depthwise_map(
            *(w + 2, 3, 1, None, activation, 4),
            **{"input": 4, "input_begin": 5, "in_channels": w + 2, "output": 4, "output_begin": w + 10},
            residual_begin=3,
        ),
        combined(SUM, w, 1, input=4, input_begin=1, in_channels=w, residual_begin=4),
        combined(INTERLEAVED, w - 1, 4, input=7, in_channels=w - 1, residual_begin=w, output_begin=1),
        combined(SUM, 1, input=4, input_begin=3, in_channels=1, output=8),
        Layer(DEPTHWISE, w + 2, w + 4, 2, activations=(1, 0), input=8, input_begin=w - 3, in_channels=w + 2),
        max_pool(2 * w - 3, input=8, input_begin=1, in_channels=2 * w - 3, output=10, output_begin=w + 4),
        Layer(MEANS, 3 * w, 5, 1, 1, (0, 0, 0, 0), (0, 1), input=10, input_begin=1, in_channels=3 * w),
        expand(5, 3 * w, 5),
        pixels(3 * w, 2 * w, activation, 10, gated=10, input_begin=1, in_channels=3 * w, residual_begin=2),
        Layer(MEANS, 2 * w - 1, 13, 1, 1, (0, 0, 0, 0), (0, 0), input=14, in_channels=2 * w - 1),
    ]
