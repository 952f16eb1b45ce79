# SPDX-License-Identifier: BSD-3-Clause
"""depthwise 3x3 -> BN -> activation -> pointwise 1x1 (-> BN -> activation), over real modules.

:class:`SeparableConv` is what a block, a fused site and the functional form share. It owns no parameter: the five
modules come in at every call, and it decides whether the kernels may run or the modules themselves must.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from . import _kernel_path
from ._activations import ACTIVATION_CODES, apply_activation, check_activation
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
        #: ``forward`` of the BN classes that are batch normalization and nothing else.
        self.norm_forwards = frozenset({nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward})
        self.activation_code = ACTIVATION_CODES[activation]
        self.pointwise_activation_code = ACTIVATION_CODES[pointwise_activation]
        self.cache = _kernel_path.PackedCache()

    def __call__(
        self, x: torch.Tensor, dw: nn.Conv2d, bn1: _BatchNorm | None, pw: nn.Conv2d, bn2: _BatchNorm | None
    ) -> torch.Tensor:
        """``x``: ``Tensor[N, C, H, W]`` or ``Tensor[C, H, W]``; returns the same rank."""
        tensors = _kernel_path.covered_tensors(self, x, dw, bn1, pw, bn2)
        if tensors is not None:
            return _kernel_path.run(self, x, tensors, (dw, bn1, pw, bn2))
        # A parametrized weight is computed at every look, and spectral_norm counts the looks: torch checks for itself.
        if not is_parametrized(dw, "weight"):
            batch_statistics = any(bn is not None and (bn.training or bn.running_mean is None) for bn in (bn1, bn2))
            _kernel_path.check_input(
                x,
                dw.weight,
                self.pre_pad,
                _kernel_path.own_pads(self, dw),
                dw.stride[0],
                dw.dilation[0],
                batch_statistics,
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

    def composite_of_tensors(self, modules: _kernel_path.Modules, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
        """:meth:`composite` with fixed statistics, of tensors that stand in for those of ``modules``.

        ``tensors``: weight and bias of either convolution, then weight, bias, running mean and variance of each BN.
        """
        dw, bn1, _, bn2 = modules
        dw_weight, dw_bias, pw_weight, pw_bias, *norms = tensors
        if x.dim() == 3:
            return self.composite_of_tensors(modules, x.unsqueeze(0), *tensors).squeeze(0)
        stride, dilation = dw.stride[0], dw.dilation[0]
        x = pad_map(x, self.pre_pad, stride, dilation)
        padding = 0 if type(dw) is self.self_padding_class else dw.padding
        h = F.conv2d(x, dw_weight, dw_bias, stride, padding, dilation, dw.groups)
        if bn1 is not None:
            gamma, beta, mean, variance = norms[:4]
            h = F.batch_norm(h, mean, variance, gamma, beta, False, 0.0, bn1.eps)
        y = F.conv2d(apply_activation(self.activation, h), pw_weight, pw_bias)
        if bn2 is not None:
            gamma, beta, mean, variance = norms[-4:]
            y = F.batch_norm(y, mean, variance, gamma, beta, False, 0.0, bn2.eps)
        return apply_activation(self.pointwise_activation, y)

    def __repr__(self) -> str:
        pads = "" if self.pre_pad == NO_PADS else f", pre_pad={self.pre_pad}"
        return f"SeparableConv({self.activation}, {self.pointwise_activation}{pads})"

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, cache=_kernel_path.PackedCache())
