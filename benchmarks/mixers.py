# SPDX-License-Identifier: BSD-3-Clause
"""Networks that mix pixels by large depthwise convolutions: products of two maps, and branches that can be merged."""

from __future__ import annotations

import functools

import torch
import torch.nn as nn
from branches import Branches, Excitation, conv_norm

#: A convolution and its BN.
_conv = functools.partial(conv_norm, relu=False)


class StarBlock(nn.Module):
    """Two 1x1 convolutions of one map, of which one is the gate of the other."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.first, self.gate = _conv(width, width, 7, groups=width), nn.Conv2d(width, ratio * width, 1)
        self.value, self.relu = nn.Conv2d(width, ratio * width, 1), nn.ReLU6()
        self.project, self.last = _conv(ratio * width, width), nn.Conv2d(width, width, 7, padding=3, groups=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return x + self.last(self.project(self.relu(self.gate(y)) * self.value(y)))


class StarNet(nn.Sequential):
    """S1, as X. Ma et al., "Rewrite the Stars", 2024, table 1."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6()]
        widths = (32, 24, 48, 96, 192)
        for stage, depth in enumerate((2, 2, 8, 3)):
            layers.append(_conv(widths[stage], widths[stage + 1], 3, 2))
            layers += [StarBlock(widths[stage + 1]) for _ in range(depth)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))


class MixerBlock(nn.Module):
    """A depthwise convolution less a BN, with a factor for each channel, and a convolutional feed-forward network."""

    def __init__(self, width: int, ratio: int = 3) -> None:
        super().__init__()
        self.mixer, self.norm = Branches(width, width, 3, groups=width), nn.BatchNorm2d(width)
        self.scales = nn.ParameterList(torch.randn(width, 1, 1) for _ in range(2))
        hidden = ratio * width
        self.feed_forward = nn.Sequential(
            *_conv(width, width, 7, groups=width), nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scales[0] * (self.mixer(x) - self.norm(x))
        return x + self.scales[1] * self.feed_forward(x)


class FastViT(nn.Sequential):
    """T8, which has no attention, with the branches of its training.

    Source: P. Vasu et al., "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization", 2023.
    """

    def __init__(self) -> None:
        widths = (48, 96, 192, 384)
        layers: list[nn.Module] = [Branches(3, 48, 3, 2), nn.GELU(), Branches(48, 48, 3, 2, 48), nn.GELU()]
        layers += [Branches(48, 48, 1), nn.GELU()]
        for stage, depth in enumerate((2, 2, 4, 2)):
            if stage > 0:
                before, width = widths[stage - 1], widths[stage]
                layers += [Branches(before, width, 7, 2, before, small=3), Branches(width, width, 1), nn.GELU()]
            layers += [MixerBlock(widths[stage]) for _ in range(depth)]
        wide = 2 * widths[-1]
        head = [Branches(widths[-1], wide, 3, 1, widths[-1]), Excitation(wide), nn.GELU()]
        super().__init__(*layers, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 1000))
