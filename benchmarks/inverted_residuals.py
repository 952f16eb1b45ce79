# SPDX-License-Identifier: BSD-3-Clause
"""Networks of inverted residual blocks, in plain ``torch.nn``: 1x1 convolutions make the maps of depthwise ones wide.

Sources: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2; M. Tan et al.,
"MnasNet: Platform-Aware Neural Architecture Search for Mobile", 2019, figure 7 (without squeeze-and-excitation, "B1");
A. Howard et al., "Searching for MobileNetV3", 2019, table 1; M. Tan, Q. Le, "EfficientNet: Rethinking Model Scaling for
Convolutional Neural Networks", 2019, table 1. EfficientNet-Lite is the last one with ReLU6 and without
squeeze-and-excitation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn as nn

#: Expansion, kernel, output channels, how many blocks, stride of the first.
_MOBILENET_V2 = [
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 3, 32, 3, 2),
    (6, 3, 64, 4, 2),
    (6, 3, 96, 3, 1),
    (6, 3, 160, 3, 2),
    (6, 3, 320, 1, 1),
]
_MNASNET = [
    (1, 3, 16, 1, 1),
    (3, 3, 24, 3, 2),
    (3, 5, 40, 3, 2),
    (6, 5, 80, 3, 2),
    (6, 3, 96, 2, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
]
_EFFICIENTNET = [
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
]
#: Kernel, hidden and output channels, squeezed ones or 0, activation, stride.
_MOBILENET_V3 = [
    (3, 16, 16, 0, nn.ReLU, 1),
    (3, 64, 24, 0, nn.ReLU, 2),
    (3, 72, 24, 0, nn.ReLU, 1),
    (5, 72, 40, 24, nn.ReLU, 2),
    (5, 120, 40, 32, nn.ReLU, 1),
    (5, 120, 40, 32, nn.ReLU, 1),
    (3, 240, 80, 0, nn.Hardswish, 2),
    (3, 200, 80, 0, nn.Hardswish, 1),
    (3, 184, 80, 0, nn.Hardswish, 1),
    (3, 184, 80, 0, nn.Hardswish, 1),
    (3, 480, 112, 120, nn.Hardswish, 1),
    (3, 672, 112, 168, nn.Hardswish, 1),
    (5, 672, 160, 168, nn.Hardswish, 2),
    (5, 960, 160, 240, nn.Hardswish, 1),
    (5, 960, 160, 240, nn.Hardswish, 1),
]


class BlockSettings(NamedTuple):
    """One block; with squeeze-and-excitation where ``squeezed`` is not 0."""

    in_channels: int
    hidden: int
    out_channels: int
    kernel: int
    stride: int
    activation: type[nn.Module]
    squeezed: int
    gate: type[nn.Module] = nn.Sigmoid
    gate_activation: type[nn.Module] = nn.SiLU


class InvertedResidualNetwork(nn.Module):
    """``Tensor[N, 3, H, W] -> Tensor[N, 1000]``; without the dropout in front of the classifier.

    Args:
        stem: channels of the first convolution, and ``activation`` behind it and behind the last 1x1 convolution.
        last, head: channels of that one, and of a 1x1 convolution of the means behind it or 0.
    """

    def __init__(
        self,
        stem: int,
        blocks: Iterable[BlockSettings],
        last: int,
        activation: type[nn.Module],
        head: int = 0,
    ) -> None:
        super().__init__()
        blocks = list(blocks)
        self.features = nn.Sequential(
            _convolution(3, stem, 3, 2, activation=activation),
            *map(_Block, blocks),
            _convolution(blocks[-1].out_channels, last, 1, activation=activation),
        )
        self.head = nn.Sequential(nn.Linear(last, head), activation()) if head else nn.Identity()
        self.classifier = nn.Linear(head or last, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.head(self.features(x).mean((2, 3))))


def mobilenet_v2() -> nn.Module:
    return InvertedResidualNetwork(32, _expanded(_MOBILENET_V2, nn.ReLU6), 1280, nn.ReLU6)


def mobilenet_v3_large() -> nn.Module:
    blocks, channels = [], 16
    for kernel, hidden, out_channels, squeezed, activation, stride in _MOBILENET_V3:
        gate = nn.Hardsigmoid, nn.ReLU
        blocks.append(BlockSettings(channels, hidden, out_channels, kernel, stride, activation, squeezed, *gate))
        channels = out_channels
    return InvertedResidualNetwork(16, blocks, 960, nn.Hardswish, 1280)


def mnasnet() -> nn.Module:
    return InvertedResidualNetwork(32, _expanded(_MNASNET, nn.ReLU), 1280, nn.ReLU)


def efficientnet_b0() -> nn.Module:
    return InvertedResidualNetwork(32, _expanded(_EFFICIENTNET, nn.SiLU, excite=True), 1280, nn.SiLU)


def efficientnet_lite0() -> nn.Module:
    return InvertedResidualNetwork(32, _expanded(_EFFICIENTNET, nn.ReLU6), 1280, nn.ReLU6)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2": mobilenet_v2,
    "MobileNetV3 large": mobilenet_v3_large,
    "MnasNet": mnasnet,
    "EfficientNet-Lite0": efficientnet_lite0,
    "EfficientNet-B0": efficientnet_b0,
}


def _expanded(
    table: list[tuple[int, int, int, int, int]], activation: type[nn.Module], excite: bool = False
) -> Iterable[BlockSettings]:
    channels = 32
    for expansion, kernel, out_channels, count, stride in table:
        for i in range(count):
            squeezed = channels // 4 if excite else 0
            own = stride if i == 0 else 1
            yield BlockSettings(channels, expansion * channels, out_channels, kernel, own, activation, squeezed)
            channels = out_channels


class _Block(nn.Module):
    def __init__(self, s: BlockSettings) -> None:
        super().__init__()
        self.has_residual = s.stride == 1 and s.in_channels == s.out_channels
        self.layers = nn.Sequential(
            *([_convolution(s.in_channels, s.hidden, 1, activation=s.activation)] if s.hidden > s.in_channels else []),
            _convolution(s.hidden, s.hidden, s.kernel, s.stride, s.hidden, s.activation),
            *([_Excitation(s.hidden, s.squeezed, s.gate_activation, s.gate)] if s.squeezed else []),
            nn.Conv2d(s.hidden, s.out_channels, 1, bias=False),
            nn.BatchNorm2d(s.out_channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.has_residual else self.layers(x)


class _Excitation(nn.Module):
    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.reduce, self.activation = nn.Conv2d(channels, squeezed, 1), activation()
        self.expand, self.gate = nn.Conv2d(squeezed, channels, 1), gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))))


def _convolution(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] = nn.ReLU6,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        activation(inplace=True),
    )
