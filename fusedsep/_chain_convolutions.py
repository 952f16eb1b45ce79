# SPDX-License-Identifier: BSD-3-Clause
"""Elements of a chain (see :mod:`fusedsep._chain_elements`) that are convolutions, or a site of two."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import _kernel_path, _ops
from ._activations import ACTIVATION_CODES, LAYER_ACTIVATION_CODES, apply_activation
from ._chain_layers import LayerScale, Place, pack_product, pixels_layer, places_of, places_of_norm
from ._checks import checked_pads
from ._fold import channels_of_norm, scale_and_shift, scale_and_shift_tensors
from ._ops import ChainLayer
from ._padding import NO_PADS, Pads, pad_map, resolve_padding, sum_of_pads

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

    from ._frozen import FrozenSeparable
    from ._separable import SeparableConv

#: Channels of a map that a whole convolution reads as it lies in NCHW.
MOST_IMAGE_CHANNELS = 8


class Convolution:
    """A convolution, its BN and its activation: ``activation(bn(conv(pad(x))))``.

    Args:
        conv: padded with zeros, with one stride (1 or 2) and one dilation for both directions, and one of: a 1x1
            convolution without padding; one of 3x3 taps; a depthwise one of an odd kernel, 3x3 to 11x11.
        bn: in eval mode with running statistics, or ``None``.
        activation: its name.
        modules: all that it stands for, as they are called.
        pads: zeros that are put around the map of the second kind besides its own.
        own_pads: those that ``conv`` puts around its map.
        carried: ``bn`` applies the activation itself.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.Module | None,
        activation: str,
        modules: list[nn.Module],
        pads: Pads | Literal["same"],
        own_pads: Pads | Literal["same"],
        carried: bool,
    ) -> None:
        self.conv, self.bn, self.activation, self.modules = conv, bn, activation, modules
        self.pads, self.own_pads, self.carried = pads, own_pads, carried
        self.is_pointwise = tuple(conv.kernel_size) == (1, 1)
        self.is_depthwise = not self.is_pointwise and conv.groups == conv.in_channels > 1
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self._filters = self._normalized = slice(None)  # of conv, of bn

    def with_filters(self, in_channels: int, filters: range) -> Convolution:
        """The same with some filters of ``conv``: those of a group, or one for each channel of a depthwise one."""
        other = copy.copy(self)
        other.in_channels, other.out_channels = in_channels, len(filters)
        other._filters = other._normalized = slice(filters.start, filters.stop, filters.step)
        return other

    def with_norm(self, bn: nn.Module, begin: int, activation: str, carried: bool) -> Convolution:
        """The same with channels of ``bn`` from ``begin`` on, and an activation, behind it."""
        other = copy.copy(self)
        other.bn, other.activation, other.carried = bn, activation, carried
        other._normalized = slice(begin, begin + self.out_channels)
        return other

    @property
    def reads_images(self) -> bool:
        """Whether its map may be NCHW, as the first one of a chain: images, which have few channels."""
        return not self.is_pointwise and self.conv.groups == 1 and self.in_channels <= MOST_IMAGE_CHANNELS

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The modules that it computes."""
        return [self.conv]

    def places(self) -> list[Place]:
        return [*places_of(self.conv), *places_of_norm(self.bn)]

    def pack(self, nchw: bool) -> torch.Tensor:
        weight, scale, shift = self._folded()
        if self.is_depthwise:
            return _ops.pack_depthwise(weight.contiguous(), scale, shift)
        if not self.is_pointwise and not nchw:
            weight = weight.permute(0, 2, 3, 1)
        return pack_product(weight.reshape(len(weight), -1), scale, shift)  # in the order of csrc/kernels/separable.h

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        activation = LAYER_ACTIVATION_CODES[self.activation]
        stride, dilation = self.conv.stride[0], self.conv.dilation[0]
        if self.is_pointwise:
            if min(height, width) < 1:
                raise ValueError("x must have a pixel")
            layer = pixels_layer(self.out_channels, activation)._replace(stride=stride)
            return [layer], -(-height // stride), -(-width // stride)
        if self.is_depthwise:
            kernel = self.conv.kernel_size[0]
            pads = resolve_padding(self.own_pads, height, width, stride, dilation, kernel)
            layer = ChainLayer(
                _ops.DEPTHWISE_MAP, self.out_channels, stride, dilation, *pads, activation, 0, kernel=kernel
            )
            sizes = layer.sizes(height, width)
            if min(height, width, *sizes) < 1:
                raise ValueError(f"x must hold a {kernel}x{kernel} kernel of dilation {dilation}")
            return [layer], *sizes
        pads = checked_pads(sum_of_pads(self.pads, self.own_pads), NO_PADS, stride, dilation, height, width)
        rows = _ops.PATCHES_OF_NCHW if nchw else _ops.PATCHES
        layer = ChainLayer(rows, self.out_channels, stride, dilation, *pads, 0, activation)
        return [layer], *layer.sizes(height, width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self._convolve(x)
        bn = self._norm()
        if bn is not self.bn:
            x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        elif bn is not None:
            x = bn(x)
            return x if self.carried else apply_activation(self.activation, x)
        return apply_activation(self.activation, x)

    def _norm(self) -> Any:
        """What of ``bn`` follows, if there is one."""
        whole = self.bn is None or self.bn.num_features == self.out_channels
        return self.bn if whole else channels_of_norm(self.bn, self._normalized)

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Weight, and scale and shift of each output channel in float64."""
        bias = None if self.conv.bias is None else self.conv.bias[self._filters].contiguous()
        return self.conv.weight[self._filters], *scale_and_shift_tensors(bias, self._norm())

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        x = pad_map(x, self.pads, conv.stride[0], conv.dilation[0])
        if self.in_channels == conv.in_channels:  # its own forward, which may pad
            return conv(x)[..., self._filters, :, :]
        bias = None if conv.bias is None else conv.bias[self._filters]
        return F.conv2d(x, conv.weight[self._filters], bias, conv.stride, conv.padding, conv.dilation)


