# SPDX-License-Identifier: BSD-3-Clause
"""What counts as a depthwise 3x3 and a pointwise 1x1 convolution, for the block and the surgery alike."""

from __future__ import annotations

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm


def why_not_depthwise(conv: nn.Module) -> str | None:
    """The reason why ``conv`` is not a depthwise 3x3 convolution the op can run, or ``None`` if it is one."""
    if not isinstance(conv, nn.Conv2d):
        return f"is {type(conv).__name__}, not nn.Conv2d"
    if conv.groups != conv.in_channels:
        return f"groups={conv.groups} with {conv.in_channels} input channels is not depthwise"
    if conv.out_channels != conv.in_channels:
        return f"channel multiplier {conv.out_channels // conv.in_channels}"
    if tuple(conv.kernel_size) != (3, 3):
        return f"kernel size {tuple(conv.kernel_size)}"
    if conv.stride[0] != conv.stride[1]:
        return f"stride {tuple(conv.stride)}"
    if conv.dilation[0] != conv.dilation[1]:
        return f"dilation {tuple(conv.dilation)}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    return None


def why_not_pointwise(conv: nn.Module) -> str | None:
    """The reason why ``conv`` is not a plain 1x1 convolution, or ``None`` if it is one."""
    if not isinstance(conv, nn.Conv2d):
        return f"is {type(conv).__name__}, not nn.Conv2d"
    if tuple(conv.kernel_size) != (1, 1):
        return f"kernel size {tuple(conv.kernel_size)}"
    if tuple(conv.stride) != (1, 1):
        return f"stride {tuple(conv.stride)}"
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if conv.padding not in ((0, 0), "valid", "same"):
        return f"padding {conv.padding}"
    return None


def check_structure(dw: nn.Conv2d, bn1: _BatchNorm | None, pw: nn.Conv2d, bn2: _BatchNorm | None) -> None:
    """Raise if the four modules do not form a depthwise-separable convolution; the message names the module."""
    for name, module, why_not in (("dw", dw, why_not_depthwise), ("pw", pw, why_not_pointwise)):
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"{name} must be nn.Conv2d, got {type(module).__name__}")
        reason = why_not(module)
        if reason is not None:
            raise ValueError(f"{name} is not the convolution of a depthwise-separable block: {reason}")
    if pw.in_channels != dw.out_channels:
        raise ValueError(f"pw must take the {dw.out_channels} channels of dw, got pw.in_channels={pw.in_channels}")
    for name, bn, conv in (("bn1", bn1, dw), ("bn2", bn2, pw)):
        if bn is None:
            continue
        if not isinstance(bn, _BatchNorm):
            raise TypeError(f"{name} must be nn.BatchNorm2d or None, got {type(bn).__name__}")
        if bn.num_features != conv.out_channels:
            raise ValueError(f"{name} must have {conv.out_channels} features, got {bn.num_features}")


_NESTED = {"dw.0.": "dw.", "dw.1.": "bn1.", "pw.0.": "pw.", "pw.1.": "bn2."}


def rename_nested_keys(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """``load_state_dict`` pre-hook: accept ``dw = Sequential(conv, bn, act)`` keys for the flat children.

    ``state_dict`` is the copy that ``load_state_dict`` made, so the caller's dictionary stays as it is.
    """
    for nested, flat in _NESTED.items():
        old_prefix = prefix + nested
        for key in [key for key in state_dict if key.startswith(old_prefix)]:
            state_dict[prefix + flat + key[len(old_prefix) :]] = state_dict.pop(key)
