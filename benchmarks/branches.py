# SPDX-License-Identifier: BSD-3-Clause
"""Networks whose blocks branch: channel shuffles, maps beside each other, sums of convolutions."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
import torch.nn as nn


def conv_norm(
    channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def _depthwise(channels: int, kernel: int = 3, stride: int = 1, relu: bool = False) -> nn.Sequential:
    return conv_norm(channels, channels, kernel, stride, channels, relu)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, or a map of half the size is made of all twice; then the two are shuffled."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        read = channels if stride == 2 else half
        self.short = nn.Sequential(_depthwise(channels, 3, 2), conv_norm(channels, half)) if stride == 2 else None
        self.long = nn.Sequential(conv_norm(read, half), _depthwise(half, 3, stride), conv_norm(half, half))
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.short is None:
            kept, x = x.chunk(2, dim=1)
        else:
            kept = self.short(x)
        return self.shuffle(torch.cat([kept, self.long(x)], dim=1))


class ShuffleNetV2(nn.Module):
    """Of width 1.0.

    Source: N. Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018, table 5.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, repeats = (24, 116, 232, 464, 1024), (4, 8, 4)
        self.stem = nn.Sequential(conv_norm(3, widths[0], 3, 2), nn.MaxPool2d(3, 2, 1))
        units = []
        for channels, out_channels, count in zip(widths, widths[1:], repeats, strict=False):
            units += [ShuffleUnit(channels, out_channels, 2)]
            units += [ShuffleUnit(out_channels, out_channels, 1) for _ in range(count - 1)]
        self.units = nn.Sequential(*units)
        self.head, self.classifier = conv_norm(widths[-2], widths[-1]), nn.Linear(widths[-1], 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.head(self.units(self.stem(x))).mean([2, 3]))


class Ghost(nn.Module):
    """A 1x1 convolution for half of the maps, and a depthwise one of these for the other half."""

    def __init__(self, channels: int, out_channels: int, relu: bool) -> None:
        super().__init__()
        self.primary = conv_norm(channels, out_channels // 2, relu=relu)
        self.cheap = _depthwise(out_channels // 2, relu=relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], dim=1)


class Excitation(nn.Module):
    """Squeeze-and-excitation with a quarter of the channels, rounded to a multiple of four, and a hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = (channels // 4 + 2) // 4 * 4
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class GhostBottleneck(nn.Module):
    def __init__(self, channels: int, wide: int, out_channels: int, kernel: int, stride: int, excited: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [Ghost(channels, wide, relu=True)]
        if stride == 2:
            layers.append(_depthwise(wide, kernel, stride))
        if excited:
            layers.append(Excitation(wide))
        self.long = nn.Sequential(*layers, Ghost(wide, out_channels, relu=False))
        self.short: nn.Module = nn.Identity()
        if stride == 2 or channels != out_channels:
            self.short = nn.Sequential(
                _depthwise(channels, kernel, stride), conv_norm(channels, out_channels, relu=False)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.long(x) + self.short(x)


class GhostNet(nn.Module):
    """Source: K. Han et al., "GhostNet: More Features from Cheap Operations", 2020, table 1."""

    #: Kernel, channels inside and behind, squeeze-and-excitation, stride.
    BLOCKS: ClassVar = [
        *((3, 16, 16, False, 1), (3, 48, 24, False, 2), (3, 72, 24, False, 1)),
        *((5, 72, 40, True, 2), (5, 120, 40, True, 1), (3, 240, 80, False, 2)),
        *((3, 200, 80, False, 1), (3, 184, 80, False, 1), (3, 184, 80, False, 1)),
        *((3, 480, 112, True, 1), (3, 672, 112, True, 1), (5, 672, 160, True, 2)),
        *((5, 960, 160, False, 1), (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1)),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.stem, channels = conv_norm(3, 16, 3, 2), 16
        blocks = []
        for kernel, wide, out_channels, excited, stride in self.BLOCKS:
            blocks.append(GhostBottleneck(channels, wide, out_channels, kernel, stride, excited))
            channels = out_channels
        self.blocks, self.last = nn.Sequential(*blocks), conv_norm(channels, 960)
        self.head, self.classifier = (
            nn.Sequential(nn.Conv2d(960, 1280, 1), nn.ReLU(inplace=True)),
            nn.Linear(1280, 1000),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.blocks(self.stem(x))).mean((2, 3), keepdim=True)
        return self.classifier(self.head(x).flatten(1))


class XceptionBlock(nn.Module):
    """Activation, separable convolution and BN, two or three times, and a shortcut around them."""

    def __init__(self, widths: list[int], stride: int, starts_with_relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out_channels in itertools.pairwise(widths):
            layers.append(nn.ReLU(inplace=bool(layers)))
            separable = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
            layers += [separable, nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        layers = layers if starts_with_relu else layers[1:]
        self.long = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1)) if stride == 2 else nn.Sequential(*layers)
        self.short = conv_norm(widths[0], widths[-1], 1, 2, relu=False) if stride == 2 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.long(x) + self.short(x)


class Xception(nn.Module):
    """Source: F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017, figure 5."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(conv_norm(3, 32, 3, 2), conv_norm(32, 64, 3)),
            XceptionBlock([64, 128, 128], 2, starts_with_relu=False),
            *(XceptionBlock([128, 256, 256], 2), XceptionBlock([256, 728, 728], 2)),
            *(XceptionBlock(4 * [728], 1) for _ in range(8)),
            XceptionBlock([728, 728, 1024], 2),
        )
        ends = []
        for channels, out_channels in ((1024, 1536), (1536, 2048)):
            ends += [conv_norm(channels, channels, 3, 1, channels)[0], *conv_norm(channels, out_channels)]
        self.last, self.classifier = nn.Sequential(*ends), nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.last(self.blocks(x)).mean((2, 3)))


class Branches(nn.Module):
    """A convolution, one with a smaller kernel, and a BN of the map where the sizes agree."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, small: int = 1
    ) -> None:
        super().__init__()
        self.conv = conv_norm(channels, out_channels, kernel, stride, groups, relu=False)
        self.small = conv_norm(channels, out_channels, small, stride, groups, relu=False) if small < kernel else None
        self.skip = nn.BatchNorm2d(channels) if stride == 1 and channels == out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(branch(x) for branch in (self.conv, self.small, self.skip) if branch is not None)


def mobileone_block(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(Branches(channels, out_channels, kernel, stride, groups), nn.ReLU(inplace=True))


class MobileOne(nn.Module):
    """S1, with the branches of its training.

    Source: P. Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone", 2023, tables 2 and 3.
    """

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [mobileone_block(3, 64, 3, 2)], 64
        for out_channels, count in ((96, 2), (192, 8), (512, 10), (1280, 1)):
            for number in range(count):
                blocks.append(mobileone_block(channels, channels, 3, 1 if number > 0 else 2, channels))
                blocks.append(mobileone_block(channels, out_channels, 1))
                channels = out_channels
        self.blocks, self.classifier = nn.Sequential(*blocks), nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(x).mean((2, 3)))
