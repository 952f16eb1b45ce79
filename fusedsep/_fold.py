# SPDX-License-Identifier: BSD-3-Clause
"""BatchNorm with fixed statistics as a scale and a shift of the convolution in front of it.

``bn`` is ``nn.BatchNorm2d`` or anything else with its ``weight``, ``bias``, ``running_mean``, ``running_var`` and
``eps``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn


def scale_and_shift(conv: nn.Conv2d, bn: Any | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``bn(conv(x)) = scale * conv_without_bias(x) + shift`` per output channel, in float64; ``None`` is 1 and 0."""
    return scale_and_shift_tensors(conv.bias, bn)


def scale_and_shift_tensors(
    bias: torch.Tensor | None, bn: Any | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """:func:`scale_and_shift` for a convolution given by its bias.

    ``scale = gamma / sqrt(running_var + eps)``, ``shift = beta + (bias - running_mean) * scale``
    (S. Ioffe, C. Szegedy, "Batch Normalization", 2015, section 3.1).
    """
    with torch.no_grad():
        bias = None if bias is None else bias.double()
        if bn is None:
            return None, bias
        scale = torch.rsqrt(bn.running_var.double() + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale if bias is None else (bias - bn.running_mean.double()) * scale
        if bn.bias is not None:
            shift = shift + bn.bias.double()
        return scale, shift


def channels_of_norm(bn: Any, channels: slice) -> Any:
    """What normalizes some channels as ``bn`` does."""
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: getattr(bn, name) for name in names}
    cut = {name: None if tensor is None else tensor[channels] for name, tensor in tensors.items()}
    return SimpleNamespace(**cut, eps=bn.eps)


def fold(conv: nn.Conv2d, bn: Any | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution that equals ``bn(conv(x))``; computed in float64, rounded once."""
    return fold_tensors(conv.weight, conv.bias, bn)


def fold_tensors(weight: torch.Tensor, bias: torch.Tensor | None, bn: Any | None) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`fold` for a convolution given by its tensors."""
    scale, shift = scale_and_shift_tensors(bias, bn)
    with torch.no_grad():
        folded = weight.double()
        if scale is not None:
            folded = folded * scale.view(-1, 1, 1, 1)
        if shift is None:
            shift = torch.zeros(weight.shape[0], dtype=torch.double, device=weight.device)
        return folded.to(weight.dtype), shift.to(weight.dtype)
