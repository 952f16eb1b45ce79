# SPDX-License-Identifier: BSD-3-Clause
"""The drop-in block: the five modules of a depthwise-separable convolution, run as one operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._checks import check_positive_int
from ._padding import NO_PADS, PaddingArgument, Pads, convolution_pads, parse_padding, split_padding
from ._separable import SeparableConv
from ._structure import check_structure, rename_nested_keys


class DepthwiseSeparableBlock(nn.Module):
    """Depthwise 3x3 convolution, BN, activation, pointwise 1x1 convolution, BN, activation as one operation.

    Equivalent to::

        nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride, padding, dilation, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels, eps, momentum), nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, eps, momentum), nn.ReLU(),
        )

    The children ``dw`` and ``pw`` (``nn.Conv2d``), ``bn1`` and ``bn2`` (``nn.BatchNorm2d``) are real modules: hooks,
    optimizers, DDP and ``state_dict`` see what they always saw. ``load_state_dict`` takes the keys ``dw.weight``,
    ``bn1.weight``, ... and also ``dw.0.weight`` (convolution) with ``dw.1.weight`` (BN), likewise ``pw.0``, ``pw.1``.

    In training mode the statistics are those of the batch, and the running ones follow them, as in ``nn.BatchNorm2d``;
    each BN may be in a mode of its own. Kept for the backward pass are the input and what ``pw`` gave, or the input
    alone where no BN trains. A checkpoint (``torch.utils.checkpoint`` with ``use_reentrant=False``) that ends with a
    block moves the running statistics once, where unfused modules move them a second time in the backward pass.

    Args:
        in_channels, out_channels: channels of the input and the output map.
        stride: 1 or 2 run in the kernels; any other positive stride runs through ATen.
        padding: an int, ``(pad_h, pad_w)``, ``(left, right, top, bottom)`` as in ``F.pad``, or ``"same"``, which is
            TensorFlow's SAME (output ``ceil(size / stride)``, an odd zero at the right and bottom).
        dilation: distance of the kernel's taps, in pixels.
        activation, pointwise_activation: ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"none"``, after ``bn1`` and
            ``bn2``.
        eps, momentum: of both BNs, as in ``nn.BatchNorm2d``.

    Shape:
        ``Tensor[N, in_channels, H, W]`` or ``Tensor[in_channels, H, W]`` in; the same rank with ``out_channels`` out.
        A channels_last input gives a channels_last output.

    Raises:
        ValueError, TypeError: an argument or an input is not as above; the message names it.

    Source: A. Howard et al., "MobileNets", 2017, section 3.1 and figure 3.
    """

    dw: nn.Conv2d
    bn1: nn.BatchNorm2d | None
    pw: nn.Conv2d
    bn2: nn.BatchNorm2d | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        padding: PaddingArgument = 1,
        dilation: int = 1,
        activation: str = "relu",
        pointwise_activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("stride", stride),
            ("dilation", dilation),
        ):
            check_positive_int(value, name)
        conv_padding, pre_pad = split_padding(parse_padding(padding))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dw = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            stride,
            conv_padding,
            dilation,
            groups=in_channels,
            bias=False,
            **factory,
        )
        self.bn1 = nn.BatchNorm2d(in_channels, eps, momentum, **factory)
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self._separable = SeparableConv(activation, pointwise_activation, pre_pad)
        self.register_load_state_dict_pre_hook(rename_nested_keys)

    @classmethod
    def from_modules(
        cls,
        dw: nn.Conv2d,
        bn1: _BatchNorm | None,
        activation: str,
        pw: nn.Conv2d,
        bn2: _BatchNorm | None = None,
        pointwise_activation: str = "none",
        *,
        padding: PaddingArgument | None = None,
    ) -> DepthwiseSeparableBlock:
        """A block over existing modules, which it shares: same parameters, same buffers, same training mode.

        Args:
            dw: 3x3 ``nn.Conv2d`` with ``groups == in_channels == out_channels`` and zero padding; a bias is welcome.
            bn1, bn2: ``nn.BatchNorm2d`` or ``None`` where there is none (or it is folded into the convolution already).
            pw: 1x1 ``nn.Conv2d``, stride 1, no groups, no padding; a bias is welcome.
            padding: zeros around the map when ``dw`` itself has ``padding=0`` (a padding module stood in front of it);
                ``None`` takes ``dw``'s own.

        Raises:
            TypeError: a module is of the wrong kind.
            ValueError: ``dw`` or ``pw`` is not the convolution described, channels disagree, or ``padding`` is given
                though ``dw`` already pads differently.
        """
        check_structure(dw, bn1, pw, bn2)
        pre_pad: Pads | str = NO_PADS
        if padding is not None:
            wanted = parse_padding(padding)
            own = convolution_pads(dw)
            if own == NO_PADS:
                pre_pad = wanted
            elif own != wanted:
                raise ValueError(f"padding={padding!r} was given, but dw pads by itself: dw.padding={dw.padding!r}")
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.training = dw.training
        block.dw, block.bn1, block.pw, block.bn2 = dw, bn1, pw, bn2
        block._separable = SeparableConv(activation, pointwise_activation, pre_pad)
        block.register_load_state_dict_pre_hook(rename_nested_keys)
        return block

    @property
    def activation(self) -> str:
        """Name of the activation after ``bn1``."""
        return self._separable.activation

    @property
    def pointwise_activation(self) -> str:
        """Name of the activation after ``bn2``."""
        return self._separable.pointwise_activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._separable(x, self.dw, self.bn1, self.pw, self.bn2)

    def extra_repr(self) -> str:
        pre_pad = self._separable.pre_pad
        text = f"activation={self.activation!r}, pointwise_activation={self.pointwise_activation!r}"
        return text if pre_pad == NO_PADS else f"{text}, padding={pre_pad if pre_pad == 'same' else tuple(pre_pad)}"
