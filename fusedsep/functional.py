# SPDX-License-Identifier: BSD-3-Clause
"""The operation under the block as a function of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from . import _kernel_path
from ._activations import ACTIVATION_CODES, apply_activation, check_activation
from ._checks import check_positive_int, checked_pads
from ._fold import fold_tensors
from ._ops import BATCH_STATISTICS, FIXED_STATISTICS, NO_NORM, Operands, Settings
from ._padding import NO_PADS, PaddingArgument, parse_padding


class BatchNorm(NamedTuple):
    """The numbers of a BatchNorm over C channels: four ``Tensor[C]``, eps and momentum as in ``nn.BatchNorm2d``."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    eps: float = 1e-5
    momentum: float | None = 0.1


def depthwise_separable_conv2d(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    bn1: BatchNorm | _BatchNorm | None,
    pw_weight: torch.Tensor,
    bn2: BatchNorm | _BatchNorm | None = None,
    *,
    dw_bias: torch.Tensor | None = None,
    pw_bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: PaddingArgument = 1,
    dilation: int = 1,
    activation: str = "relu",
    pointwise_activation: str = "relu",
    training: bool = False,
) -> torch.Tensor:
    """Depthwise 3x3 convolution, BN, activation, pointwise 1x1 convolution, BN, activation as one operation.

    Equivalent to::

        def batch_norm(x, bn):
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, bn.momentum, bn.eps)

        h = F.conv2d(x, dw_weight, dw_bias, stride, padding, dilation, groups=x.shape[1])
        h = F.relu(batch_norm(h, bn1))
        y = F.conv2d(h, pw_weight, pw_bias)
        y = F.relu(batch_norm(y, bn2))

    The kernels run it, forward and backward, and the map between the two convolutions is never stored. Without
    ``training`` and where no gradient is wanted BN is folded into the weights at every call:
    :class:`fusedsep.DepthwiseSeparableBlock` keeps them folded and packed from call to call.

    Args:
        x: ``Tensor[N, C, H, W]`` or ``Tensor[C, H, W]``, floating point, contiguous or channels_last.
        dw_weight: ``Tensor[C, 1, 3, 3]``.
        bn1: :class:`BatchNorm` over C channels, an ``nn.BatchNorm2d``, or ``None`` for none. A module stands for its
            numbers alone: its ``forward``, its hooks and its own training mode are not asked.
        pw_weight: ``Tensor[O, C, 1, 1]``.
        bn2: the same over O channels.
        dw_bias, pw_bias: ``Tensor[C]`` and ``Tensor[O]``, added before the BN. Default: none.
        stride: of the depthwise convolution, in pixels; above 2 ATen runs it. Default: 1.
        padding: zeros around ``x`` in pixels: an int, ``(pad_h, pad_w)``, ``(left, right, top, bottom)`` as in
            ``F.pad``, or ``"same"``, which is TensorFlow's SAME. Default: 1.
        dilation: distance of the 3x3 kernel's taps, in pixels. Default: 1.
        activation, pointwise_activation: ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"none"``, after ``bn1`` and
            ``bn2``, also where there is no BN. Default: ``"relu"``.
        training: use the statistics of the batch and update the running ones (and ``num_batches_tracked``, where the
            BN has it) in place. Without running statistics a BN always uses those of the batch. Default: False.

    Returns:
        ``Tensor[N, O, Ho, Wo]`` (or without N, like ``x``) in the dtype and memory format of ``x``, with
        ``Ho = (H + top + bottom - 2 * dilation - 1) // stride + 1``.

    Raises:
        TypeError: an argument is not of the type above, or a weight has another dtype than ``x``.
        ValueError: a shape, device or number does not fit, an activation is unknown, or training saw one value
            per channel. The message names the argument.

    Source: A. Howard et al., "MobileNets", 2017, section 3.1; S. Ioffe, C. Szegedy, "Batch Normalization", 2015.
    """
    check_positive_int(stride, "stride")
    check_positive_int(dilation, "dilation")
    check_activation(activation)
    check_activation(pointwise_activation, "pointwise_activation")
    parsed_padding = parse_padding(padding)
    _check_tensors(x, dw_weight, dw_bias, pw_weight, pw_bias)
    _check_batch_norm(bn1, dw_weight.shape[0], "bn1", training)
    _check_batch_norm(bn2, pw_weight.shape[0], "bn2", training)

    pads = checked_pads(parsed_padding, NO_PADS, stride, dilation, *x.shape[-2:])
    operands = Operands(dw_weight, dw_bias, *_tensors_of(bn1), pw_weight, pw_bias, *_tensors_of(bn2))
    modes = _mode(bn1, training), _mode(bn2, training)
    batch_statistics = BATCH_STATISTICS in modes
    trains = batch_statistics or _kernel_path.wants_gradient(x, operands)
    if (
        stride <= 2
        and _kernel_path.covers_tensors(x, *operands)
        and not (batch_statistics and x.numel() == 0)
        and not (trains and not _kernel_path.covers_training(x))
    ):
        if not trains:
            return _kernel_path.run_folded(
                x,
                *fold_tensors(dw_weight, dw_bias, bn1),
                *fold_tensors(pw_weight, pw_bias, bn2),
                stride,
                dilation,
                pads,
                activation,
                pointwise_activation,
            )
        x, channels_last, unbatched = _kernel_path.dense(x)
        settings = Settings(
            modes[0],
            0.0 if bn1 is None else bn1.eps,
            modes[1],
            0.0 if bn2 is None else bn2.eps,
            stride,
            dilation,
            *pads,
            ACTIVATION_CODES[activation],
            ACTIVATION_CODES[pointwise_activation],
            channels_last,
        )
        y = _kernel_path.run_training(x, operands, settings, *((bn1, bn2) if training else (None, None)))
        return y.squeeze(0) if unbatched else y

    h = F.pad(x if x.dim() == 4 else x.unsqueeze(0), pads)
    h = F.conv2d(h, dw_weight, dw_bias, stride, 0, dilation, groups=dw_weight.shape[0])
    h = apply_activation(activation, _batch_norm(h, bn1, training))
    y = F.conv2d(h, pw_weight, pw_bias)
    y = apply_activation(pointwise_activation, _batch_norm(y, bn2, training))
    return y if x.dim() == 4 else y.squeeze(0)


