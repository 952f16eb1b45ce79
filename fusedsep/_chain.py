# SPDX-License-Identifier: BSD-3-Clause
"""Consecutive layers of a frozen model as one call: first convolution, sites, mean and classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import _C, _compat, _kernel_path, _ops
from ._activations import ACTIVATION_CODES, apply_activation
from ._checks import checked_pads
from ._fold import scale_and_shift
from ._frozen import FrozenSeparable
from ._ops import ChainLayer
from ._padding import NO_PADS, convolution_pads, output_size


class FirstConvolution:
    """A 3x3 convolution of few channels, its BN and its activation: ``activation(bn(conv(x)))``.

    Args:
        conv: not grouped, with one stride (1 or 2) and one dilation for both directions, padded with zeros.
        bn: in eval mode with running statistics, or ``None``.
        activation: its name.
        modules: all that it stands for, as they are called.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None, activation: str, modules: list[nn.Module]) -> None:
        self.conv, self.bn, self.activation, self.modules = conv, bn, activation, modules

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def tensors(self) -> list[torch.Tensor | None]:
        return [*_kernel_path.weight_and_bias(self.conv), *_kernel_path.norm_tensors(self.bn)]

    def pack(self, nchw: bool) -> torch.Tensor:
        scale, shift = scale_and_shift(self.conv, self.bn)
        out_channels, channels = self.conv.weight.shape[:2]
        weight = self.conv.weight if nchw else self.conv.weight.permute(0, 2, 3, 1)
        patches = weight.reshape(out_channels, 9 * channels)  # in the order of csrc/kernels/separable.h
        return _pack_product(patches, scale, shift)

    def layer(self, height: int, width: int, nchw: bool) -> tuple[ChainLayer, int, int]:
        stride, dilation = self.conv.stride[0], self.conv.dilation[0]
        pads = checked_pads(NO_PADS, convolution_pads(self.conv), stride, dilation, height, width)
        rows = _ops.PATCHES_OF_NCHW if nchw else _ops.PATCHES
        activation = ACTIVATION_CODES[self.activation]
        layer = ChainLayer(rows, self.out_channels, stride, dilation, *pads, 0, activation)
        return layer, *_sizes(layer, height, width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return apply_activation(self.activation, x if self.bn is None else self.bn(x))


class Site:
    """A :class:`FrozenSeparable` in a chain; ``modules`` has it and what hands its input on."""

    def __init__(self, frozen: FrozenSeparable, modules: list[nn.Module]) -> None:
        self.frozen, self.modules = frozen, modules

    @property
    def out_channels(self) -> int:
        return self.frozen.pw_weight.shape[0]

    def tensors(self) -> list[torch.Tensor | None]:
        return [*self.frozen._buffers.values()]  # several times as fast as nn.Module.__getattr__

    def pack(self, nchw: bool) -> torch.Tensor:
        return _kernel_path.pack_folded(*self.tensors(), channels_last=True)

    def layer(self, height: int, width: int, nchw: bool) -> tuple[ChainLayer, int, int]:
        frozen = self.frozen
        pads = checked_pads(frozen.pre_pad, frozen.padding, frozen.stride, frozen.dilation, height, width)
        activations = ACTIVATION_CODES[frozen.activation], ACTIVATION_CODES[frozen.pointwise_activation]
        layer = ChainLayer(_ops.DEPTHWISE, self.out_channels, frozen.stride, frozen.dilation, *pads, *activations)
        return layer, *_sizes(layer, height, width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x)


class Classifier:
    """``F.linear(x.mean((2, 3)), weight, bias)``, as ``Tensor[N, classes]`` or as a map of one pixel.

    Args:
        linear: an ``nn.Linear``, or a 1x1 convolution.
        as_map: the output is ``Tensor[N, classes, 1, 1]``.
        modules: all that it stands for.
    """

    def __init__(self, linear: nn.Linear | nn.Conv2d, as_map: bool, modules: list[nn.Module]) -> None:
        self.linear, self.as_map, self.modules = linear, as_map, modules

    def tensors(self) -> list[torch.Tensor | None]:
        return [*_kernel_path.weight_and_bias(self.linear)]

    def pack(self, nchw: bool) -> torch.Tensor:
        bias = None if self.linear.bias is None else self.linear.bias.double()
        return _pack_product(self.linear.weight.flatten(1), None, bias)

    def layer(self, height: int, width: int, nchw: bool) -> tuple[ChainLayer, int, int]:
        return ChainLayer(_ops.MEANS, self.linear.weight.shape[0], 1, 1, *NO_PADS, 0, 0), 1, 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Without a batch dimension a 1x1 convolution works, and a linear layer behind a pool or a mean does not.
        y = F.linear(x.mean((-2, -1) if self.as_map else (2, 3)), self.linear.weight.flatten(1), self.linear.bias)
        return y[..., None, None] if self.as_map else y


Element = FirstConvolution | Site | Classifier


class LayerChain:
    """Layers that each read what the one before gives, and nobody else does; eval only.

    Called with a batch of float maps on the CPU, several are one call of the operator; anything else goes through the
    layers one by one, with the same result up to rounding.
    """

    def __init__(self, name: str, elements: list[Element]) -> None:
        self.__name__ = name
        self.elements = elements
        self.modules = [module for element in elements for module in element.modules]
        self._sites = [element for element in elements if isinstance(element, Site)]
        self._ends = [element for element in elements if not isinstance(element, Site)]
        first = elements[0]
        self._channels = first.conv.in_channels if isinstance(first, FirstConvolution) else len(first.tensors()[0])
        self._packed = _kernel_path.PackedCache()
        self._layers: dict[tuple[int, int, bool], list[int] | None] = {}

    def numbers(self) -> list[nn.Module]:
        """Modules that look after their own hooks: none, as none of them is called."""
        return []

    def norms(self) -> list[nn.Module]:
        """BNs that may be in another mode than the owner: none."""
        return []

    def read(self) -> list[nn.Module]:
        """Modules that this depends on to be as they were found: all."""
        return self.modules

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        several = len(self.elements) > 1
        if several and x.is_cpu and _kernel_path.covers_map(x) and x.dim() == 4 and not torch.compiler.is_compiling():
            y = self._run(x)
            if y is not None:
                return y
        for element in self.elements:
            x = element(x)
        return x

    def _run(self, x: torch.Tensor) -> torch.Tensor | None:
        if x.shape[1] != self._channels or (
            torch.is_grad_enabled() and _kernel_path.wants_gradient(x, self._tensors())
        ):
            return None
        x, channels_last, _ = _kernel_path.dense(x)
        nchw = not channels_last and isinstance(self.elements[0], FirstConvolution)
        layers = self._layers_for(x.shape[2], x.shape[3], nchw)
        packed = None if layers is None else self._packed_for(x.dtype, nchw)
        if packed is None:
            return None
        if not nchw:
            x = x.contiguous(memory_format=torch.channels_last)
        with _compat.below_autograd():
            y = _ops.chain(x, packed, layers)
        if y.dim() == 4:
            return y if channels_last else y.contiguous()
        return y[:, :, None, None] if self.elements[-1].as_map else y

    def _tensors(self) -> list[torch.Tensor | None]:
        return [tensor for element in self.elements for tensor in element.tensors()]

    def _layers_for(self, height: int, width: int, nchw: bool) -> list[int] | None:
        """The numbers of the operator; ``None`` for a map that is too small: the layers know more to say about it."""
        key = height, width, nchw
        if key in (known := self._layers):
            return known[key]
        numbers: list[int] | None = []
        try:
            for element in self.elements:
                layer, height, width = element.layer(height, width, nchw)
                numbers += layer
        except ValueError:
            numbers = None
        # A new dictionary in the place of a full one: other threads may be reading it.
        self._layers = {**(known if len(known) < _SIZES_KEPT else {}), key: numbers}
        return numbers

    def _packed_for(self, dtype: torch.dtype, nchw: bool) -> torch.Tensor | None:
        """All packed weights; ``None`` where the kernels cannot read the tensors."""
        state = [site.frozen.constants for site in self._sites]
        own = [tensor for end in self._ends for tensor in end.tensors() if tensor is not None]  # the user's modules'
        for tensor in own:
            state.append((tensor.data_ptr(), _bytes_of(tensor) if tensor.is_inference() else tensor._version))
        key = _C.active_isa(), dtype, nchw
        packed = self._packed.lookup(key, state)
        if packed is None:
            if not _kernel_path.are_readable(dtype, self._tensors()):
                return None
            with torch.no_grad():
                packed = torch.cat([element.pack(nchw) for element in self.elements])
            self._packed.store(key, state, packed, alive=[tensor.detach() for tensor in own])
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return {"__name__": self.__name__, "elements": self.elements}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["__name__"], state["elements"])


#: Sizes of images whose layers are remembered.
_SIZES_KEPT = 64


def _bytes_of(tensor: torch.Tensor) -> int:
    """A hash of all bytes: inference tensors do not count their changes."""
    tensor = tensor.contiguous()
    return _C.fingerprint([(tensor.data_ptr(), tensor.nbytes)])


def _pack_product(weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """A product alone: ``weight`` is ``[N, C]``."""
    no_depthwise = weight.new_zeros(weight.shape[1], 1, 3, 3)
    return _ops.pack(no_depthwise, None, None, weight.contiguous()[:, :, None, None], scale, bias, True)


def _sizes(layer: ChainLayer, height: int, width: int) -> tuple[int, int]:
    return (
        output_size(height, layer.pad_top, layer.pad_bottom, layer.stride, layer.dilation),
        output_size(width, layer.pad_left, layer.pad_right, layer.stride, layer.dilation),
    )