class Branch(NamedTuple):
    """``sign * scales * bn(conv(x))``; without a convolution or a BN ``None`` stands in its place."""

    conv: nn.Conv2d | None
    bn: nn.Module | None
    scales: tuple[LayerScale, ...] = ()
    sign: Literal[1, -1] = 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.conv is None else self.conv(x)
        x = x if self.bn is None else self.bn(x)
        for scale in self.scales:
            x = x * scale.factors.view(-1, 1, 1)
        return x if self.sign > 0 else -x


class SumOfBranches(Convolution):
    """``activation(bn(sum(branch(x) for branch in branches)))`` as one convolution.

    Args:
        branches: of one stride, whose convolutions have odd kernels and keep the size of a map at stride 1.
        conv: the one of them with the largest kernel.

    Source: X. Ding et al., "RepVGG", 2021, section 3.3.
    """

    def __init__(self, branches: list[Branch], conv: nn.Conv2d, *args: Any) -> None:
        super().__init__(conv, *args)
        self.branches = branches

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return [branch.conv for branch in self.branches if branch.conv is not None]

    def places(self) -> list[Place]:
        convs = [place for conv in self.convolutions for place in places_of(conv)]
        norms = [place for branch in self.branches for place in places_of_norm(branch.bn)]
        scales = [scale.place for branch in self.branches for scale in branch.scales]
        return [*convs, *norms, *scales, *places_of_norm(self.bn)]

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        whole = self.conv.weight
        weight, bias = torch.zeros_like(whole, dtype=torch.double), whole.new_zeros(len(whole), dtype=torch.double)
        for conv, bn, scales, sign in self.branches:
            own = _identity_like(whole) if conv is None else conv.weight.double()
            scale, shift = scale_and_shift_tensors(None if conv is None else conv.bias, bn)
            factors = math.prod((each.factors.double() for each in scales), start=torch.full_like(bias, sign))
            around = (whole.shape[-1] - own.shape[-1]) // 2
            inner = weight[..., around : around + own.shape[-1], around : around + own.shape[-1]]
            inner += own * (factors if scale is None else factors * scale).view(-1, 1, 1, 1)
            bias += 0 if shift is None else factors * shift
        weight = weight[self._filters]
        scale, shift = scale_and_shift_tensors(bias[self._filters].contiguous(), self._norm())
        return (weight if scale is None else weight * scale.view(-1, 1, 1, 1)).to(whole.dtype), None, shift

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        return sum(branch(x) for branch in self.branches)[..., self._filters, :, :]


