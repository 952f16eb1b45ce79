# SPDX-License-Identifier: BSD-3-Clause
"""Pointwise 1x1 -> BN -> activation over real modules, in training.

What stands in front of most depthwise-separable convolutions since MobileNetV2: its map is the largest of a block. In
eval mode :mod:`fusedsep._chain` runs it.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _compat, _kernel_path, _ops, _sync
from ._activations import ACTIVATION_CODES, apply_activation
from ._ops import BATCH_STATISTICS, PointwiseOperands, PointwiseSettings
from ._running_statistics import update_running_statistics

#: Numbers in the output from which on the passes that are saved are worth more than what a call costs: a step of one
#: layer is 0.8 to 1.0 times as fast as through the modules below, and 1.0 to 2.2 times as fast above.
LEAST_NUMBERS = 2**16


class PointwiseConv:
    """The fused operation of one convolution, its BN and its activation. It owns no parameter.

    Small maps are left to the modules.

    Args:
        activation: what follows the BN.
        carried: the BN applies it itself.
    """

    def __init__(self, activation: str, carried: bool = False) -> None:
        self.activation, self.carried = activation, carried
        #: As in :class:`fusedsep._separable.SeparableConv`.
        self.norm_forwards = frozenset({nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward})
        self.training_norm_forwards = self.norm_forwards

    def __call__(self, x: torch.Tensor, conv: nn.Conv2d, bn: _BatchNorm) -> torch.Tensor:
        """``x``: ``Tensor[N, C, H, W]``."""
        operands = self._covered_tensors(x, conv, bn)
        if operands is None:
            return self.composite(x, conv, bn)
        x, channels_last, _ = _kernel_path.dense(x)
        settings = PointwiseSettings(*_kernel_path.mode_and_eps(bn), ACTIVATION_CODES[self.activation], channels_last)
        trains = settings.bn_mode == BATCH_STATISTICS
        if trains:
            # What the batch takes the place of must not reach autograd, which would find it changed by this step.
            operands = operands._replace(bn_mean=None, bn_var=None)
        y, _, mean, var, _ = _ops.pointwise_conv2d_training(x, *_kernel_path.contiguous(operands), *settings)
        if trains and bn.training and bn.track_running_stats:
            update_running_statistics(bn, mean, var, y.shape[0] * y.shape[2] * y.shape[3])
        return y

    def composite(self, x: torch.Tensor, conv: nn.Conv2d, bn: _BatchNorm) -> torch.Tensor:
        """The same thing through the modules themselves."""
        x = bn(conv(x))
        return x if self.carried else apply_activation(self.activation, x)

    def _covered_tensors(self, x: torch.Tensor, conv: nn.Conv2d, bn: _BatchNorm) -> PointwiseOperands | None:
        """What the call depends on besides ``x``, if the kernels are to run it: plain modules, no hooks."""
        if (
            _kernel_path.covers_map(x)
            and x.is_cpu
            and x.dim() == 4
            and x.shape[1] == conv.in_channels
            and x.numel() // conv.in_channels * conv.out_channels >= LEAST_NUMBERS
            and x.numel() > x.shape[1]  # more than one value a channel
            and _compat.is_plain_convolution(conv)
            and not _compat.has_hooks(conv)
            and _kernel_path.covers_norm(self, bn)
            and _sync.process_group(bn) is None
            and not _compat.has_global_hooks()
        ):
            operands = PointwiseOperands(*_kernel_path.weight_and_bias(conv), *_kernel_path.norm_tensors(bn))
            if _kernel_path.are_readable(x.dtype, operands) and (
                _kernel_path.uses_batch_statistics(bn) or _kernel_path.wants_gradient(x, operands)
            ):
                return operands
        return None

    def __repr__(self) -> str:
        return f"PointwiseConv({self.activation})"
