# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV2 (M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2).

A network whose depthwise convolutions stand behind 1x1 ones that make the maps wide.
"""

from __future__ import annotations

import torch
import torch.nn as nn

#: Expansion, output channels, how many blocks, stride of the first.
_BLOCKS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


class MobileNetV2(nn.Module):
    """``Tensor[N, 3, H, W] -> Tensor[N, num_classes]``; without the dropout in front of the classifier."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers, channels = [_convolution(3, 32, 3, 2)], 32
        for expansion, out_channels, count, stride in _BLOCKS:
            for i in range(count):
                layers.append(_Block(channels, out_channels, stride if i == 0 else 1, expansion))
                channels = out_channels
        self.features = nn.Sequential(*layers, _convolution(channels, 1280, 1))
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            *([_convolution(in_channels, hidden, 1)] if expansion > 1 else []),
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.has_residual else self.layers(x)


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )
