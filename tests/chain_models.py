# SPDX-License-Identifier: BSD-3-Clause
"""Small networks that are one chain from the images to the classes, with heads in several spellings."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv_bn_relu(in_channels, out_channels, kernel, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class Plain(nn.Module):
    """A stem, three sites, and a head that subclasses write in other ways, of one or two products."""

    products = 1

    def __init__(self):
        super().__init__()
        self.stem = conv_bn_relu(3, 8, 3, 2)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(conv_bn_relu(a, a, 3, stride, a), conv_bn_relu(a, b, 1))
                for a, b, stride in ((8, 18, 1), (18, 21, 2), (21, 40, 1))
            )
        )
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(40, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))

    def head(self, x):
        return self.classifier(self.dropout(x.mean((2, 3))))


class PoolFlatten(Plain):
    def __init__(self):
        super().__init__()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def head(self, x):
        return self.classifier(self.flatten(self.dropout(self.pool(x))))


class ViewBySize(Plain):
    def head(self, x):
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(x.view(x.size(0), -1))


class ReshapeByShape(Plain):
    def head(self, x):
        x = x.mean([3, 2], keepdim=True)
        return self.classifier(F.dropout(x.reshape(x.shape[0], -1), 0.5, self.training))


class ViewByChannels(Plain):
    def head(self, x):
        return self.classifier(F.adaptive_avg_pool2d(x, 1).view(-1, 40))


class FunctionFlatten(Plain):
    def head(self, x):
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ConvolutionHead(Plain):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(40, 5, 1)

    def head(self, x):
        return self.classifier(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class TwoLinears(Plain):
    """As in torchvision's MobileNetV3."""

    products = 2

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Linear(40, 35), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(35, 5)
        )

    def head(self, x):
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ConvolutionAndLinear(Plain):
    """As in MobileNetV4: a 1x1 convolution of the means, its BN and its activation, and a view of what it gives."""

    products = 2

    def __init__(self):
        super().__init__()
        self.reduce = conv_bn_relu(40, 35, 1)
        self.classifier = nn.Linear(35, 5)

    def head(self, x):
        return self.classifier(self.reduce(F.adaptive_avg_pool2d(x, 1)).view(-1, 35))


class CastingLinear(nn.Linear):
    """As timm's."""

    def forward(self, x):
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.to(dtype=x.dtype), self.bias.to(dtype=x.dtype))
        return F.linear(x, self.weight, self.bias)


class OwnLinear(Plain):
    def __init__(self):
        super().__init__()
        self.classifier = CastingLinear(40, 5)


class ActivatedMap(Plain):
    products = 2

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Conv2d(40, 35, 1), nn.SiLU(), nn.Conv2d(35, 5, 1), nn.Hardswish())

    def head(self, x):
        return self.classifier(F.adaptive_avg_pool2d(x, 1))


HEADS = [
    Plain,
    PoolFlatten,
    ViewBySize,
    ReshapeByShape,
    ViewByChannels,
    FunctionFlatten,
    ConvolutionHead,
    TwoLinears,
    ConvolutionAndLinear,
    OwnLinear,
    ActivatedMap,
]
