# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV1 from fused blocks: the table of the paper as data, and the network that reads it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn

from . import _sync
from ._activations import activation_module
from ._checks import check_positive_int
from ._padding import PaddingArgument, pad_map, parse_padding, split_padding
from .block import DepthwiseSeparableBlock

# It is one call for FX where it is defined; each module that calls it by its name has to say so too.
torch.fx.wrap("pad_map")

#: Output channels of the first convolution at width 1.0; its stride is 2.
FIRST_CHANNELS = 32

#: (output channels at width 1.0, stride) of the 13 blocks. Howard et al., table 1, prints the last depthwise
#: convolution with stride 2, but its map stays 7x7: the stride is 1.
STAGES: tuple[tuple[int, int], ...] = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


def scaled_channels(channels: int, width_multiplier: float) -> int:
    """``channels * width_multiplier`` rounded down, at least 1; a whole number at the paper's 1, 0.75, 0.5 and 0.25."""
    return max(1, int(channels * width_multiplier))


class _FirstConvolution(nn.Sequential):
    """Convolution, BN and activation, where ``nn.SyncBatchNorm`` trains as it does in the blocks: on the CPU too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = _sync.batch_norm(module, x) if isinstance(module, nn.SyncBatchNorm) else module(x)
        return x


class MobileNetV1Skeleton(nn.Module):
    """MobileNetV1 over any block class with the constructor of :class:`DepthwiseSeparableBlock`."""

    block_class: type[nn.Module]

    def __init__(
        self,
        num_classes: int = 1000,
        width_multiplier: float = 1.0,
        *,
        in_channels: int = 3,
        activation: str = "relu",
        padding: PaddingArgument = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(num_classes, "num_classes")
        check_positive_int(in_channels, "in_channels")
        if not isinstance(width_multiplier, (int, float)) or isinstance(width_multiplier, bool):
            raise TypeError(f"width_multiplier must be a number, got {width_multiplier!r}")
        if not 0 < width_multiplier < math.inf:
            raise ValueError(f"width_multiplier must be greater than 0 and finite, got {width_multiplier}")
        self.in_channels = in_channels
        conv_padding, self._first_pad = split_padding(parse_padding(padding))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        channels = scaled_channels(FIRST_CHANNELS, width_multiplier)
        self.first_conv = _FirstConvolution(
            nn.Conv2d(in_channels, channels, 3, 2, conv_padding, bias=False, **factory),
            nn.BatchNorm2d(channels, eps, momentum, **factory),
            activation_module(activation),
        )
        blocks = []
        for base_channels, stride in STAGES:
            out_channels = scaled_channels(base_channels, width_multiplier)
            block = self.block_class(
                channels,
                out_channels,
                stride,
                padding=padding,
                activation=activation,
                pointwise_activation=activation,
                eps=eps,
                momentum=momentum,
                **factory,
            )
            blocks.append(block)
            channels = out_channels
        self.stage_layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The padding stands here and not in ``first_conv``, so that the keys ``first_conv.0`` (convolution) and
        # ``first_conv.1`` (BN) do not depend on it.
        x = pad_map(_checked_images(x, self.in_channels), self._first_pad, 2, 1)
        x = self.stage_layers(self.first_conv(x))
        return self.linear(x.mean(dim=(2, 3)))


# One call for FX, which cannot branch on a shape.
@torch.fx.wrap
def _checked_images(x: torch.Tensor, in_channels: int) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != in_channels or 0 in x.shape[2:]:
        raise ValueError(f"x must be images of shape [N, {in_channels}, H, W], got {list(x.shape)}")
    return x


class MobileNetV1(MobileNetV1Skeleton):
    """MobileNetV1 with fused blocks, for images of any size.

    Equivalent to::

        first_conv   = Conv2d(in_channels, c(32), 3, stride=2, padding=padding), BatchNorm2d, activation
        stage_layers = DepthwiseSeparableBlock(c(32), c(64), 1), (c(64), c(128), 2), ... 13 of them, see ``STAGES``
        linear       = Linear(c(1024), num_classes)

        logits = linear(stage_layers(first_conv(x)).mean(dim=(2, 3)))

    Args:
        num_classes: size of the output.
        width_multiplier: the paper's alpha, any number greater than 0. A layer has ``c(n) = max(1, int(n * alpha))``
            channels, which reproduces the paper's networks at 1.0, 0.75, 0.5 and 0.25.
        in_channels: channels of the images.
        activation: ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"none"``, after every BN.
        padding: of every 3x3 convolution, the first one included; any spelling of :class:`DepthwiseSeparableBlock`.
            Networks trained in TensorFlow need ``"same"``.
        eps, momentum: of every BN, as in ``nn.BatchNorm2d``. Networks trained in TensorFlow use ``eps=1e-3``.
        device, dtype: of the parameters and buffers.

    Shape:
        ``Tensor[N, in_channels, H, W]`` in, ``Tensor[N, num_classes]`` logits out.

    Raises:
        TypeError, ValueError: an argument or the input is not as above; the message names it.

    Source: A. Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
    2017, table 1 and section 3.3.
    """

    block_class = DepthwiseSeparableBlock
