# SPDX-License-Identifier: BSD-3-Clause
"""Whether the fused kernels may run for a call, and running them.

What the kernels do not cover goes through the modules' own ATen code; nothing here ever changes a result. The checks
run at every call, so they are ordered by what fails most often and written for speed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _C, _compat, _ops
from ._activations import ACTIVATION_CODES
from ._fold import scale_and_shift_tensors
from ._padding import NO_PADS, Pads, convolution_pads, output_size, resolve_padding

if TYPE_CHECKING:
    from ._separable import SeparableConv

#: Depthwise convolution, its BN, pointwise convolution, its BN.
Modules = tuple[nn.Conv2d, _BatchNorm | None, nn.Conv2d, _BatchNorm | None]

_DTYPES = (torch.float32, torch.float64)
_TENSOR_TYPES = (torch.Tensor, nn.Parameter)


class PackedCache:
    """Packed weights of one site, each with the fingerprint of the parameters that it was packed from.

    The two are stored as one value: threads may look up and store at the same time.
    """

    def __init__(self) -> None:
        self._entries: dict[object, tuple[object, torch.Tensor]] = {}

    def lookup(self, key: object, fingerprint: object) -> torch.Tensor | None:
        """What is packed under ``key``, if it is from parameters with this ``fingerprint``."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] == fingerprint else None

    def store(self, key: object, fingerprint: object, packed: torch.Tensor) -> None:
        """Keep ``packed`` under ``key``, in the place of what was there."""
        self._entries[key] = (fingerprint, packed)


# ------------------------------------------------------------------------------------------------------------- applies


def covered_tensors(
    site: SeparableConv, x: torch.Tensor, dw: nn.Conv2d, bn1: _BatchNorm | None, pw: nn.Conv2d, bn2: _BatchNorm | None
) -> Sequence[torch.Tensor | None] | None:
    """What ``site`` depends on besides ``x``, if the kernels may run it: fixed statistics, plain modules, no hooks.

    Weight and bias of either convolution, then weight, bias, running mean and variance of each BN.
    """
    if (
        _covers(x)
        and x.dim() in (3, 4)
        and x.shape[-3] == dw.in_channels
        and dw.stride[0] <= 2
        and (_compat.is_plain_convolution(dw) or _pads_itself(site, dw))
        and _compat.is_plain_convolution(pw)
        and not (_compat.has_hooks(dw) or _compat.has_hooks(pw))
        and (bn1 is None or _is_fixed(site, bn1))
        and (bn2 is None or _is_fixed(site, bn2))
        and not _compat.has_global_hooks()
    ):
        tensors = (*_weight_and_bias(dw), *_weight_and_bias(pw))
        for bn in (bn1, bn2):
            if bn is not None:
                tensors += (*_weight_and_bias(bn), bn._buffers["running_mean"], bn._buffers["running_var"])
        if _are_readable(x.dtype, tensors):
            return tensors
    return None


