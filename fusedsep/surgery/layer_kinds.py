# SPDX-License-Identifier: BSD-3-Clause
"""Which convolutions the kernels run by themselves."""

from __future__ import annotations

import torch.nn as nn

from .._chain_convolutions import MOST_IMAGE_CHANNELS
from .._compat import is_plain_convolution
from .._structure import why_not_pointwise

#: Output channels of a group; fewer do not fill a vector.
_LEAST_GROUP = 16


def is_plain_pointwise(module: nn.Module | None) -> bool:
    """Whether ``module`` is a 1x1 convolution and runs torch's own forward."""
    return module is not None and why_not_pointwise(module) is None and is_plain_convolution(module)


def is_pointwise_layer(conv: nn.Module | None) -> bool:
    """Whether ``conv`` is a 1x1 convolution, also of every second pixel, and runs torch's own forward."""
    if conv is None or not isinstance(conv, nn.Conv2d) or tuple(conv.stride) != (2, 2):
        return is_plain_pointwise(conv)
    sizes = tuple(conv.kernel_size), conv.groups, conv.padding
    return sizes == ((1, 1), 1, (0, 0)) and is_plain_convolution(conv)


def is_grouped_layer(conv: nn.Module | None) -> bool:
    """Whether each group of ``conv`` is a 1x1 or 3x3 convolution that is worth a product."""
    return (
        isinstance(conv, nn.Conv2d)
        and 1 < conv.groups < conv.in_channels
        and conv.out_channels // conv.groups >= _LEAST_GROUP
        and is_plain_convolution(conv)
        and conv.stride[0] == conv.stride[1] <= 2
        and conv.dilation[0] == conv.dilation[1]
        and conv.padding_mode == "zeros"
        and (tuple(conv.kernel_size) == (3, 3) or (tuple(conv.kernel_size), conv.padding) == ((1, 1), (0, 0)))
    )


def is_first_convolution(conv: nn.Module | None) -> bool:
    """Whether ``conv`` is a whole convolution, as below, of images."""
    return is_whole_convolution(conv) and conv.in_channels <= MOST_IMAGE_CHANNELS


def is_whole_convolution(conv: nn.Module | None) -> bool:
    """Whether ``conv`` is a 3x3 convolution of all channels that the kernels run, whatever its forward does besides."""
    return (
        isinstance(conv, nn.Conv2d)
        and tuple(conv.kernel_size) == (3, 3)
        and conv.groups == 1
        and conv.stride[0] == conv.stride[1] <= 2
        and conv.dilation[0] == conv.dilation[1]
        and conv.padding_mode == "zeros"
    )


def is_depthwise_map(conv: nn.Module | None) -> bool:
    """Whether ``conv`` is a depthwise convolution that is trained by itself, whatever its forward does besides."""
    return is_depthwise_layer(conv) and conv.kernel_size[0] in (3, 5, 7) and tuple(conv.dilation) == (1, 1)


def is_depthwise_layer(conv: nn.Module | None) -> bool:
    """Whether ``conv`` is a depthwise convolution that is a layer of a chain, whatever its forward does besides."""
    return _is_depthwise(conv, 1)


def is_doubling_layer(conv: nn.Module | None) -> bool:
    """Whether ``conv`` is the same with two filters for each channel, which are two layers of a chain."""
    return _is_depthwise(conv, 2)


def _is_depthwise(conv: nn.Module | None, multiplier: int) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.groups == conv.in_channels > 1
        and conv.out_channels == multiplier * conv.in_channels
        and conv.kernel_size[0] == conv.kernel_size[1] in (3, 5, 7, 9, 11)
        and conv.stride[0] == conv.stride[1] <= 2
        and conv.dilation[0] == conv.dilation[1]
        and conv.padding_mode == "zeros"
    )