class Site:
    """A site of a fused model, with the modules that it runs.

    Args:
        separable: what it computes.
        run: a call of it by itself.
        dw, bn1, pw, bn2: the modules whose numbers it reads.
        modules: all that it stands for, and what hands its input on.
    """

    def __init__(
        self,
        separable: SeparableConv,
        run: Callable[[torch.Tensor], torch.Tensor],
        parts: tuple[nn.Conv2d, _BatchNorm | None, nn.Conv2d, _BatchNorm | None],
        modules: list[nn.Module],
    ) -> None:
        self.separable, self.run, self.modules = separable, run, modules
        self.dw, self.bn1, self.pw, self.bn2 = parts

    @property
    def in_channels(self) -> int:
        return self.dw.in_channels

    @property
    def out_channels(self) -> int:
        return self.pw.out_channels

    def places(self) -> list[Place]:
        return [
            *places_of(self.dw),
            *places_of_norm(self.bn1),
            *places_of(self.pw),
            *places_of_norm(self.bn2),
        ]

    def pack(self, nchw: bool) -> torch.Tensor:
        dw_scale, dw_shift = scale_and_shift(self.dw, self.bn1)
        pw_scale, pw_shift = scale_and_shift(self.pw, self.bn2)
        dw_weight, pw_weight = self.dw.weight.contiguous(), self.pw.weight.contiguous()
        return _ops.pack(dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, True)

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        separable, stride, dilation = self.separable, self.dw.stride[0], self.dw.dilation[0]
        own = _kernel_path.own_pads(separable, self.dw)
        pads = checked_pads(separable.pre_pad, own, stride, dilation, height, width)
        activations = separable.activation_code, separable.pointwise_activation_code
        layer = ChainLayer(_ops.DEPTHWISE, self.out_channels, stride, dilation, *pads, *activations)
        return [layer], *layer.sizes(height, width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


class FrozenSite:
    """A :class:`FrozenSeparable` in a chain; ``modules`` has it and what hands its input on."""

    def __init__(self, frozen: FrozenSeparable, modules: list[nn.Module]) -> None:
        self.frozen, self.modules = frozen, modules

    @property
    def in_channels(self) -> int:
        return self.frozen.dw_weight.shape[0]

    @property
    def out_channels(self) -> int:
        return self.frozen.pw_weight.shape[0]

    def places(self) -> list[Place]:
        return [(vars(self.frozen), "_buffers", name) for name in self.frozen._buffers]

    def pack(self, nchw: bool) -> torch.Tensor:
        return _kernel_path.pack_folded(*self.frozen._buffers.values(), channels_last=True)

    def layers(self, height: int, width: int, nchw: bool) -> tuple[list[ChainLayer], int, int]:
        frozen = self.frozen
        pads = checked_pads(frozen.pre_pad, frozen.padding, frozen.stride, frozen.dilation, height, width)
        activations = ACTIVATION_CODES[frozen.activation], ACTIVATION_CODES[frozen.pointwise_activation]
        layer = ChainLayer(_ops.DEPTHWISE, self.out_channels, frozen.stride, frozen.dilation, *pads, *activations)
        return [layer], *layer.sizes(height, width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x)


def _identity_like(weight: torch.Tensor) -> torch.Tensor:
    """The 1x1 convolution that hands its map on, for as many channels and groups as ``weight``."""
    out_channels, depth = weight.shape[:2]
    own = torch.zeros(out_channels, depth, 1, 1, dtype=torch.double, device=weight.device)
    own[torch.arange(out_channels), torch.arange(out_channels) % depth] = 1
    return own
