# SPDX-License-Identifier: BSD-3-Clause
"""The same networks from plain torch modules: what the fused ones must equal, in float64 or in any other type.

Constructor arguments and ``state_dict`` keys are those of the fused twins; no kernel of this package runs here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from ._activations import activation_module
from ._padding import NO_PADS, PaddingArgument, SamePad, parse_padding, split_padding
from .mobilenet import MobileNetV1Skeleton


class DepthwiseSeparableBlock(nn.Module):
    """Unfused twin of :class:`fusedsep.DepthwiseSeparableBlock`; arguments as there, ``Tensor[N, C, H, W]`` only."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        padding: PaddingArgument = 1,
        dilation: int = 1,
        activation: str = "relu",
        pointwise_activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        conv_padding, pads = split_padding(parse_padding(padding))
        if pads == "same":
            self.pad: nn.Module = SamePad(stride, dilation)
        else:
            self.pad = nn.Identity() if pads == NO_PADS else nn.ZeroPad2d(pads)
        self.dw = nn.Conv2d(
            in_channels, in_channels, 3, stride, conv_padding, dilation, groups=in_channels, bias=False, **factory
        )
        self.bn1 = nn.BatchNorm2d(in_channels, eps, momentum, **factory)
        self.act1 = activation_module(activation)
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.act2 = activation_module(pointwise_activation, "pointwise_activation")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.dw(self.pad(x))))
        return self.act2(self.bn2(self.pw(x)))


class MobileNetV1(MobileNetV1Skeleton):
    """Unfused twin of :class:`fusedsep.MobileNetV1`; arguments as there."""

    block_class = DepthwiseSeparableBlock
