# SPDX-License-Identifier: BSD-3-Clause
"""Elements of a chain (see :mod:`fusedsep._chain_elements`) that multiply means of maps: gates and classifiers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import _ops
from ._activations import LAYER_ACTIVATION_CODES, apply_activation
from ._chain_convolutions import Convolution
from ._chain_layers import Place, means_layer, pack_product, pixels_layer, places_of, places_of_norm
from ._fold import scale_and_shift
from ._ops import ChainLayer
from ._padding import NO_PADS


class Product(NamedTuple):
    """``activation(bn(layer(x)))`` of a map of one pixel.

    Attributes:
        layer: an ``nn.Linear``, or a 1x1 convolution.
        bn: in eval mode with running statistics, or ``None``.
        activation: its name.
        carried: ``bn`` applies the activation itself.
    """

    layer: nn.Linear | nn.Conv2d
    bn: nn.Module | None
    activation: str
    carried: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Its channels, and the code of its activation."""
        return self.layer.weight.shape[0], LAYER_ACTIVATION_CODES[self.activation]

    def places(self) -> list[Place]:
        return [*places_of(self.layer), *places_of_norm(self.bn)]

    def pack(self) -> torch.Tensor:
        return pack_product(self.layer.weight.flatten(1), *scale_and_shift(self.layer, self.bn))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``Tensor[N, C]``, or ``Tensor[C]``."""
        y = F.linear(x, self.layer.weight.flatten(1), self.layer.bias)
        if self.bn is not None:
            y = self.bn(y[..., None, None])[..., 0, 0]
        return y if self.carried else apply_activation(self.activation, y)


class Gate:
    """Squeeze-and-excitation: a factor for each channel, made of the means of all.

    Equivalent to::

        y = x * gate(reduce(x.mean((2, 3))))[:, :, None, None]

    Args:
        products: ``reduce`` and ``gate``, which end in an activation each.
        modules: all that it stands for.

    Source: J. Hu et al., "Squeeze-and-Excitation Networks", 2018, section 3.
    """

    def __init__(self, products: list[Product], modules: list[nn.Module]) -> None:
        self.products, self.modules = products, modules
        self.in_channels = self.out_channels = products[-1].layer.out_channels

    def places(self) -> list[Place]:
        return [place for product in self.products for place in product.places()]

    def pack(self, nchw: bool) -> torch.Tensor:
        return torch.cat([product.pack() for product in self.products])

    def factors(self) -> list[ChainLayer]:
        """The layers that make them."""
        reduce, gate = self.products
        return [means_layer(*reduce.size), pixels_layer(*gate.size)]

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        if min(height, width) < 1:
            raise ValueError("x must have a pixel")
        product = ChainLayer(_ops.SUM, self.out_channels, 1, 1, *NO_PADS, 0, 0, gated=0)
        return [*self.factors(), product], height, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        reduce, gate = self.products
        return x * gate(reduce(x.mean((-2, -1))))[..., None, None]


class GatedConvolution(Gate):
    """A :class:`Gate` and the 1x1 convolution behind it, with its BN and its activation.

    Args:
        project: a pointwise one of stride 1.
    """

    def __init__(self, products: list[Product], project: Convolution, modules: list[nn.Module]) -> None:
        super().__init__(products, [*modules, *project.modules])
        self.project, self.out_channels = project, project.out_channels

    def places(self) -> list[Place]:
        return [*super().places(), *self.project.places()]

    def pack(self, nchw: bool) -> torch.Tensor:
        return torch.cat([super().pack(nchw), self.project.pack(nchw)])

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        project, height, width = self.project.layers(height, width, nchw)
        return [*self.factors(), project[0]._replace(gated=0)], height, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(super().__call__(x))


class Classifier:
    """The mean of each map, and products of these, as ``Tensor[N, classes]`` or as a map of one pixel.

    Args:
        products: one after the other.
        as_map: the output is ``Tensor[N, classes, 1, 1]``.
        modules: all that it stands for.
    """

    def __init__(self, products: list[Product], as_map: bool, modules: list[nn.Module]) -> None:
        self.products, self.as_map, self.modules = products, as_map, modules

    def places(self) -> list[Place]:
        return [place for product in self.products for place in product.places()]

    def pack(self, nchw: bool) -> torch.Tensor:
        return torch.cat([product.pack() for product in self.products])

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        first, *others = (product.size for product in self.products)
        return [means_layer(*first), *(pixels_layer(*size) for size in others)], 1, 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Without a batch dimension a 1x1 convolution works, and a linear layer behind a pool or a mean does not.
        y = x.mean((-2, -1) if self.as_map else (2, 3))
        for product in self.products:
            y = product(y)
        return y[..., None, None] if self.as_map else y
