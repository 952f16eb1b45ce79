# SPDX-License-Identifier: BSD-3-Clause
"""Whether the fused kernels may run for a call, and running them.

What the kernels do not cover goes through the modules' own ATen code; nothing here ever changes a result. The checks
run at every call, so they are ordered by what fails most often and written for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _C, _compat, _cuda, _ops, _sync, _training
from ._activations import ACTIVATION_CODES
from ._checks import check_values_per_channel, checked_pads
from ._fold import scale_and_shift_tensors
from ._ops import BATCH_STATISTICS, FIXED_STATISTICS, NO_NORM, ConvolutionOperands, Operands, Settings
from ._padding import NO_PADS, Pads, convolution_pads
from ._running_statistics import update_running_statistics

if TYPE_CHECKING:
    from ._convolution import ConvNormActivation
    from ._separable import SeparableConv
    from .functional import BatchNorm

#: Depthwise convolution, its BN, pointwise convolution, its BN.
Modules = tuple[nn.Conv2d, _BatchNorm | None, nn.Conv2d, _BatchNorm | None]

AnyOperands = TypeVar("AnyOperands", Operands, ConvolutionOperands)

_DTYPES = (torch.float32, torch.float64)
_TENSOR_TYPES = (torch.Tensor, nn.Parameter)


class PackedCache:
    """Packed weights of one site, each with the fingerprint of the parameters that it was packed from.

    The two are stored as one value: threads may look up and store at the same time.
    """

    def __init__(self) -> None:
        self._entries: dict[object, tuple[object, torch.Tensor, object]] = {}

    def lookup(self, key: object, fingerprint: object) -> torch.Tensor | None:
        """What is packed under ``key``, if it is from parameters with this ``fingerprint``."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] == fingerprint else None

    def store(self, key: object, fingerprint: object, packed: torch.Tensor, alive: object = None) -> None:
        """Keep ``packed`` under ``key``, in the place of what was there.

        ``alive`` is kept with it: tensors whose addresses are in the fingerprint, so that no other one gets them.
        """
        self._entries[key] = (fingerprint, packed, alive)


# ------------------------------------------------------------------------------------------------------------- applies


def covered_tensors(
    site: SeparableConv, x: torch.Tensor, dw: nn.Conv2d, bn1: _BatchNorm | None, pw: nn.Conv2d, bn2: _BatchNorm | None
) -> Operands | None:
    """What ``site`` depends on besides ``x``, if the kernels may run it: plain modules, no hooks."""
    if (
        covers_map(x)
        and x.dim() in (3, 4)
        and x.shape[-3] == dw.in_channels
        and dw.stride[0] <= 2
        and (_compat.is_plain_convolution(dw) or pads_itself(site, dw))
        and _compat.is_plain_convolution(pw)
        and not (_compat.has_hooks(dw) or _compat.has_hooks(pw))
        and (bn1 is None or covers_norm(site, bn1))
        and (bn2 is None or covers_norm(site, bn2))
        and (x.numel() > 0 or _covers_empty_batch(bn1, bn2))
        and not _compat.has_global_hooks()
    ):
        operands = Operands(*weight_and_bias(dw), *norm_tensors(bn1), *weight_and_bias(pw), *norm_tensors(bn2))
        if are_readable(x.dtype, operands, None if x.is_cpu else x.device) and (
            covers_training(x, bn1, bn2)
            or not (
                any(bn is not None and uses_batch_statistics(bn) for bn in (bn1, bn2)) or wants_gradient(x, operands)
            )
        ):
            return operands
    return None


