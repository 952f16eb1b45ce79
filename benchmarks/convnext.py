# SPDX-License-Identifier: BSD-3-Clause
"""ConvNeXt: depthwise convolutions of 7x7 taps, LayerNorm, and linear layers of the channels of each pixel.

Source: Z. Liu et al., "A ConvNet for the 2020s", 2022, section 2 and appendix A; the narrowest width of R. Wightman.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

_WIDTHS, _DEPTHS = (40, 80, 160, 320), (2, 2, 6, 2)
_EPS = 1e-6


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm of the channels of a map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.linear = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + self.scale * y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Sequential):
    def __init__(self, classes: int = 1000) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 4, 4), _ChannelNorm(_WIDTHS[0], eps=_EPS)]
        for stage, (width, depth) in enumerate(zip(_WIDTHS, _DEPTHS, strict=True)):
            if stage > 0:
                layers += [_ChannelNorm(_WIDTHS[stage - 1], eps=_EPS), nn.Conv2d(_WIDTHS[stage - 1], width, 2, 2)]
            layers += [_Block(width) for _ in range(depth)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(_WIDTHS[-1], eps=_EPS)]
        super().__init__(*layers, *head, nn.Linear(_WIDTHS[-1], classes))
