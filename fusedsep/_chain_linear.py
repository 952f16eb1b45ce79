# SPDX-License-Identifier: BSD-3-Clause
"""The element of a chain (see :mod:`fusedsep._chain_elements`) that is a linear layer of the channels of each pixel."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import _ops
from ._activations import LAYER_ACTIVATION_CODES, apply_activation
from ._chain_layers import LayerScale, Place, pack_product, pixels_layer, places_of
from ._ops import ChainLayer


class ChannelLinear:
    """``scale * activation(linear(norm(x)))`` of the channels of each pixel.

    Args:
        layer: an ``nn.Linear``, or a 1x1 convolution of stride 1.
        norm: of the channels, in front of it, or ``None`` (J. Ba et al., "Layer Normalization", 2016, section 3).
        activation: its name.
        scale: of its output, or ``None``; not behind an activation.
        modules: all that it stands for.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        norm: nn.LayerNorm | None,
        activation: str,
        scale: LayerScale | None,
        modules: list[nn.Module],
    ) -> None:
        self.layer, self.norm, self.activation, self.scale, self.modules = layer, norm, activation, scale, modules
        self.out_channels, self.in_channels = layer.weight.shape[:2]

    def scaled(self, scale: LayerScale) -> ChannelLinear:
        """The same with factors of its output."""
        other = copy.copy(self)
        other.scale = scale
        return other

    def places(self) -> list[Place]:
        places = places_of(self.layer)
        if self.norm is not None:
            places += places_of(self.norm)
        return places if self.scale is None else [*places, self.scale.place]

    def pack(self, nchw: bool) -> torch.Tensor:
        """Factors of both sides folded into the weight, in float64."""
        weight, bias = self.layer.weight.flatten(1), self.layer.bias
        dtype, weight = weight.dtype, weight.double()
        shift = weight.new_zeros(len(weight)) if bias is None else bias.double()
        if self.norm is not None:
            norm = self.norm
            shift = shift if norm.bias is None else shift + weight @ norm.bias.double()
            weight = weight if norm.weight is None else weight * norm.weight.double()
        if self.scale is not None:
            factors = self.scale.factors.double()
            weight, shift = weight * factors[:, None], shift * factors
        return pack_product(weight.to(dtype), None, shift, None if self.norm is None else self.norm.eps)

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        if min(height, width) < 1:
            raise ValueError("x must have a pixel")
        layer = pixels_layer(self.out_channels, LAYER_ACTIVATION_CODES[self.activation])
        if self.norm is not None:
            layer = layer._replace(rows=_ops.NORMALIZED_PIXELS)
        return [layer], height, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(-3, -1)
        if self.norm is not None:
            x = F.layer_norm(x, (self.in_channels,), self.norm.weight, self.norm.bias, self.norm.eps)
        x = apply_activation(self.activation, F.linear(x, self.layer.weight.flatten(1), self.layer.bias))
        return (x if self.scale is None else x * self.scale.factors).movedim(-1, -3)
