# SPDX-License-Identifier: BSD-3-Clause
"""Which zeros a convolution with a forward of its own puts around its map, found by running it.

TensorFlow ports compute SAME padding in the forward of a ``nn.Conv2d`` subclass (timm's ``Conv2dSame``,
EfficientNet-PyTorch's ``Conv2dDynamicSamePadding``). Its Python asks for sizes and cannot be traced, so a copy of the
module is tried on many maps. All numbers there have so few bits that every sum is exact in float32: equality decides.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._compat import has_hooks
from .._padding import Pads, output_size, resolve_padding
from .side_effects import attributes_of, first_line, restore_attributes

#: Height and width of the maps: odd and even, square and not, smaller than the kernel and larger.
_SIZES = ((1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3), (4, 4), (5, 6), (6, 5), (7, 10), (9, 7), (12, 17), (24, 19))


class PaddingUnknown(Exception):
    """The reason why a forward is not known to be a convolution of a zero-padded map."""


def read_padding(conv: nn.Conv2d, gradients: bool = True) -> Pads | Literal["same"]:
    """All the zeros that the forward of ``conv`` puts around its map.

    ``conv`` has a square kernel, one stride and one dilation for both directions.

    In the mode that ``conv`` is in, that forward must be equivalent to::

        F.conv2d(F.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    with the same ``pads`` for every map, or with those of TensorFlow's SAME; ``gradients`` asks for equal ones too.

    Raises:
        PaddingUnknown: it is anything else, or cannot be tried.
    """
    try:
        # Nothing of the caller's modes or random numbers takes part.
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            return _Trial(conv).padding(gradients)
    except PaddingUnknown:
        raise
    except Exception as error:  # whatever the copying or the forward raises
        raise PaddingUnknown(f"cannot be tried: {first_line(error)}") from error


class _Trial:
    """A copy of ``conv`` with other numbers, to be run."""

    def __init__(self, conv: nn.Conv2d) -> None:
        if any(tensor.is_meta for tensor in (*conv.parameters(), *conv.buffers())):
            raise PaddingUnknown("cannot be tried on the meta device")
        if any(has_hooks(module) for module in conv.modules() if module is not conv):
            raise PaddingUnknown("has hooks inside")
        self._generator = torch.Generator().manual_seed(0)
        # No sum of the forward has more than 24 bits. Weights of fewer than 10 would not show that they were rounded.
        terms = conv.kernel_size[0] * conv.kernel_size[1] * conv.in_channels // conv.groups
        bits = 24 - math.ceil(math.log2(terms))
        self._bits_of_maps = min(7, bits - 10)
        self._bits_of_weights = min(11, bits - self._bits_of_maps)
        if self._bits_of_maps < 4:
            raise PaddingUnknown("has too many taps to be tried in exact numbers")
        self._conv = copy.deepcopy(conv).to("cpu", torch.float32).requires_grad_()
        self._numbers = [*self._conv.parameters(), *self._conv.buffers()]
        with torch.no_grad():
            for tensor in self._numbers:
                if tensor.is_floating_point():
                    tensor.copy_(self._random(tensor.shape, bits=self._bits_of_weights))
        self._stride: int = conv.stride[0]
        self._dilation: int = conv.dilation[0]
        self._kernel: int = conv.kernel_size[0]

    def padding(self, gradients: bool) -> Pads | Literal["same"]:
        """What :func:`read_padding` says."""
        attributes = {module: attributes_of(module) for module in self._conv.modules()}
        numbers = [tensor.clone() for tensor in self._numbers]
        random_state = torch.get_rng_state()
        with torch.no_grad():
            candidates = [*self._constant_pads(), "same"]
            results = [(x, self._run_if_possible(x)) for x in self._maps()]
            rule = next((rule for rule in candidates if all(self._explains(rule, *result) for result in results)), None)
        if not torch.equal(random_state, torch.get_rng_state()):
            raise PaddingUnknown("draws random numbers")
        if any(restore_attributes(*item) for item in attributes.items()):
            raise PaddingUnknown("writes attributes")
        if not all(map(torch.equal, numbers, self._numbers)):
            raise PaddingUnknown("writes parameters or buffers")
        if rule is None or (gradients and not self._explains_gradients(rule)):
            raise PaddingUnknown("is not a convolution of the map with zeros around it")
        return rule

    def _random(self, shape: tuple[int, ...], bits: int, exponent: int = 0) -> torch.Tensor:
        """Numbers of ``bits`` bits and a sign, below ``8 * 2**exponent``."""
        integers = torch.randint(1 - 2**bits, 2**bits, shape, generator=self._generator, device="cpu")
        return integers.float() * 2.0 ** (exponent + 3 - bits)

    def _map(self, height: int, width: int, exponent: int = 0) -> torch.Tensor:
        images = 2 if height * width < 50 else 1  # one is enough where it takes time
        return self._random((images, self._conv.in_channels, height, width), bits=self._bits_of_maps, exponent=exponent)

    def _maps(self) -> Iterator[torch.Tensor]:
        """A map of each size; small and large values, since a forward may clamp them."""
        grow = (self._kernel - 1) * self._dilation - 2  # beyond 3x3 taps side by side
        sizes = dict.fromkeys([*_SIZES, *((height + grow, width + grow) for height, width in _SIZES)])
        for index, (height, width) in enumerate(sizes):
            yield self._map(height, width, exponent=index % 8 - 3)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        return type(self._conv).forward(self._conv, x)

    def _run_if_possible(self, x: torch.Tensor) -> torch.Tensor | None:
        """``None`` where the forward raises, as it must if the kernel does not fit."""
        given = x.clone()
        try:
            y = self._run(given)
        except Exception:  # whatever it is: a rule has to explain why
            return None
        if not torch.equal(given, x):
            raise PaddingUnknown("changes its input in place")
        return y

    def _convolve(self, x: torch.Tensor, pads: Pads) -> torch.Tensor:
        conv = self._conv
        return F.conv2d(F.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def _constant_pads(self) -> Iterator[Pads]:
        """The pads of at most one kernel that explain one map; several where the stride cuts a row or column off."""
        stride, extent, conv = self._stride, (self._kernel - 1) * self._dilation + 1, self._conv
        x = self._map(2 * extent + 1, 2 * extent + 2)
        y = self._run(x)
        height, width = x.shape[-2:]
        rows, columns = y.shape[-2:]
        bias = None if conv.bias is None else conv.bias[:1]
        everywhere = F.conv2d(x[:, : conv.weight.shape[1]], conv.weight[:1], bias, 1, extent, conv.dilation)
        for top, left in itertools.product(range(extent + 1), repeat=2):
            window = everywhere[:, :, extent - top :: stride, extent - left :: stride][:, :, :rows, :columns]
            if torch.equal(window, y[:, :1]):
                bottom = (rows - 1) * stride + extent - height - top
                right = (columns - 1) * stride + extent - width - left
                for more_below, more_right in itertools.product(range(stride), repeat=2):
                    pads = Pads(left, right + more_right, top, bottom + more_below)
                    if min(pads) >= 0:
                        yield pads

    def _explains(self, padding: Pads | Literal["same"], x: torch.Tensor, y: torch.Tensor | None) -> bool:
        height, width = x.shape[-2:]
        geometry = self._stride, self._dilation, self._kernel
        pads = resolve_padding(padding, height, width, *geometry)
        rows = output_size(height, pads.top, pads.bottom, *geometry)
        columns = output_size(width, pads.left, pads.right, *geometry)
        if min(rows, columns) < 1:
            return y is None
        return y is not None and torch.equal(y, self._convolve(x, pads))

    def _explains_gradients(self, padding: Pads | Literal["same"]) -> bool:
        reach = (self._kernel - 1) * self._dilation
        x = self._map(reach + 7, reach + 8)
        pads = resolve_padding(padding, *x.shape[-2:], self._stride, self._dilation, self._kernel)
        expected = self._gradients(lambda x: self._convolve(x, pads), x)
        return all(map(torch.equal, self._gradients(self._run, x), expected))

    def _gradients(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Those of a fixed sum of ``function(x)``, with respect to ``x`` and the parameters."""
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            y = function(x)
            factors = torch.arange(y.numel(), device="cpu").remainder(113).view(y.shape).float()
            return torch.autograd.grad(y, [x, *self._conv.parameters()], factors)
