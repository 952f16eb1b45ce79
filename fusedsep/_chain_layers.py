# SPDX-License-Identifier: BSD-3-Clause
"""What elements of a chain are made of: the places of their tensors, packed products, and layers of the operator."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from . import _C, _ops
from ._ops import ChainLayer
from ._padding import NO_PADS

#: The attributes of a module, the one that holds its parameters or buffers, and a name there.
Place = tuple[dict[str, Any], str, str]


class LayerScale(NamedTuple):
    """A parameter of ``owner``, with a factor for each channel.

    Source: H. Touvron et al., "Going deeper with Image Transformers", 2021, section 2.
    """

    owner: nn.Module
    name: str

    @property
    def place(self) -> Place:
        return vars(self.owner), "_parameters", self.name

    @property
    def factors(self) -> torch.Tensor:
        return self.owner._parameters[self.name].flatten()


def tensors_at(places: list[Place]) -> tuple[torch.Tensor | None, ...]:
    """What is there; ``None`` also where there is no such name, as in a parametrized module."""
    return _C.tensors_at(tuple(itertools.chain(*places)))


def places_of(module: nn.Module) -> list[Place]:
    """Of the weight and the bias of a convolution or a linear layer."""
    return [(vars(module), "_parameters", "weight"), (vars(module), "_parameters", "bias")]


def places_of_norm(bn: nn.Module | None) -> list[Place]:
    """Of what a BN in eval mode reads, if there is one."""
    if bn is None:
        return []
    return [*places_of(bn), (vars(bn), "_buffers", "running_mean"), (vars(bn), "_buffers", "running_var")]


def pack_product(
    weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, eps: float | None = None
) -> torch.Tensor:
    """A product alone: ``weight`` is ``[N, C]``; of pixels that are normalized with ``eps``, if it is given."""
    no_depthwise = weight.new_zeros(weight.shape[1], 1, 3, 3)
    epsilons = None if eps is None else weight.new_full((weight.shape[1],), eps, dtype=torch.double)
    return _ops.pack(no_depthwise, None, epsilons, weight.contiguous()[:, :, None, None], scale, bias, True)


def pixels_layer(out_channels: int, activation: int) -> ChainLayer:
    """A 1x1 convolution."""
    return ChainLayer(_ops.PIXELS, out_channels, 1, 1, *NO_PADS, 0, activation)


def means_layer(out_channels: int, activation: int) -> ChainLayer:
    """A product of the mean of each map."""
    return ChainLayer(_ops.MEANS, out_channels, 1, 1, *NO_PADS, 0, activation)
