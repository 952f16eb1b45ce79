# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions with a forward of their own: some only pad their map with zeros, others do more.

:data:`PADDING_ITSELF` and :data:`NOT_PADDING_ITSELF` make depthwise 3x3 ones for a number of channels; the latter come
with words of the reason.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def _total(size, kernel, stride, dilation):
    return max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)


class SameConv(nn.Conv2d):
    """timm's Conv2dSame: SAME padding of the map that comes, while ``padding`` is 0."""

    def forward(self, x):
        height, width = x.shape[-2:]
        down = _total(height, self.kernel_size[0], self.stride[0], self.dilation[0])
        across = _total(width, self.kernel_size[1], self.stride[1], self.dilation[1])
        if down > 0 or across > 0:
            x = F.pad(x, [across // 2, across - across // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StaticSameConv(nn.Conv2d):
    """EfficientNet-PyTorch's Conv2dStaticSamePadding: SAME padding of one image size, by a module, for every map."""

    def __init__(self, *args, image_size, **kwargs):
        super().__init__(*args, **kwargs)
        total = _total(image_size, self.kernel_size[0], self.stride[0], self.dilation[0])
        sides = (total // 2, total - total // 2)
        self.static_padding = nn.ZeroPad2d(sides + sides)

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MisleadingSameConv(SameConv):
    """Keeps a ``padding`` that its forward does not use."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, padding=1, **kwargs)


class PaddedConv(nn.Conv2d):
    """Fixed sides, and those of ``padding``."""

    sides = (0, 1, 2, 0)

    def forward(self, x):
        return super().forward(F.pad(x, self.sides))


class CheckedConv(nn.Conv2d):
    """Computes what nn.Conv2d does."""

    def forward(self, x):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError("half precision is not for this layer")
        return super().forward(x)


class WeightStandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class NoisyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1e-12 * torch.randn(1)


class RoundedWeightConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.bfloat16().float().to(x.dtype), self.bias)


class GainConv(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class ReflectConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))


class OnesConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), value=1.0))


class SameByHeightConv(nn.Conv2d):
    """Pads the columns as the number of rows asks."""

    def forward(self, x):
        total = _total(x.shape[-2], 3, self.stride[0], 1)
        return super().forward(F.pad(x, (total // 2, total - total // 2) * 2))


class ClampingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class DetachedConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.detach(), self.bias)


class ReversingConv(nn.Conv2d):
    """The output of nn.Conv2d, with another gradient."""

    def forward(self, x):
        return super().forward(2 * x.detach() - x)


class CountingConv(nn.Conv2d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountingBufferConv(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class OneSizeConv(nn.Conv2d):
    def forward(self, x):
        if x.shape[-2:] != (13, 14):
            raise ValueError("this layer takes maps of 13 x 14")
        return super().forward(x)


class OtherConvForward(nn.Conv2d):
    """whisper's way of changing a convolution."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def _with_hook_inside(channels):
    conv = StaticSameConv(channels, channels, 3, 2, groups=channels, image_size=224)
    conv.static_padding.register_forward_hook(lambda *_: None)
    return conv


def _depthwise(kind, stride=1, **kwargs):
    return lambda channels: kind(channels, channels, 3, stride, groups=channels, **kwargs)


#: name -> depthwise convolution
PADDING_ITSELF = {
    "SAME": _depthwise(SameConv, 2),
    "SAME, stride 1": _depthwise(SameConv, bias=False),
    "SAME, dilation 3": _depthwise(SameConv, 2, dilation=3),
    "SAME, padding=1": _depthwise(MisleadingSameConv, 2),
    "SAME of 224": _depthwise(StaticSameConv, 2, image_size=224),
    "SAME of 225": _depthwise(StaticSameConv, 2, image_size=225, bias=False),
    "SAME of 225, padding=1": _depthwise(StaticSameConv, 2, image_size=225, padding=1),
    "two sides": _depthwise(PaddedConv, 2),
    "two sides, padding='same'": _depthwise(PaddedConv, padding="same"),
    "nothing more": _depthwise(CheckedConv, 2, padding=1),
    "none": _depthwise(CheckedConv, 2),
}

#: name -> depthwise convolution, words of the reason
NOT_PADDING_ITSELF = {
    name: (_depthwise(kind, **kwargs), reason)
    for name, kind, kwargs, reason in [
        ("standardizes its weight", WeightStandardizedConv, {}, ": is not a convolution of the map with zeros"),
        ("adds noise", NoisyConv, {}, ": draws random numbers"),
        ("rounds its weight", RoundedWeightConv, {}, ": is not a convolution"),
        ("scales", GainConv, {}, ": is not a convolution"),
        ("reflects", ReflectConv, {}, ": is not a convolution"),
        ("pads with ones", OnesConv, {}, ": is not a convolution"),
        ("pads as its height asks", SameByHeightConv, {"stride": 2}, ": is not a convolution"),
        ("clamps", ClampingConv, {}, ": is not a convolution"),
        ("detaches its weight", DetachedConv, {}, ": cannot be tried: .*appears to not have been used"),
        ("reverses gradients", ReversingConv, {}, ": is not a convolution"),
        ("counts its calls", CountingConv, {}, ": writes attributes"),
        ("counts its calls in a buffer", CountingBufferConv, {}, ": writes parameters or buffers"),
        ("takes one size", OneSizeConv, {}, ": cannot be tried: this layer takes maps of 13 x 14"),
        ("has another _conv_forward", OtherConvForward, {}, ": is not a convolution"),
    ]
}
NOT_PADDING_ITSELF["has a hook inside"] = (_with_hook_inside, ": has hooks inside")