def norm_tensors(bn: _BatchNorm | None) -> tuple[torch.Tensor | None, ...]:
    """Its weight, bias, running mean and running variance."""
    if bn is None:
        return None, None, None, None
    return *weight_and_bias(bn), bn._buffers["running_mean"], bn._buffers["running_var"]


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Its two parameters, parametrized or not."""
    parameters = module._parameters  # several times as fast as nn.Module.__getattr__
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return module.weight, module.bias  # parametrized


def applies_to_tensors(x: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """Whether :func:`run_folded` may run; ``tensors`` as for :func:`covers_tensors`."""
    return covers_tensors(x, *tensors) and not wants_gradient(x, tensors)


def covers_tensors(x: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """Whether the kernels may run on these tensors.

    ``tensors`` are the depthwise weight, then the other weights, biases and BN tensors, ``None`` where absent.
    """
    return (
        covers_map(x)
        and x.dtype in _DTYPES  # folding BN into 16-bit weights would round them
        and x.dim() in (3, 4)
        and are_readable(x.dtype, tensors, None if x.is_cpu else x.device)
        and x.shape[-3] == tensors[0].shape[0]
    )


def covers_training(x: torch.Tensor, *norms: BatchNorm | _BatchNorm | None) -> bool:
    """Whether there are kernels for gradients and statistics of the batch where ``x`` is.

    On a GPU where they are switched on, and where no process shares its statistics with others.
    """
    return x.is_cpu or (_cuda.trains() and all(bn is None or _sync.process_group(bn) is None for bn in norms))


def wants_gradient(x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd is to differentiate by any of them."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


def uses_batch_statistics(bn: _BatchNorm) -> bool:
    """Whether ``bn`` normalizes with the statistics of the batch."""
    return bn.training or bn._buffers.get("running_mean") is None


def covers_map(x: torch.Tensor) -> bool:
    """Whether the kernels can read ``x`` here and now."""
    return (
        type(x) is torch.Tensor
        and (x.dtype in _DTYPES if x.is_cpu else x.is_cuda and _cuda.covers(x))
        and x.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not _compat.functorch_is_active()
        and not _compat.forward_ad_is_active()
        # An exported program is to run, and to be translated, where this package is not.
        and not (torch.compiler.is_exporting() if torch.compiler.is_compiling() else _compat.dispatch_mode_is_active())
    )


def are_readable(
    dtype: torch.dtype, tensors: Sequence[torch.Tensor | None], device: torch.device | None = None
) -> bool:
    """Whether every tensor has its numbers in memory as they are: of this type, on this device, and no subclass.

    Without ``device``, on the CPU, which costs less to ask.
    """
    for tensor in tensors:  # a generator expression costs more than the checks
        if tensor is not None and not (
            type(tensor) in _TENSOR_TYPES
            and tensor.dtype is dtype
            and (tensor.is_cpu if device is None else tensor.device == device)
        ):
            return False
    return True


def pads_itself(site: SeparableConv | ConvNormActivation, dw: nn.Conv2d) -> bool:
    """Whether ``dw`` is the convolution that puts zeros around its map by itself, of which ``site`` knows how."""
    return type(dw) is site.self_padding_class and not _compat.is_patched_convolution(dw)


def covers_norm(site: SeparableConv | ConvNormActivation, bn: _BatchNorm) -> bool:
    """Whether ``bn`` runs nothing but the batch normalization that ``site`` knows, in the mode that it is in."""
    if uses_batch_statistics(bn):
        covered = type(bn).forward in site.training_norm_forwards
    else:
        covered = type(bn).forward in site.norm_forwards
    return covered and "forward" not in bn.__dict__ and not _compat.has_hooks(bn)


def _covers_empty_batch(*norms: _BatchNorm | None) -> bool:
    """An empty batch has no statistics, but its process must take part where those of others are asked for."""
    return any(_sync.process_group(bn) is not None for bn in norms) or not any(
        bn is not None and uses_batch_statistics(bn) for bn in norms
    )


# ----------------------------------------------------------------------------------------------------------------- run


def run(site: SeparableConv, x: torch.Tensor, operands: Operands, modules: Modules) -> torch.Tensor:
    """``site`` on ``x`` through the kernels; ``operands`` are those of :func:`covered_tensors`."""
    dw, bn1, _, bn2 = modules
    stride, dilation = dw.stride[0], dw.dilation[0]
    pads = checked_pads(site.pre_pad, own_pads(site, dw), stride, dilation, *x.shape[-2:])
    x, channels_last, unbatched = dense(x)
    bn1_mode, bn1_eps = mode_and_eps(bn1)
    bn2_mode, bn2_eps = mode_and_eps(bn2)
    settings = Settings(
        bn1_mode,
        bn1_eps,
        bn2_mode,
        bn2_eps,
        stride,
        dilation,
        *pads,
        site.activation_code,
        site.pointwise_activation_code,
        channels_last,
    )
    if BATCH_STATISTICS in (bn1_mode, bn2_mode):
        followers = (bn if bn is not None and bn.training and bn.track_running_stats else None for bn in (bn1, bn2))
        groups = _sync.process_group(bn1), _sync.process_group(bn2)
        if groups == (None, None):
            y = run_training(x, operands, settings, *followers)
        else:
            y = _sync.run(x, operands, settings, groups, *followers)
    else:
        operands = contiguous(operands)
        if not wants_gradient(x, operands):
            y = _run_packed(site, x, operands, settings, modules)
        elif torch.compiler.is_compiling():
            y = _ops.separable_conv2d_training(x, *operands, *settings)[0]
        else:
            y = _EvalFunction.apply(site, modules, settings, x, *operands)
    return y.squeeze(0) if unbatched else y


def mode_and_eps(bn: _BatchNorm | None) -> tuple[int, float]:
    """As the training operators take them."""
    if bn is None:
        return NO_NORM, 0.0
    return BATCH_STATISTICS if uses_batch_statistics(bn) else FIXED_STATISTICS, bn.eps


def contiguous(operands: AnyOperands) -> AnyOperands:
    """The same tensors without gaps between their numbers."""
    if all([tensor is None or tensor.is_contiguous() for tensor in operands]):  # a generator costs more
        return operands
    return type(operands)(*(None if tensor is None else tensor.contiguous() for tensor in operands))


def run_training(
    x: torch.Tensor,
    operands: Operands,
    settings: Settings,
    bn1: BatchNorm | _BatchNorm | None,
    bn2: BatchNorm | _BatchNorm | None,
) -> torch.Tensor:
    """The training operator.

    Args:
        x: dense in the memory format that ``settings`` tells.
        bn1, bn2: whose running statistics follow those of the batch; ``None`` where nothing follows.

    Raises:
        ValueError: a BN takes the statistics of one value per channel.
    """
    pads = Pads(settings.pad_left, settings.pad_right, settings.pad_top, settings.pad_bottom)
    trains1, trains2 = settings.bn1_mode == BATCH_STATISTICS, settings.bn2_mode == BATCH_STATISTICS
    if trains1 or trains2:
        check_values_per_channel(x, pads, settings.stride, settings.dilation)
    # What the batch takes the place of must not reach autograd, which would find it changed by this step.
    operands = operands._replace(**_WITHOUT_STATISTICS1) if trains1 else operands
    operands = operands._replace(**_WITHOUT_STATISTICS2) if trains2 else operands
    y, _, mean1, var1, mean2, var2, _ = _ops.separable_conv2d_training(x, *contiguous(operands), *settings)
    values_per_channel = y.shape[0] * y.shape[2] * y.shape[3]
    if bn1 is not None:
        update_running_statistics(bn1, mean1, var1, values_per_channel)
    if bn2 is not None:
        update_running_statistics(bn2, mean2, var2, values_per_channel)
    return y


_WITHOUT_STATISTICS1 = {"bn1_mean": None, "bn1_var": None}
_WITHOUT_STATISTICS2 = {"bn2_mean": None, "bn2_var": None}


def _run_packed(
    site: SeparableConv, x: torch.Tensor, operands: Operands, settings: Settings, modules: Modules
) -> torch.Tensor:
    """Fixed statistics and no gradient: BN folded, weights packed, both kept from call to call.

    On a GPU they are packed at every call, by one small kernel: looking whether they changed would wait for the device.
    """
    _, bn1, pw, bn2 = modules
    packed = None
    # The graph packs at every call, and notices every change so.
    keeps = x.is_cpu and not torch.compiler.is_compiling()
    if keeps:
        fingerprint = (
            _C.fingerprint([(tensor.data_ptr(), tensor.nbytes) for tensor in operands if tensor is not None]),
            settings.bn1_eps,
            settings.bn2_eps,
        )
        key = (_C.active_isa(), settings.channels_last, x.dtype)
        packed = site.cache.lookup(key, fingerprint)
    if packed is None and not x.is_cpu:
        with torch.no_grad():
            packed = _ops.pack_modules(*operands, settings.bn1_eps, settings.bn2_eps)
    if packed is None:
        with torch.no_grad():
            packed = _ops.pack(
                operands.dw_weight,
                *scale_and_shift_tensors(operands.dw_bias, bn1),
                operands.pw_weight,
                *scale_and_shift_tensors(operands.pw_bias, bn2),
                settings.channels_last,
            )
        if keeps:
            site.cache.store(key, fingerprint, packed)
    return _separable_conv2d(x, packed, pw.out_channels, *settings[4:])


def _separable_conv2d(*arguments: Any) -> torch.Tensor:
    """The operator without a look at autograd, which nobody wants here: a fifth of the time of a small call."""
    if not arguments[0].is_cpu:
        arguments = (*arguments, _cuda.allows_tf32())
    if torch.compiler.is_compiling():
        return _ops.separable_conv2d(*arguments)
    with _compat.below_autograd():
        return _ops.separable_conv2d(*arguments)


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
    x, channels_last, unbatched = dense(x)
    packed = None
    if torch.compiler.is_compiling():  # the graph packs at every call
        cache = None
    if cache is not None:
        key = (_C.active_isa(), channels_last, x.dtype)
        constants = (dw_weight.data_ptr(), dw_bias.data_ptr(), pw_weight.data_ptr(), pw_bias.data_ptr())
        packed = cache.lookup(key, constants)
    if packed is None:
        packed = pack_folded(dw_weight, dw_bias, pw_weight, pw_bias, channels_last)
        if cache is not None:
            cache.store(key, constants, packed)
    y = _separable_conv2d(
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


def pack_folded(
    dw_weight: torch.Tensor, dw_bias: torch.Tensor, pw_weight: torch.Tensor, pw_bias: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """Packed weights of a site with BN folded in."""
    with torch.no_grad():
        return _ops.pack(
            dw_weight.contiguous(),
            None,
            dw_bias.double().contiguous(),
            pw_weight.contiguous(),
            None,
            pw_bias.double().contiguous(),
            channels_last,
        )


def dense(x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
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


# ------------------------------------------------------------------------------------------------------------ autograd


class _EvalFunction(torch.autograd.Function):
    """Fixed statistics, but a gradient is wanted (fine-tuning with frozen BN): packed weights forward.

    Keeps ``x`` and the parameters, and computes the rest again when the gradient is asked for.
    """

    @staticmethod
    def forward(ctx, site, modules, settings, x, *operands):  # type: ignore[no-untyped-def]
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *operands)
        return _run_packed(site, x, Operands(*operands), settings, modules)

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *operands = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *_training.gradients(grad_y, x, None, Operands(*operands), ctx.settings, needed)
