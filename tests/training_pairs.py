# SPDX-License-Identifier: BSD-3-Clause
"""A block over modules in any mode, the same modules unfused, and one step of both side by side."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from randomize import randomized
from twins import random

from fusedsep import DepthwiseSeparableBlock
from fusedsep._activations import activation_module

#: How a BN may take part: there is none, it is frozen, it trains, it trains without running statistics, or it is in
#: eval mode and has none.
NORMS = ["none", "frozen", "training", "untracked", "eval without statistics"]


def _norm(kind, channels, seed, **options):
    if kind == "none":
        return None
    tracked = kind in ("frozen", "training")
    bn = nn.BatchNorm2d(channels, track_running_stats=tracked, **options)
    with torch.no_grad():
        if bn.affine and tracked:
            randomized(bn, seed)
        elif bn.affine:
            bn.weight.copy_(random(channels, seed=seed))
            bn.bias.copy_(random(channels, seed=seed + 1))
    return bn.train(kind in ("training", "untracked"))


def pair(
    norm1="training",
    norm2="training",
    *,
    channels=(5, 7),
    stride=1,
    padding=1,
    dilation=1,
    bias=False,
    activation="relu",
    pointwise_activation="relu",
    dtype=torch.double,
    **norm_options,
):
    """A block and its unfused twin. Parameters and buffers of both come in the same order."""
    torch.manual_seed(0)
    in_channels, out_channels = channels
    dw = nn.Conv2d(in_channels, in_channels, 3, stride, padding, dilation, groups=in_channels, bias=bias)
    pw = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
    bn1 = _norm(norm1, in_channels, 10, **norm_options)
    bn2 = _norm(norm2, out_channels, 20, **norm_options)
    modules = [None if module is None else module.to(dtype) for module in (dw, bn1, pw, bn2)]
    dw, bn1, pw, bn2 = modules
    block = DepthwiseSeparableBlock.from_modules(dw, bn1, activation, pw, bn2, pointwise_activation)
    dw, bn1, pw, bn2 = copy.deepcopy(modules)
    parts = [dw, bn1, activation_module(activation), pw, bn2, activation_module(pointwise_activation)]
    return block, nn.Sequential(*(part for part in parts if part is not None))


def in_format(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def step(model, x, grad_y=None):
    """Output, gradients of ``x`` and of the parameters, and buffers after one step."""
    x = x.detach().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.backward(random(*y.shape, seed=1, dtype=y.dtype) if grad_y is None else grad_y(y))
    gradients = [parameter.grad for parameter in model.parameters()]
    return [y.detach(), x.grad, *gradients, *(buffer.clone() for buffer in model.buffers())]


def assert_same(ours, theirs):
    """The two results of :func:`step`, in float64."""
    for actual, expected in zip(ours, theirs, strict=True):
        if actual is None or expected is None:
            assert actual is expected
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