def _batch_norm(x: torch.Tensor, bn: BatchNorm | _BatchNorm | None, training: bool) -> torch.Tensor:
    if bn is None:
        return x
    momentum = bn.momentum
    counter = getattr(bn, "num_batches_tracked", None)
    if training and counter is not None:
        counter.add_(1)
        if momentum is None:  # nn.BatchNorm2d: the average over all batches so far
            momentum = 1.0 / float(counter)
    use_batch_statistics = training or bn.running_mean is None
    return F.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, use_batch_statistics, momentum or 0.0, bn.eps
    )


def _mode(bn: BatchNorm | _BatchNorm | None, training: bool) -> int:
    if bn is None:
        return NO_NORM
    return BATCH_STATISTICS if training or bn.running_mean is None else FIXED_STATISTICS


def _tensors_of(bn: BatchNorm | _BatchNorm | None) -> tuple[torch.Tensor | None, ...]:
    return (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)


def _check_tensors(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor | None,
    pw_weight: torch.Tensor,
    pw_bias: torch.Tensor | None,
) -> None:
    for name, tensor in (("x", x), ("dw_weight", dw_weight), ("pw_weight", pw_weight)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    channels = x.shape[-3]
    if tuple(dw_weight.shape) != (channels, 1, 3, 3):
        raise ValueError(
            f"dw_weight must have shape [{channels}, 1, 3, 3] for the {channels} channels of x, "
            f"got {list(dw_weight.shape)}"
        )
    if pw_weight.dim() != 4 or tuple(pw_weight.shape[1:]) != (channels, 1, 1):
        raise ValueError(f"pw_weight must have shape [O, {channels}, 1, 1], got {list(pw_weight.shape)}")
    _check_vector(dw_bias, channels, "dw_bias")
    _check_vector(pw_bias, pw_weight.shape[0], "pw_bias")

    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (
        ("dw_weight", dw_weight),
        ("dw_bias", dw_bias),
        ("pw_weight", pw_weight),
        ("pw_bias", pw_bias),
    ):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _check_batch_norm(bn: BatchNorm | _BatchNorm | None, channels: int, argument: str, training: bool) -> None:
    if bn is None:
        return
    if not isinstance(bn, (BatchNorm, _BatchNorm)):
        raise TypeError(f"{argument} must be functional.BatchNorm, nn.BatchNorm2d or None, got {type(bn).__name__}")
    for field in ("weight", "bias", "running_mean", "running_var"):
        _check_vector(getattr(bn, field), channels, f"{argument}.{field}")
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{argument} must have both running_mean and running_var or neither")
    counts_batches = getattr(bn, "num_batches_tracked", None) is not None
    if training and bn.running_mean is not None and bn.momentum is None and not counts_batches:
        raise ValueError(f"{argument}.momentum must be a number in training where no batches are counted, got None")


def _check_vector(tensor: torch.Tensor | None, channels: int, argument: str) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor or None, got {type(tensor).__name__}")
    if tuple(tensor.shape) != (channels,):
        raise ValueError(f"{argument} must have shape [{channels}], got {list(tensor.shape)}")