def _weight_and_bias(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    parameters = module._parameters  # several times as fast as nn.Module.__getattr__
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return module.weight, module.bias  # parametrized


def applies_to_tensors(x: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """Whether :func:`run_folded` may run.

    ``tensors`` are the depthwise weight, then the other weights, biases and BN tensors, ``None`` where absent.
    """
    if not (_covers(x) and x.dim() in (3, 4) and _are_readable(x.dtype, tensors)):
        return False
    if x.shape[-3] != tensors[0].shape[0]:
        return False
    return not (
        torch.is_grad_enabled()
        and (x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors))
    )


def _covers(x: torch.Tensor) -> bool:
    return (
        type(x) is torch.Tensor
        and x.dtype in _DTYPES
        and x.is_cpu
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not _compat.functorch_is_active()
        and not _compat.forward_ad_is_active()
        and not _compat.dispatch_mode_is_active()
    )


def _are_readable(dtype: torch.dtype, tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether every tensor has its numbers in memory as they are: of this type, on the CPU, and no subclass."""
    for tensor in tensors:  # a generator expression costs more than the checks
        if tensor is not None and not (type(tensor) in _TENSOR_TYPES and tensor.dtype is dtype and tensor.is_cpu):
            return False
    return True


def _pads_itself(site: SeparableConv, dw: nn.Conv2d) -> bool:
    return type(dw) is site.self_padding_class and not _compat.is_patched_convolution(dw)


def _is_fixed(site: SeparableConv, bn: _BatchNorm) -> bool:
    """A BN in eval mode with running statistics: a scale and a shift that do not depend on the batch."""
    return (
        not bn.training
        and bn._buffers.get("running_mean") is not None
        and type(bn).forward in site.norm_forwards
        and "forward" not in bn.__dict__  # a function put on the instance
        and not _compat.has_hooks(bn)
    )


def check_input(
    x: torch.Tensor,
    weight: torch.Tensor,
    pre_pad: Pads | Literal["same"],
    own: object,
    stride: int,
    dilation: int,
    batch_statistics: bool,
) -> None:
    """Raise for an ``x`` that no path can run, naming what was wanted and what came.

    ``weight`` is the depthwise one; ``pre_pad`` and ``own`` are those of :func:`checked_pads`.
    """
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # the modules check for themselves, and a trace must not depend on these comparisons
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if x.shape[-3] != weight.shape[0]:
        raise ValueError(f"x must have {weight.shape[0]} channels, got {x.shape[-3]} in shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the weights, {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the dtype of the weights, {weight.dtype}, got {x.dtype}")
    height, width = x.shape[-2:]
    pads = checked_pads(pre_pad, own, stride, dilation, height, width)
    if batch_statistics and x.shape[:-3].numel() == 1:
        out_height = output_size(height, pads.top, pads.bottom, stride, dilation)
        out_width = output_size(width, pads.left, pads.right, stride, dilation)
        if out_height * out_width == 1:
            raise ValueError(
                "x must give more than 1 value per channel when training, since BN takes the statistics of the batch; "
                f"got one image with one output pixel from shape {list(x.shape)}"
            )


# ----------------------------------------------------------------------------------------------------------------- run


def run(
    site: SeparableConv,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    modules: Modules,
) -> torch.Tensor:
    """``site`` on ``x`` through the kernels; ``tensors`` are those of :func:`covered_tensors`."""
    if torch.is_grad_enabled() and (
        x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    ):
        return _EvalFunction.apply(site, modules, x, *tensors)
    return _run_without_grad(site, x, tensors, modules)


def _run_without_grad(
    site: SeparableConv,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    modules: Modules,
) -> torch.Tensor:
    dw, bn1, pw, bn2 = modules
    stride, dilation = dw.stride[0], dw.dilation[0]
    pads = checked_pads(site.pre_pad, own_pads(site, dw), stride, dilation, *x.shape[-2:])
    x, channels_last, unbatched = _dense(x)
    tensors = [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
    fingerprint = (
        _C.fingerprint([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor is not None]),
        None if bn1 is None else bn1.eps,
        None if bn2 is None else bn2.eps,
    )
    key = (_C.active_isa(), channels_last, x.dtype)
    packed = site.cache.lookup(key, fingerprint)
    if packed is None:
        dw_weight, dw_bias, pw_weight, pw_bias = tensors[:4]
        with torch.no_grad():
            packed = _ops.pack(
                dw_weight,
                *scale_and_shift_tensors(dw_bias, bn1),
                pw_weight,
                *scale_and_shift_tensors(pw_bias, bn2),
                channels_last,
            )
        site.cache.store(key, fingerprint, packed)
    y = _ops.separable_conv2d(
        x,
        packed,
        pw.out_channels,
        stride,
        dilation,
        *pads,
        site.activation_code,
        site.pointwise_activation_code,
        channels_last,
    )
    return y.squeeze(0) if unbatched else y


def run_folded(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor,
    pw_weight: torch.Tensor,
    pw_bias: torch.Tensor,
    stride: int,
    dilation: int,
    pads: Pads,
    activation: str,
    pointwise_activation: str,
    cache: PackedCache | None = None,
) -> torch.Tensor:
    """The kernels on weights with BN folded in; ``cache`` keeps them packed while they stay the same tensors."""
    x, channels_last, unbatched = _dense(x)
    packed = None
    if cache is not None:
        key = (_C.active_isa(), channels_last, x.dtype)
        constants = (dw_weight.data_ptr(), dw_bias.data_ptr(), pw_weight.data_ptr(), pw_bias.data_ptr())
        packed = cache.lookup(key, constants)
    if packed is None:
        with torch.no_grad():
            packed = _ops.pack(
                dw_weight.contiguous(),
                None,
                dw_bias.double().contiguous(),
                pw_weight.contiguous(),
                None,
                pw_bias.double().contiguous(),
                channels_last,
            )
        if cache is not None:
            cache.store(key, constants, packed)
    y = _ops.separable_conv2d(
        x,
        packed,
        pw_weight.shape[0],
        stride,
        dilation,
        *pads,
        ACTIVATION_CODES[activation],
        ACTIVATION_CODES[pointwise_activation],
        channels_last,
    )
    return y.squeeze(0) if unbatched else y


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
    """``x`` as a dense batch, whether it is channels_last, and whether the batch dimension was added."""
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    # As torch decides: a map of one pixel is NCHW, and one channel is what its strides say.
    channels_last = x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=memory_format), channels_last, unbatched


def own_pads(site: SeparableConv, dw: nn.Conv2d) -> object:
    """The zeros that ``dw`` adds to ``site.pre_pad``."""
    if type(dw) is site.self_padding_class:
        return NO_PADS
    return dw.padding if isinstance(dw.padding, tuple) else convolution_pads(dw)


@functools.lru_cache(maxsize=1024)
def checked_pads(
    pre_pad: Pads | Literal["same"], own: tuple[int, ...], stride: int, dilation: int, height: int, width: int
) -> Pads:
    """All zeros around a map: ``pre_pad`` and those of the convolution (:class:`Pads` or ``(pad_h, pad_w)``).

    Raises ``ValueError`` where the 3x3 kernel does not fit.
    """
    own_pads = own if isinstance(own, Pads) else Pads(own[1], own[1], own[0], own[0])
    pads = own_pads + resolve_padding(pre_pad, height, width, stride, dilation)
    out_height = output_size(height, pads.top, pads.bottom, stride, dilation)
    out_width = output_size(width, pads.left, pads.right, stride, dilation)
    if min(height, width, out_height, out_width) < 1:
        raise ValueError(
            f"x must hold the 3x3 kernel with dilation {dilation}: a map of {height} x {width} with padding "
            f"{tuple(pads)} (left, right, top, bottom) is too small"
        )
    return pads


# ------------------------------------------------------------------------------------------------------------ autograd


class _EvalFunction(torch.autograd.Function):
    """Fixed statistics, but a gradient is wanted (fine-tuning with frozen BN): kernels forward, ATen backward.

    Keeps ``x`` and the parameters, and computes the rest again when the gradient is asked for.
    """

    @staticmethod
    def forward(ctx, site, modules, x, *tensors):  # type: ignore[no-untyped-def]
        ctx.site, ctx.modules = site, modules
        ctx.save_for_backward(x, *tensors)
        return _run_without_grad(site, x, tensors, modules)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        create_graph = torch.is_grad_enabled()  # a gradient of the gradient will be asked for
        with torch.enable_grad():
            inputs = list(saved)
            if not create_graph:
                inputs = [None if tensor is None else tensor.detach() for tensor in saved]
                for i in wanted:
                    inputs[i].requires_grad_()
            y = ctx.site.composite_of_tensors(ctx.modules, *inputs)
            grads = torch.autograd.grad(y, [inputs[i] for i in wanted], grad_output, create_graph=create_graph)
        result: list[torch.Tensor | None] = [None] * len(saved)
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
        return (None, None, *result)
