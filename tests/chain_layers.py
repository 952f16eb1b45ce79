# SPDX-License-Identifier: BSD-3-Clause
"""Layers of a chain with random weights: as the operator takes them, and as ATen computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, DEPTHWISE_MAP, MEANS, PATCHES, PATCHES_OF_NCHW, PIXELS, ChainLayer

ACTIVATIONS = (lambda x: x, torch.relu, F.relu6, F.hardswish, F.silu, torch.sigmoid, F.hardsigmoid)


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
    ):
        self.channels = channels
        self.numbers = ChainLayer(rows, out_channels, stride, dilation, *pads, *activations, residual, kernel, gated)
        depth = 9 * channels if rows in (PATCHES, PATCHES_OF_NCHW) else channels
        self.first = torch.randn(channels, 1, kernel, kernel, dtype=torch.double)
        self.first_bias = torch.randn(channels, dtype=torch.double)
        self.weight = torch.randn(out_channels, depth, dtype=torch.double) / depth**0.5
        self.bias = torch.randn(out_channels, dtype=torch.double)

    def packed(self, dtype):
        n = self.numbers
        if n.rows == DEPTHWISE_MAP:
            return _ops.pack_depthwise(self.first.to(dtype), None, self.first_bias)
        depthwise = n.rows == DEPTHWISE
        first = self.first if depthwise else torch.zeros(self.weight.shape[1], 1, 3, 3)
        return _ops.pack(
            first.to(dtype),
            None,
            self.first_bias if depthwise else None,
            self.weight.to(dtype)[:, :, None, None],
            None,
            self.bias,
            True,
        )

    def __call__(self, x):
        n = self.numbers
        pads = n.pad_left, n.pad_right, n.pad_top, n.pad_bottom
        act, pointwise_act = ACTIVATIONS[n.activation], ACTIVATIONS[n.pointwise_activation]
        if n.rows == MEANS:
            return pointwise_act(F.linear(x.mean((2, 3)), self.weight, self.bias))[:, :, None, None]
        if n.rows == PIXELS:
            return pointwise_act(F.conv2d(x, self.weight[:, :, None, None], self.bias))
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
    numbers = [number for layer in layers for number in layer.numbers]
    nchw = layers[0].numbers.rows == PATCHES_OF_NCHW
    return x.contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last), packed, numbers


def run(layers, x):
    return _ops.chain(*arguments(layers, x))


def exact(layers, x):
    maps = [x.double()]
    for layer in layers:
        n = layer.numbers
        y = layer(maps[-1] if n.gated < 0 else maps[n.gated] * maps[-1])
        maps.append(y + maps[n.residual] if n.residual >= 0 else y)
    return maps[-1].flatten(1) if layers[-1].numbers.rows == MEANS else maps[-1]


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
        Layer(PIXELS, channels, out_channels, 1, 1, (0, 0, 0, 0), (0, activation), residual, gated=number),
    ]


def depthwise_map(channels, kernel, stride=1, pads=None, activation=1, residual=-1):
    pads = 4 * (kernel // 2,) if pads is None else pads
    return Layer(DEPTHWISE_MAP, channels, channels, stride, 1, pads, (activation, 0), residual, kernel)


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
