# SPDX-License-Identifier: BSD-3-Clause
"""Zero padding around a map: one spelling inside, four spellings outside."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Pads(NamedTuple):
    """Zero rows and columns on each side of a map, in the order of ``torch.nn.functional.pad``."""

    left: int
    right: int
    top: int
    bottom: int

    def __add__(self, other: Pads) -> Pads:  # type: ignore[override]
        return Pads(*(a + b for a, b in zip(self, other, strict=True)))


NO_PADS = Pads(0, 0, 0, 0)

#: What a user may write: ``1``, ``(pad_h, pad_w)``, ``(left, right, top, bottom)`` or ``"same"``.
PaddingArgument = int | tuple[int, int] | tuple[int, int, int, int] | Literal["same"]


def parse_padding(padding: object, argument: str = "padding") -> Pads | Literal["same"]:
    """Turn any accepted spelling of ``padding`` into :class:`Pads`, or ``"same"``, which needs the map's size.

    Raises:
        TypeError: ``padding`` is none of the four spellings.
        ValueError: a side is negative, or a string other than ``"same"`` came.
    """
    wanted = "an int, (pad_h, pad_w), (left, right, top, bottom) or 'same'"
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"{argument} must be {wanted}, got {padding!r}")
        return "same"
    if _is_int(padding):
        pads = Pads(padding, padding, padding, padding)
    elif isinstance(padding, (tuple, list)) and len(padding) in (2, 4) and all(_is_int(side) for side in padding):
        if len(padding) == 2:
            pad_h, pad_w = padding
            pads = Pads(pad_w, pad_w, pad_h, pad_h)
        else:
            pads = Pads(*padding)
    else:
        raise TypeError(f"{argument} must be {wanted}, got {padding!r}")
    if min(pads) < 0:
        raise ValueError(f"{argument} must not be negative, got {padding!r}")
    return pads


def resolve_padding(
    padding: Pads | Literal["same"], height: int, width: int, stride: int, dilation: int, kernel: int = 3
) -> Pads:
    """The pads of a ``kernel`` x ``kernel`` one on a ``height`` x ``width`` map.

    ``"same"`` is TensorFlow's rule: the output has ``ceil(size / stride)`` rows or columns, and an odd pad puts
    its extra zero at the right or bottom (``tf.nn.convolution``, padding ``SAME``).
    """
    if padding != "same":
        return padding
    top, bottom = _same_pads(height, stride, dilation, kernel)
    left, right = _same_pads(width, stride, dilation, kernel)
    return Pads(left, right, top, bottom)


def sum_of_pads(a: Pads | Literal["same"], b: Pads | Literal["same"]) -> Pads | Literal["same"]:
    """Both together; ``"same"`` goes with no other padding."""
    if NO_PADS in (a, b):
        return a if b == NO_PADS else b
    return a + b


def convolution_pads(conv: nn.Conv2d) -> Pads:
    """The zero padding that ``conv`` itself applies, whichever way it was spelled."""
    if conv.padding == "valid":
        return NO_PADS
    if conv.padding == "same":  # torch allows it at stride 1 only; an odd total puts the extra zero right or bottom
        total_h, total_w = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return Pads(total_w // 2, total_w - total_w // 2, total_h // 2, total_h - total_h // 2)
    pad_h, pad_w = conv.padding
    return Pads(pad_w, pad_w, pad_h, pad_h)


def output_size(size: int, pad_before: int, pad_after: int, stride: int, dilation: int, kernel: int = 3) -> int:
    """Rows or columns that a kernel of as many taps gives; zero or less where it does not fit."""
    return (size + pad_before + pad_after - (kernel - 1) * dilation - 1) // stride + 1


def split_padding(padding: Pads | Literal["same"]) -> tuple[tuple[int, int], Pads | Literal["same"]]:
    """What ``nn.Conv2d`` can pad by itself, as ``(pad_h, pad_w)``, and what must be padded in front of it."""
    if padding != "same" and padding.left == padding.right and padding.top == padding.bottom:
        return (padding.top, padding.left), NO_PADS
    return (0, 0), padding


# One call for FX: which zeros "same" needs depends on the size of the map, which a trace does not know.
@torch.fx.wrap
def pad_map(x: torch.Tensor, padding: Pads | Literal["same"], stride: int, dilation: int) -> torch.Tensor:
    """``x`` with the zeros around it that a 3x3 convolution needs; ``x`` itself where there are none."""
    pads = resolve_padding(padding, x.shape[-2], x.shape[-1], stride, dilation)
    return F.pad(x, pads) if any(pads) else x


class SamePad(nn.Module):
    """TensorFlow's SAME padding as a module in front of a 3x3 convolution with ``padding=0``.

    Args:
        stride, dilation: those of the convolution behind it.
    """

    def __init__(self, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.dilation = dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pad_map(x, "same", self.stride, self.dilation)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, dilation={self.dilation}"


def _same_pads(size: int, stride: int, dilation: int, kernel: int) -> tuple[int, int]:
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
