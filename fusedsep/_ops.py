# SPDX-License-Identifier: BSD-3-Clause
"""The operators of the extension: handles, arguments with names, and their shapes for tracing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import _C, _cuda
from ._padding import output_size

pack = torch.ops.fusedsep.pack.default
pack_modules = torch.ops.fusedsep.pack_modules.default
pack_depthwise = torch.ops.fusedsep.pack_depthwise.default
separable_conv2d = torch.ops.fusedsep.separable_conv2d.default
chain = torch.ops.fusedsep.chain.default
separable_conv2d_training = torch.ops.fusedsep.separable_conv2d_training.default
separable_conv2d_training_backward = torch.ops.fusedsep.separable_conv2d_training_backward.default
pointwise_conv2d_training = torch.ops.fusedsep.pointwise_conv2d_training.default
pointwise_conv2d_training_backward = torch.ops.fusedsep.pointwise_conv2d_training_backward.default
depthwise_conv2d_training = torch.ops.fusedsep.depthwise_conv2d_training.default
depthwise_conv2d_training_backward = torch.ops.fusedsep.depthwise_conv2d_training_backward.default
conv2d_training = torch.ops.fusedsep.conv2d_training.default
conv2d_training_backward = torch.ops.fusedsep.conv2d_training_backward.default
depthwise_statistics = torch.ops.fusedsep.depthwise_statistics.default
separable_products = torch.ops.fusedsep.separable_products.default
normalize = torch.ops.fusedsep.normalize.default
normalize_backward_reduce = torch.ops.fusedsep.normalize_backward_reduce.default
pointwise_backward = torch.ops.fusedsep.pointwise_backward.default
depthwise_backward = torch.ops.fusedsep.depthwise_backward.default

#: Mode of a BN in the training operators.
NO_NORM, FIXED_STATISTICS, BATCH_STATISTICS = 0, 1, 2


#: What a layer of a chain multiplies with its pointwise weights, or what it is without any (csrc/kernels/separable.h).
DEPTHWISE, PATCHES, PATCHES_OF_NCHW, MEANS, PIXELS, DEPTHWISE_MAP = range(6)
SUM, INTERLEAVED, MAX_POOL, UPSAMPLE, NORMALIZED_PIXELS = range(6, 11)


class ChainLayer(NamedTuple):
    """One layer of the chain operator, in the order of its numbers (csrc/bindings/chain_ops.cpp)."""

    rows: int
    out_channels: int
    stride: int
    dilation: int
    pad_left: int
    pad_right: int
    pad_top: int
    pad_bottom: int
    activation: int
    pointwise_activation: int
    residual: int = -1
    kernel: int = 3
    gated: int = -1
    input: int = -1
    input_begin: int = 0
    in_channels: int = 0
    output: int = -1
    output_begin: int = 0
    residual_begin: int = 0
    joined_activation: int = 0
    multiplies: int = 0

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what a window of ``kernel`` pixels gives of a map."""
        return (
            output_size(height, self.pad_top, self.pad_bottom, self.stride, self.dilation, self.kernel),
            output_size(width, self.pad_left, self.pad_right, self.stride, self.dilation, self.kernel),
        )


def text_of(layers: Iterable[ChainLayer]) -> str:
    """As the chain operator reads them."""
    return "\n".join(" ".join(map(str, layer)) for layer in layers)


def layers_of(text: str) -> list[ChainLayer]:
    """What :func:`text_of` was given."""
    return [ChainLayer(*map(int, line.split())) for line in text.splitlines()]


