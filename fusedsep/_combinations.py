# SPDX-License-Identifier: BSD-3-Clause
"""Elements of a chain (see :mod:`fusedsep._chain_elements`) without weights: what becomes of maps between layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import _ops
from ._ops import ChainLayer
from ._padding import NO_PADS, Pads


class _WithoutWeights:
    def places(self) -> list[Any]:
        return []

    def pack(self, nchw: bool) -> torch.Tensor | None:
        return None


class Combination(_WithoutWeights):
    """Two maps of ``channels`` as one: their sum, or their channels in turns (``interleaved``); or a copy of one."""

    def __init__(self, channels: int, interleaved: bool = False) -> None:
        self.in_channels, self.interleaved = channels, interleaved
        self.modules: list[nn.Module] = []

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.interleaved else self.in_channels

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        if min(height, width) < 1:
            raise ValueError("x must have a pixel")
        rows = _ops.INTERLEAVED if self.interleaved else _ops.SUM
        return [ChainLayer(rows, self.out_channels, 1, 1, *NO_PADS, 0, 0)], height, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def interleave(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, other], -3).flatten(-4, -3)


class MaxPool(_WithoutWeights):
    """``F.max_pool2d(x, kernel, stride, padding)`` of a map of ``channels``; ``modules`` has what it stands for."""

    def __init__(self, channels: int, kernel: int, stride: int, padding: int, modules: list[nn.Module]) -> None:
        self.in_channels = self.out_channels = channels
        self.kernel, self.stride, self.padding, self.modules = kernel, stride, padding, modules

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        pads = Pads(*4 * (self.padding,))
        layer = ChainLayer(_ops.MAX_POOL, self.out_channels, self.stride, 1, *pads, 0, 0, kernel=self.kernel)
        sizes = layer.sizes(height, width)
        if min(height, width, *sizes) < 1:
            raise ValueError("x must hold a window")
        return [layer], *sizes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding)


class Upsample(_WithoutWeights):
    """``F.interpolate(x, scale_factor=2)`` of a map of ``channels``; ``modules`` as in a max pool."""

    def __init__(self, channels: int, modules: list[nn.Module]) -> None:
        self.in_channels = self.out_channels = channels
        self.modules = modules

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        if min(height, width) < 1:
            raise ValueError("x must have a pixel")
        return [ChainLayer(_ops.UPSAMPLE, self.out_channels, 1, 1, *NO_PADS, 0, 0)], 2 * height, 2 * width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2)
