# SPDX-License-Identifier: BSD-3-Clause
"""depthwise 3x3 -> BN -> activation -> pointwise 1x1 (-> BN -> activation), over real modules.

:class:`SeparableConv` is what a block, a fused site and the functional form share. It owns no parameter: the five
modules come in at every call, and it decides whether the kernels may run or the modules themselves must.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from . import _kernel_path
from ._activations import ACTIVATION_CODES, apply_activation, check_activation
from ._checks import check_input
from ._padding import NO_PADS, Pads, pad_map


class SeparableConv:
    """The fused operation of one site.

    Args:
        activation, pointwise_activation: what follows each convolution and its BN.
        pre_pad: zeros put around the map before the depthwise convolution adds its own; ``"same"`` follows
            TensorFlow and needs a depthwise convolution with ``padding=0``.
    """

    def __init__(
        self,
        activation: str = "relu",
        pointwise_activation: str = "none",
        pre_pad: Pads | Literal["same"] = NO_PADS,
    ) -> None:
        self.activation = check_activation(activation)
        self.pointwise_activation = check_activation(pointwise_activation, "pointwise_activation")
        self.pre_pad = pre_pad
        #: The class of a depthwise convolution that has a forward of its own, if that only pads the map: then
        #: ``pre_pad`` tells all the zeros, whatever ``padding`` of the convolution says.
        self.self_padding_class: type[nn.Conv2d] | None = None
        #: ``forward`` of the BN classes that are batch normalization and nothing else: with fixed statistics, and
        #: with those of the batch, where ``nn.BatchNorm2d`` also tells how the running statistics follow.
        self.norm_forwards = frozenset({nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward})
        self.training_norm_forwards = self.norm_forwards
        self.activation_code = ACTIVATION_CODES[activation]
        self.pointwise_activation_code = ACTIVATION_CODES[pointwise_activation]
        self.cache = _kernel_path.PackedCache()

    def __call__(
        self, x: torch.Tensor, dw: nn.Conv2d, bn1: _BatchNorm | None, pw: nn.Conv2d, bn2: _BatchNorm | None
    ) -> torch.Tensor:
        """``x``: ``Tensor[N, C, H, W]`` or ``Tensor[C, H, W]``; returns the same rank."""
        operands = _kernel_path.covered_tensors(self, x, dw, bn1, pw, bn2)
        if operands is not None:
            return _kernel_path.run(self, x, operands, (dw, bn1, pw, bn2))
        # A parametrized weight is computed at every look, and spectral_norm counts the looks: torch checks for itself.
        if not is_parametrized(dw, "weight"):
            check_input(
                x,
                dw.weight,
                self.pre_pad,
                _kernel_path.own_pads(self, dw),
                dw.stride[0],
                dw.dilation[0],
                any(bn is not None and _kernel_path.uses_batch_statistics(bn) for bn in (bn1, bn2)),
            )
        return self.composite(x, dw, bn1, pw, bn2)

    def composite(
        self, x: torch.Tensor, dw: nn.Conv2d, bn1: _BatchNorm | None, pw: nn.Conv2d, bn2: _BatchNorm | None
    ) -> torch.Tensor:
        """The same thing through the modules themselves: their hooks fire, their buffers move, autograd is theirs."""
        if isinstance(x, torch.Tensor) and x.dim() == 3:  # not a torch.fx.Proxy, which has no rank
            return self.composite(x.unsqueeze(0), dw, bn1, pw, bn2).squeeze(0)
        h = dw(pad_map(x, self.pre_pad, dw.stride[0], dw.dilation[0]))
        if bn1 is not None:
            h = bn1(h)
        y = pw(apply_activation(self.activation, h))
        if bn2 is not None:
            y = bn2(y)
        return apply_activation(self.pointwise_activation, y)

    def __repr__(self) -> str:
        pads = "" if self.pre_pad == NO_PADS else f", pre_pad={self.pre_pad}"
        return f"SeparableConv({self.activation}, {self.pointwise_activation}{pads})"

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, cache=_kernel_path.PackedCache())