class ConvolutionOperands(NamedTuple):
    """The tensors of the training operators of one convolution besides the map, in their order."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    bn_weight: torch.Tensor | None
    bn_bias: torch.Tensor | None
    bn_mean: torch.Tensor | None
    bn_var: torch.Tensor | None


class PointwiseSettings(NamedTuple):
    """The arguments of those of a pointwise convolution that are no tensors, in their order."""

    bn_mode: int
    bn_eps: float
    activation: int
    channels_last: bool


class ConvolutionSettings(NamedTuple):
    """The same for a 3x3 convolution of few channels; ``channels_last`` is the format of its output."""

    bn_mode: int
    bn_eps: float
    stride: int
    dilation: int
    pad_left: int
    pad_right: int
    pad_top: int
    pad_bottom: int
    activation: int
    channels_last: bool


class DepthwiseSettings(ConvolutionSettings):
    """The same for a depthwise convolution by itself; ``channels_last`` is the format of its input, too."""


class Operands(NamedTuple):
    """The tensors of the training operators of a separable convolution besides the map, in their order."""

    dw_weight: torch.Tensor
    dw_bias: torch.Tensor | None
    bn1_weight: torch.Tensor | None
    bn1_bias: torch.Tensor | None
    bn1_mean: torch.Tensor | None
    bn1_var: torch.Tensor | None
    pw_weight: torch.Tensor
    pw_bias: torch.Tensor | None
    bn2_weight: torch.Tensor | None
    bn2_bias: torch.Tensor | None
    bn2_mean: torch.Tensor | None
    bn2_var: torch.Tensor | None

    def pointwise(self) -> ConvolutionOperands:
        """Those of the pointwise convolution."""
        return ConvolutionOperands(*self[-len(ConvolutionOperands._fields) :])


class Settings(NamedTuple):
    """The arguments of the same that are no tensors, in their order."""

    bn1_mode: int
    bn1_eps: float
    bn2_mode: int
    bn2_eps: float
    stride: int
    dilation: int
    pad_left: int
    pad_right: int
    pad_top: int
    pad_bottom: int
    activation: int
    pointwise_activation: int
    channels_last: bool

    def pointwise(self) -> PointwiseSettings:
        """Those of the pointwise convolution."""
        return PointwiseSettings(self.bn2_mode, self.bn2_eps, self.pointwise_activation, self.channels_last)


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """Of statistics of the batch and normalizations of ``x``."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


# -------------------------------------------------------------------------------------------------- shapes for tracing


@torch.library.register_fake("fusedsep::pack")
def _(dw_weight, dw_scale, dw_bias, pw_weight, pw_scale, pw_bias, channels_last):  # type: ignore[no-untyped-def]
    if dw_weight.device.type == "cuda":
        size = _cuda.packed_size(dw_weight.shape[0], pw_weight.shape[0], dw_weight.element_size())
        return dw_weight.new_empty(size, dtype=torch.float32)
    size = _C.packed_size(
        dw_weight.shape[0], pw_weight.shape[0], channels_last, 4 if dw_weight.dtype == torch.float32 else 8
    )
    return dw_weight.new_empty(size)


@torch.library.register_fake("fusedsep::pack_depthwise")
def _(weight, scale, bias):  # type: ignore[no-untyped-def]
    return weight.new_empty(_C.depthwise_packed_size(weight.shape[0], weight.shape[2], weight.element_size()))


@torch.library.register_fake("fusedsep::pack_modules")
def _(*operands_and_eps):  # type: ignore[no-untyped-def]
    operands = Operands(*operands_and_eps[:12])
    weight = operands.dw_weight
    size = _cuda.packed_size(weight.shape[0], operands.pw_weight.shape[0], weight.element_size())
    return weight.new_empty(size, dtype=torch.float32)


@torch.library.register_fake("fusedsep::separable_conv2d")
def _(x, packed, out_channels, *others):  # type: ignore[no-untyped-def]
    return _map(x, out_channels, *others[:6], others[8])


