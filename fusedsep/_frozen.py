# SPDX-License-Identifier: BSD-3-Clause
"""A depthwise-separable convolution with everything constant folded in: for deployment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import _kernel_path
from ._activations import apply_activation
from ._checks import check_input, checked_pads
from ._fold import fold
from ._padding import NO_PADS, Pads, convolution_pads, pad_map
from ._separable import SeparableConv

HOW_TO_TRAIN = "a frozen model cannot be trained: keep the model that freeze was called on to train"


class FrozenSeparable(nn.Module):
    """One site of a frozen model; eval only.

    Equivalent to::

        h = activation(F.conv2d(F.pad(x, pads), dw_weight, dw_bias, stride, 0, dilation, groups=C))
        y = pointwise_activation(F.conv2d(h, pw_weight, pw_bias))

    Args:
        separable: the operation of the site.
        dw, bn1, pw, bn2: its modules, whose numbers are folded in float64 and rounded once.

    Shape:
        ``Tensor[N, C, H, W]`` or ``Tensor[C, H, W]`` in; the same rank out.
    """

    dw_weight: torch.Tensor
    dw_bias: torch.Tensor
    pw_weight: torch.Tensor
    pw_bias: torch.Tensor

    def __init__(
        self,
        separable: SeparableConv,
        dw: nn.Conv2d,
        bn1: nn.Module | None,
        pw: nn.Conv2d,
        bn2: nn.Module | None,
    ) -> None:
        super().__init__()
        dw_weight, dw_bias = fold(dw, bn1)
        pw_weight, pw_bias = fold(pw, bn2)
        self.register_buffer("dw_weight", dw_weight)
        self.register_buffer("dw_bias", dw_bias)
        self.register_buffer("pw_weight", pw_weight)
        self.register_buffer("pw_bias", pw_bias)
        self.stride: int = dw.stride[0]
        self.dilation: int = dw.dilation[0]
        self.padding = NO_PADS if type(dw) is separable.self_padding_class else convolution_pads(dw)
        self.pre_pad: Pads | Literal["same"] = separable.pre_pad
        self.activation = separable.activation
        self.pointwise_activation = separable.pointwise_activation
        self.training = False
        self._cache = _kernel_path.PackedCache()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffers = self._buffers  # several times as fast as nn.Module.__getattr__
        dw_weight, dw_bias, pw_weight, pw_bias = (
            buffers["dw_weight"],
            buffers["dw_bias"],
            buffers["pw_weight"],
            buffers["pw_bias"],
        )
        geometry = self.pre_pad, self.padding, self.stride, self.dilation
        if _kernel_path.applies_to_tensors(x, dw_weight, dw_bias, pw_weight, pw_bias):
            return _kernel_path.run_folded(
                x,
                dw_weight,
                dw_bias,
                pw_weight,
                pw_bias,
                self.stride,
                self.dilation,
                checked_pads(*geometry, *x.shape[-2:]),
                self.activation,
                self.pointwise_activation,
                self._cache,
            )
        check_input(x, dw_weight, *geometry, batch_statistics=False)
        x = pad_map(x, self.pre_pad, self.stride, self.dilation)
        h = F.conv2d(F.pad(x, self.padding), dw_weight, dw_bias, self.stride, 0, self.dilation, dw_weight.shape[0])
        y = F.conv2d(apply_activation(self.activation, h), pw_weight, pw_bias)
        return apply_activation(self.pointwise_activation, y)

    def train(self, mode: bool = True) -> FrozenSeparable:
        """Raises ``RuntimeError`` for ``mode=True``."""
        if mode:
            raise RuntimeError(HOW_TO_TRAIN)
        return super().train(mode)

    # Constants change in three ways, and each gives a new cache: what is packed from them need look for nothing else.

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._cache = _kernel_path.PackedCache()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenSeparable:
        super()._apply(fn, recurse)
        self._cache = _kernel_path.PackedCache()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, torch.Tensor):
            self._cache = _kernel_path.PackedCache()

    @property
    def constants(self) -> object:
        """The same object as long as the constants are the same."""
        return self._cache

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = _kernel_path.PackedCache()

    def extra_repr(self) -> str:
        in_channels, out_channels = self.dw_weight.shape[0], self.pw_weight.shape[0]
        pads = f"padding={tuple(self.padding)}" if self.pre_pad != "same" else "padding='same'"
        if self.pre_pad != "same" and any(self.pre_pad):
            pads = f"padding={tuple(self.padding + self.pre_pad)}"
        return (
            f"{in_channels}, {out_channels}, stride={self.stride}, {pads}, dilation={self.dilation}, "
            f"activation={self.activation!r}, pointwise_activation={self.pointwise_activation!r}"
        )
