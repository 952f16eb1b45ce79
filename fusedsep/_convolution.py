# SPDX-License-Identifier: BSD-3-Clause
"""Convolution -> BN -> activation over real modules, in training, where the convolution belongs to no site.

The pointwise 1x1 convolution that stands in front of most depthwise-separable ones since MobileNetV2, whose map is the
largest of a block; the depthwise convolution with squeeze-and-excitation behind it, or with more than 3x3 taps; and the
3x3 convolution of the images, whose map is the largest of the network. In eval mode :mod:`fusedsep._chain` runs them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _compat, _kernel_path, _ops, _sync
from ._activations import CONVOLUTION_ACTIVATION_CODES, apply_activation
from ._ops import (
    BATCH_STATISTICS,
    ConvolutionOperands,
    ConvolutionSettings,
    DepthwiseSettings,
    PointwiseSettings,
)
from ._padding import NO_PADS, Pads, convolution_pads, output_size, resolve_padding
from ._running_statistics import update_running_statistics

#: Numbers in the output from which on the passes that are saved are worth more than what a call costs: a step of one
#: pointwise layer is 0.8 to 1.0 times as fast as through the modules below, and 1.0 to 2.2 times as fast above; one of
#: images 0.6 to 1.3 times, and 1.1 to 2.7 times.
LEAST_NUMBERS = 2**16


class ConvNormActivation:
    """The fused operation of one convolution, its BN and its activation. It owns no parameter.

    Small maps are left to the modules, and images that a gradient is wanted of.

    Args:
        activation: what follows the BN.
        carried: the BN applies it itself.
    """

    def __init__(self, activation: str, carried: bool = False) -> None:
        self.activation, self.carried = activation, carried
        #: As in :class:`fusedsep._separable.SeparableConv`.
        self.norm_forwards = frozenset({nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward})
        self.training_norm_forwards = self.norm_forwards
        #: The class of a convolution whose own forward adds ``carried_pad``.
        self.self_padding_class: type[nn.Conv2d] | None = None
        self.carried_pad: Pads | Literal["same"] = NO_PADS

    def __call__(self, x: torch.Tensor, conv: nn.Conv2d, bn: _BatchNorm) -> torch.Tensor:
        """Run it.

        Args:
            x: ``Tensor[N, C, H, W]``.
            conv: 1x1; depthwise with 3x3, 5x5 or 7x7 taps side by side; or 3x3 of few channels with one dilation; the
                last two with one stride.
            bn: what follows it.
        """
        operands = self._covered_tensors(x, conv, bn)
        if operands is None:
            return self.composite(x, conv, bn)
        mode, eps = _kernel_path.mode_and_eps(bn)
        trains = mode == BATCH_STATISTICS
        if trains:
            # What the batch takes the place of must not reach autograd, which would find it changed by this step.
            operands = operands._replace(bn_mean=None, bn_var=None)
        x, channels_last, _ = _kernel_path.dense(x)
        code = CONVOLUTION_ACTIVATION_CODES[self.activation]
        if _is_pointwise(conv):
            run, settings = _ops.pointwise_conv2d_training, PointwiseSettings(mode, eps, code, channels_last)
        else:
            geometry = conv.stride[0], conv.dilation[0], *self._pads(x, conv)
            if _is_depthwise(conv):
                run, kind = _ops.depthwise_conv2d_training, DepthwiseSettings
            else:
                run, kind = _ops.conv2d_training, ConvolutionSettings
                channels_last = channels_last or _is_channels_last(operands.weight)  # as torch decides
            settings = kind(mode, eps, *geometry, code, channels_last)
        y, _, mean, var, _ = run(x, *_kernel_path.contiguous(operands), *settings)
        if trains and bn.training and bn.track_running_stats:
            update_running_statistics(bn, mean, var, y.shape[0] * y.shape[2] * y.shape[3])
        return y

    def composite(self, x: torch.Tensor, conv: nn.Conv2d, bn: _BatchNorm) -> torch.Tensor:
        """The same thing through the modules themselves."""
        x = bn(conv(x))
        return x if self.carried else apply_activation(self.activation, x)

    def _covered_tensors(self, x: torch.Tensor, conv: nn.Conv2d, bn: _BatchNorm) -> ConvolutionOperands | None:
        """What the call depends on besides ``x``, if the kernels are to run it: plain modules, no hooks."""
        if (
            _kernel_path.covers_map(x)
            and x.is_cpu
            and x.dim() == 4
            and x.shape[1] == conv.in_channels
            and (_reads_maps(conv) or not (x.requires_grad and torch.is_grad_enabled()))
            and self._is_worth_a_call(x, conv)
            and (_compat.is_plain_convolution(conv) or _kernel_path.pads_itself(self, conv))
            and not _compat.has_hooks(conv)
            and _kernel_path.covers_norm(self, bn)
            and _sync.process_group(bn) is None
            and not _compat.has_global_hooks()
        ):
            operands = ConvolutionOperands(*_kernel_path.weight_and_bias(conv), *_kernel_path.norm_tensors(bn))
            if _kernel_path.are_readable(x.dtype, operands) and (
                _kernel_path.uses_batch_statistics(bn) or _kernel_path.wants_gradient(x, operands)
            ):
                return operands
        return None

    def _pads(self, x: torch.Tensor, conv: nn.Conv2d) -> Pads:
        """All zeros around ``x``."""
        if type(conv) is not self.self_padding_class:
            return convolution_pads(conv)
        geometry = conv.stride[0], conv.dilation[0], conv.kernel_size[0]
        return resolve_padding(self.carried_pad, *x.shape[2:], *geometry)

    def _is_worth_a_call(self, x: torch.Tensor, conv: nn.Conv2d) -> bool:
        """Whether the kernel fits, there is more than one value a channel, and the map is large enough."""
        height, width = x.shape[2:]
        if not _is_pointwise(conv):
            if min(height, width) < 1:
                return False
            pads = self._pads(x, conv)
            geometry = conv.stride[0], conv.dilation[0], conv.kernel_size[0]
            height = output_size(height, pads.top, pads.bottom, *geometry)
            width = output_size(width, pads.left, pads.right, *geometry)
            if min(height, width) < 1:
                return False
        values = x.shape[0] * height * width
        return values > 1 and values * conv.out_channels >= LEAST_NUMBERS

    def __repr__(self) -> str:
        return f"ConvNormActivation({self.activation})"


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1


def _reads_maps(conv: nn.Conv2d) -> bool:
    """Whether it has a gradient of its input."""
    return _is_pointwise(conv) or _is_depthwise(conv)


def _is_channels_last(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
