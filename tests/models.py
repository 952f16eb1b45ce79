# SPDX-License-Identifier: BSD-3-Clause
"""Small networks in the styles of published ones, for the tests of ``fuse``, ``fusion_report`` and ``freeze``."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def depthwise(channels, stride=1, kernel=3, padding=None, bias=False, **kwargs):
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=bias, **kwargs)


def pointwise(in_channels, out_channels, bias=False, **kwargs):
    return nn.Conv2d(in_channels, out_channels, 1, bias=bias, **kwargs)


class ConvBNAct(nn.Sequential):
    """torchvision's Conv2dNormActivation."""

    def __init__(self, in_channels, out_channels, kernel=3, stride=1, groups=1, activation=nn.ReLU6):
        layers = [
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        super().__init__(*layers, *([activation(inplace=True)] if activation is not None else []))


class InvertedResidual(nn.Module):
    """torchvision's MobileNetV2 block."""

    def __init__(self, in_channels, out_channels, stride, expand):
        super().__init__()
        hidden = in_channels * expand
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *([ConvBNAct(in_channels, hidden, 1)] if expand != 1 else []),
            ConvBNAct(hidden, hidden, 3, stride, hidden),
            pointwise(hidden, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            ConvBNAct(3, 8, 3, 2),
            InvertedResidual(8, 5, 1, 1),
            InvertedResidual(5, 7, 2, 6),
            InvertedResidual(7, 7, 1, 6),
            ConvBNAct(7, 20, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(20, 10))

    def _forward_impl(self, x):
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))

    def forward(self, x):
        return self._forward_impl(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return F.hardsigmoid(self.fc2(F.relu(self.fc1(scale)))) * x


class MobileNetV3Block(nn.Module):
    """torchvision's MobileNetV3 block; with squeeze-excitation there is no site."""

    def __init__(self, channels, kernel=3, excite=False, activation=nn.Hardswish):
        super().__init__()
        self.block = nn.Sequential(
            ConvBNAct(channels, 3 * channels, 1, activation=activation),
            ConvBNAct(3 * channels, 3 * channels, kernel, 1, 3 * channels, activation),
            *([SqueezeExcitation(3 * channels)] if excite else []),
            ConvBNAct(3 * channels, channels, 1, activation=None),
        )

    def forward(self, x):
        return x + self.block(x)


class HSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class HSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = HSigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


class SpelledOutHardswish(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(depthwise(6), nn.BatchNorm2d(6), nn.Identity(), HSwish(), pointwise(6, 4))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(self.body(x))
        return y * F.relu6(y + 3.0) / 6.0


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a BN that carries dropout and an activation."""

    def __init__(self, channels, activation=nn.ReLU6):
        super().__init__(channels, eps=1e-3)
        self.drop = nn.Identity()
        self.act = activation(inplace=True) if activation is not None else nn.Identity()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        use_batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_batch_statistics,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.drop_prob)


class TimmBlock(nn.Module):
    """timm's DepthwiseSeparableConv."""

    def __init__(self, in_channels, out_channels, stride=1, activation=nn.ReLU6):
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_dw = depthwise(in_channels, stride)
        self.bn1 = BatchNormAct2d(in_channels, activation)
        self.se = nn.Identity()
        self.conv_pw = pointwise(in_channels, out_channels)
        self.bn2 = BatchNormAct2d(out_channels, activation)
        self.drop_path = DropPath()

    def forward(self, x):
        shortcut = x
        x = self.conv_dw(x)
        x = self.bn1(x)
        x = self.se(x)
        x = self.conv_pw(x)
        x = self.bn2(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class BNReLU(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's branches: nothing between the depthwise and the pointwise convolution."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            pointwise(half, half), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            depthwise(half), nn.BatchNorm2d(half),
            pointwise(half, half), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Detector(nn.Module):
    """SSD: the root runs its layers one by one and keeps some maps; pointwise BNs are folded into a bias."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()
        for stride in (1, 2, 1, 2):
            self.layers += [
                depthwise(6, stride), nn.BatchNorm2d(6), nn.ReLU(inplace=True), pointwise(6, 6, bias=True), nn.ReLU()
            ]  # fmt: skip
        self.head = nn.Sequential(depthwise(6, bias=True), nn.ReLU6(), pointwise(6, 8, bias=True))

    def forward(self, x):
        maps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in (9, 19):
                maps.append(x)
        return [self.head(feature) for feature in maps]


class PaddedBlock(nn.Module):
    """A TensorFlow port: SAME padding spelled out in front of the convolution."""

    def __init__(self, channels, pad, dw=None):
        super().__init__()
        self.pad = pad
        self.dw = depthwise(channels, 2, padding=0) if dw is None else dw
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.pw = pointwise(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        x = F.pad(x, [0, 1, 0, 1]) if self.pad is None else self.pad(x)
        x = F.relu6(self.bn1(self.dw(x)))
        return self.bn2(self.pw(x)).clamp(min=0, max=6)


class SameByMax(nn.Module):
    """A padding module whose Python defeats symbolic tracing."""

    def forward(self, x):
        height, width = x.shape[-2:]
        down = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
        right = max((math.ceil(width / 2) - 1) * 2 + 3 - width, 0)
        if down > 0 or right > 0:
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return x


def _same_sides(size, stride):
    total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
    return [total // 2, total - total // 2]


def same_pad(x, stride):
    """The same as a function."""
    sides = _same_sides(x.shape[-1], stride) + _same_sides(x.shape[-2], stride)
    return F.pad(x, sides) if any(side > 0 for side in sides) else x


class PadsByFunction(PaddedBlock):
    def __init__(self, channels):
        super().__init__(channels, nn.Identity())

    def forward(self, x):
        return super().forward(same_pad(x, stride=2))


class Branching(nn.Module):
    """Control flow in a submodule: nothing in it can be traced but its children."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        if x.shape[-1] > 4:
            x = self.body(x)
        return x


class FunctionalBlock(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv_dw, self.bn_dw = depthwise(5), nn.BatchNorm2d(5)
        self.conv_sep, self.bn_sep = pointwise(5, 6), nn.BatchNorm2d(6)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.bn_dw(self.conv_dw(x)))
        return self.activation(self.bn_sep(self.conv_sep(x)))


class XceptionConv(nn.Module):
    """Xception's separable convolution, BN outside."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = depthwise(in_channels)
        self.pointwise = pointwise(in_channels, out_channels)

    def forward(self, x):
        return self.pointwise(self.conv1(x))


class WithDefaults(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvBNAct(3, 6)
        self.dw, self.bn, self.pw = depthwise(6), nn.BatchNorm2d(6), pointwise(6, 4)

    def forward(self, x, mask=None, return_features=False):
        features = self.stem(x)
        if mask is not None:
            features = features * mask
        y = self.pw(F.relu(self.bn(self.dw(features))))
        return (y, features) if return_features else y


class SharedConvolution(nn.Module):
    """One depthwise convolution called twice, with two BNs: weight sharing between pyramid levels."""

    def __init__(self):
        super().__init__()
        self.dw, self.bns = depthwise(4), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.pw, self.act = pointwise(4, 4, bias=True), nn.ReLU()

    def forward(self, x):
        for bn in self.bns:
            x = self.pw(self.act(bn(self.dw(x))))
        return x


class Flat(nn.Module):
    """Depthwise, then ``between``, then pointwise; ``tap`` reads the map in between as well."""

    def __init__(self, dw, between, pw, tap=False):
        super().__init__()
        self.dw, self.between, self.pw, self.tap = dw, between, pw, tap

    def forward(self, x):
        h = self.between(self.dw(x))
        y = self.pw(h)
        return (y, h.mean()) if self.tap else y


class ExtremeInception(nn.Module):
    """Pointwise, then depthwise: two of them in a row hold one depthwise -> pointwise chain."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(pointwise(4, 6), nn.BatchNorm2d(6), depthwise(6), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(pointwise(6, 5), nn.BatchNorm2d(5), depthwise(5), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x):
        return self.second(self.first(x))


def chain(*between, channels=4):
    """A ``nn.Sequential`` of a depthwise convolution, BN, ``between`` and a pointwise convolution with BN."""
    return nn.Sequential(
        depthwise(channels), nn.BatchNorm2d(channels), *between, pointwise(channels, 6), nn.BatchNorm2d(6)
    )