@torch.library.register_fake("fusedsep::chain")
def _(x, packed, layers, channels_last=True):  # type: ignore[no-untyped-def]
    maps = [x]
    last = 0  # the map that the layer in front writes
    for layer in layers_of(layers):
        x = maps[next((number for number in (layer.gated, layer.input) if number >= 0), last)]
        channels = layer.output_begin + layer.out_channels
        if layer.rows == MEANS:
            x = _dense(x, x.shape[0], channels, 1, 1, True)
        elif layer.rows == UPSAMPLE:
            x = _dense(x, x.shape[0], channels, 2 * x.shape[2], 2 * x.shape[3], True)
        elif layer.rows in (PIXELS, NORMALIZED_PIXELS, SUM, INTERLEAVED):
            height, width = (-(-size // layer.stride) for size in x.shape[2:])
            x = _dense(x, x.shape[0], channels, height, width, True)
        else:
            x = _map(x, channels, *layer[2:8], True, layer.kernel)
        maps.append(x)
        last = len(maps) - 1 if layer.output < 0 else layer.output
        if x.shape[1] > maps[last].shape[1]:
            maps[last] = x
    x = maps[last]
    return x.new_empty(x.shape[:2]) if layer.rows == MEANS else _dense(x, *x.shape, channels_last)


@torch.library.register_fake("fusedsep::separable_conv2d_training")
def _(x, *operands_and_settings):  # type: ignore[no-untyped-def]
    operands, settings = Operands(*operands_and_settings[:12]), Settings(*operands_and_settings[12:])
    in_channels, out_channels = operands.dw_weight.shape[0], operands.pw_weight.shape[0]
    dtype = statistics_dtype(x)
    statistics = []
    for mode, channels in ((settings.bn1_mode, in_channels), (settings.bn2_mode, out_channels)):
        size = channels if mode == BATCH_STATISTICS else 0
        statistics += [x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)]
    y = _map(x, out_channels, *settings[4:10], settings.channels_last)
    p = _map(x, out_channels, *settings[4:10], _runs_channels_last(x, settings.channels_last))
    return y, p, *statistics, x.new_empty((4, out_channels), dtype=dtype)


@torch.library.register_fake("fusedsep::separable_conv2d_training_backward")
def _(grad_y, x, x_normalization, p, *operands_settings_and_wanted):  # type: ignore[no-untyped-def]
    *operands_and_settings, wanted = operands_settings_and_wanted
    operands, settings = Operands(*operands_and_settings[:12]), Settings(*operands_and_settings[12:])
    in_channels, out_channels = operands.dw_weight.shape[0], operands.pw_weight.shape[0]
    grads = [_dense(x, *x.shape, settings.channels_last) if wanted & 1 else x.new_empty(0)]
    shapes = [(in_channels, 1, 3, 3), *3 * [(in_channels,)], (out_channels, in_channels, 1, 1), *3 * [(out_channels,)]]
    for bit, shape in enumerate(shapes, 1):
        grads.append(x.new_empty(shape if wanted >> bit & 1 else 0))
    return tuple(grads)


@torch.library.register_fake("fusedsep::pointwise_conv2d_training")
def _(x, weight, *others):  # type: ignore[no-untyped-def]
    settings = PointwiseSettings(*others[-len(PointwiseSettings._fields) :])
    batch, _, height, width = x.shape
    channels = weight.shape[0]
    y = _dense(x, batch, channels, height, width, settings.channels_last)
    p = _dense(x, batch, channels, height, width, _runs_channels_last(x, settings.channels_last))
    size = channels if settings.bn_mode == BATCH_STATISTICS else 0
    return y, p, x.new_empty(size), x.new_empty(size), x.new_empty((4, channels))


@torch.library.register_fake("fusedsep::depthwise_conv2d_training_backward")
@torch.library.register_fake("fusedsep::pointwise_conv2d_training_backward")
def _(grad_y, x, x_normalization, p, weight, *others):  # type: ignore[no-untyped-def]
    *_, channels_last, wanted = others
    grad_x = _dense(x, *x.shape, channels_last) if wanted & 1 else x.new_empty(0)
    return grad_x, *_convolution_gradients(weight, wanted >> 1)


@torch.library.register_fake("fusedsep::depthwise_conv2d_training")
@torch.library.register_fake("fusedsep::conv2d_training")
def _(x, weight, *others):  # type: ignore[no-untyped-def]
    settings = ConvolutionSettings(*others[-len(ConvolutionSettings._fields) :])
    channels, kernel = weight.shape[0], weight.shape[2]
    y = _map(x, channels, *settings[2:8], settings.channels_last, kernel)
    p = _map(x, channels, *settings[2:8], True, kernel)
    size = channels if settings.bn_mode == BATCH_STATISTICS else 0
    return y, p, x.new_empty(size), x.new_empty(size), x.new_empty((4, channels))


@torch.library.register_fake("fusedsep::conv2d_training_backward")
def _(grad_y, x, p, weight, *others):  # type: ignore[no-untyped-def]
    return tuple(_convolution_gradients(weight, others[-1]))


def _convolution_gradients(weight, wanted):  # type: ignore[no-untyped-def]
    """Of the weight, the bias and those of the BN."""
    shapes = [weight.shape, *3 * [weight.shape[:1]]]
    return [weight.new_empty(shape if wanted >> bit & 1 else 0) for bit, shape in enumerate(shapes)]


@torch.library.register_fake("fusedsep::depthwise_statistics")
def _(x, dw_weight, *geometry_and_format):  # type: ignore[no-untyped-def]
    return x.new_empty((2, dw_weight.shape[0]), dtype=torch.double)


@torch.library.register_fake("fusedsep::separable_products")
def _(x, dw_weight, pw_weight, affine1, *settings):  # type: ignore[no-untyped-def]
    *geometry, _, channels_last = settings
    out_channels = pw_weight.shape[0]
    return _map(x, out_channels, *geometry, channels_last), x.new_empty((2, out_channels), dtype=torch.double)


@torch.library.register_fake("fusedsep::normalize")
def _(p, affine2, activation, channels_last):  # type: ignore[no-untyped-def]
    return _dense(p, *p.shape, channels_last)


@torch.library.register_fake("fusedsep::normalize_backward_reduce")
def _(grad_y, p, affine2, activation, channels_last):  # type: ignore[no-untyped-def]
    return p.new_empty((2, p.shape[1]), dtype=torch.double)


@torch.library.register_fake("fusedsep::pointwise_backward")
def _(grad_y, x, p, dw_weight, pw_weight, affine1, affine2, correction2, *settings):  # type: ignore[no-untyped-def]
    *_, channels_last, want_g1, want_weight = settings
    in_channels = dw_weight.shape[0]
    g1 = _dense(p, p.shape[0], in_channels, *p.shape[2:], channels_last) if want_g1 else p.new_empty(0)
    return g1, p.new_empty(pw_weight.shape if want_weight else 0), p.new_empty((2, in_channels), dtype=torch.double)


@torch.library.register_fake("fusedsep::depthwise_backward")
def _(g1, x, dw_weight, affine1, correction1, *settings):  # type: ignore[no-untyped-def]
    *_, channels_last, want_x, want_weight = settings
    grad_x = _dense(x, *x.shape, channels_last) if want_x else x.new_empty(0)
    return grad_x, x.new_empty(dw_weight.shape if want_weight else 0)


def _runs_channels_last(x, channels_last):  # type: ignore[no-untyped-def]
    """Whether the product is channels_last: on a CPU as csrc/bindings/training_checks.h says."""
    return channels_last or (not x.is_cuda and x.shape[3] < 32)


def _map(x, channels, stride, dilation, pad_left, pad_right, pad_top, pad_bottom, channels_last, kernel=3):  # type: ignore[no-untyped-def]
    """What the convolutions make of ``x``."""
    height = output_size(x.shape[2], pad_top, pad_bottom, stride, dilation, kernel)
    width = output_size(x.shape[3], pad_left, pad_right, stride, dilation, kernel)
    return _dense(x, x.shape[0], channels, height, width, channels_last)


def _dense(like, batch, channels, height, width, channels_last):  # type: ignore[no-untyped-def]
    """Strides as the operators give them, also in dimensions of size 1."""
    if channels_last:
        return like.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    return like.new_empty((batch, channels, height, width))
