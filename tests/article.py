# SPDX-License-Identifier: BSD-3-Clause
"""The two listings of the article that this package starts from, in our words; they import nothing of the package.

The article's full listing writes ``nn.Conv2d(in_channels, 64, ..., groups=4)`` for the depthwise convolution, which
does not run; ``nn.Conv2d(in_channels, in_channels, ..., groups=in_channels)`` is meant and stands here.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


class ShortBlock(nn.Module):
    """First listing: four modules, the activation in ``forward``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dw = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.dw(x)))
        return F.relu(self.bn2(self.pw(x)))


class FullBlock(nn.Module):
    """Second listing: two ``nn.Sequential``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dw = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
        )
        self.pw = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw(self.dw(x))


class MobileNet(nn.Module):
    """The full network, for 224x224 images only: it ends in a 7x7 average pool."""

    def __init__(self, block: type[nn.Module] = FullBlock, num_classes: int = 1000) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.stage_layers = nn.Sequential(
            block(32, 64, 1),
            block(64, 128, 2),
            block(128, 128, 1),
            block(128, 256, 2),
            block(256, 256, 1),
            block(256, 512, 2),
            *(block(512, 512, 1) for _ in range(5)),
            block(512, 1024, 2),
            block(1024, 1024, 1),
        )
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage_layers(self.first_conv(x))
        x = F.avg_pool2d(x, 7)
        return self.linear(x.view(x.size(0), -1))
