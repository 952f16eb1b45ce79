# SPDX-License-Identifier: BSD-3-Clause
"""Training with ``nn.SyncBatchNorm``: the passes of the training operator, with sums over all processes in between.

The notation is that of ``csrc/kernels/training.h``: ``h = activation((d - center) * scale + shift)`` for the depthwise
map ``d``, likewise ``y`` for the pointwise product ``p``; both maps are without the bias of their convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from . import _compat, _ops
from ._ops import BATCH_STATISTICS, FIXED_STATISTICS, NO_NORM, Operands, Settings
from ._padding import output_size
from ._running_statistics import update_running_statistics

if TYPE_CHECKING:
    #: Who shares the statistics of the batch of the first BN, and of the second; ``None`` where nobody does.
    Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]


def process_group(bn: _BatchNorm | None) -> dist.ProcessGroup | None:
    """The processes that share the statistics of ``bn``, ``None`` where each has its own.

    Those are the ones that ``nn.SyncBatchNorm`` asks on a GPU.
    """
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def run(
    x: torch.Tensor,
    operands: Operands,
    settings: Settings,
    groups: Groups,
    bn1: _BatchNorm | None,
    bn2: _BatchNorm | None,
) -> torch.Tensor:
    """The training operator with the statistics of all processes of ``groups``.

    Args:
        x: this process's part of the batch, dense in the memory format that ``settings`` tells; it may be empty.
        groups: who shares the statistics of the batch of each BN; those of ``x`` alone where ``None``.
        bn1, bn2: whose running statistics follow those of the batch; ``None`` where nothing follows.

    Raises:
        ValueError: a BN takes the statistics of one value per channel over all processes.
    """
    y, statistics1, statistics2, count1, count2 = SharedStatisticsFunction.apply(settings, groups, x, *operands)
    for bn, bias, (mean, var), count in (
        (bn1, operands.dw_bias, statistics1, count1),
        (bn2, operands.pw_bias, statistics2, count2),
    ):
        if bn is not None:
            mean = mean if bias is None else mean + bias.detach()
            update_running_statistics(bn, mean.to(x.dtype), var.to(x.dtype), count)
    return y


def batch_norm(bn: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """``bn(x)`` for a map, through ATen: also on the CPU, where ``nn.SyncBatchNorm`` refuses.

    For a BN outside of the operator. The variance is taken around the mean of all processes, by an exchange of its own.
    """
    if not (isinstance(x, torch.Tensor) and x.is_cpu) or _compat.has_hooks(bn):
        return bn(x)
    group = process_group(bn)
    if group is None:
        return _BatchNorm.forward(bn, x)
    dims = (0, 2, 3)
    part = torch.cat((x.sum(dims, dtype=torch.double), x.new_tensor([x.numel() // x.shape[1]], dtype=torch.double)))
    total = _SumOverProcesses.apply(part, group)
    count = int(total[-1].detach())
    _check_count(count, group)
    mean = total[:-1] / max(count, 1)
    centered = x - mean.to(x.dtype).view(-1, 1, 1)
    var = _SumOverProcesses.apply(centered.square().sum(dims, dtype=torch.double), group) / max(count, 1)
    if bn.track_running_stats:
        update_running_statistics(bn, mean.detach().to(x.dtype), var.detach().to(x.dtype), count)
    y = centered * torch.rsqrt(var + bn.eps).to(x.dtype).view(-1, 1, 1)
    y = y if bn.weight is None else y * bn.weight.view(-1, 1, 1)
    return y if bn.bias is None else y + bn.bias.view(-1, 1, 1)


class _Norm(NamedTuple):
    """A BN and the bias of the convolution in front of it, as an affine map; in float64.

    Attributes:
        affine: rows ``center``, ``scale`` and ``shift``.
        rstd: ``1 / sqrt(variance + eps)``.
    """

    affine: torch.Tensor
    rstd: torch.Tensor

    @classmethod
    def of(
        cls,
        mode: int,
        eps: float,
        statistics: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor | None,
        shift: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
    ) -> _Norm:
        """``statistics`` are of the batch; they do not matter in the other modes."""
        mean, var = statistics
        if mode == FIXED_STATISTICS:
            mean, var = running_mean.double(), running_var.double()
        elif mode == NO_NORM:
            mean, var, eps = torch.zeros_like(mean), torch.ones_like(var), 0.0
        center = mean if bias is None or mode == BATCH_STATISTICS else mean - bias.double()
        rstd = torch.rsqrt(var + eps)
        scale = rstd if weight is None else rstd * weight.double()
        return cls(torch.stack((center, scale, torch.zeros_like(mean) if shift is None else shift.double())), rstd)

    def correction(self, mode: int, sums: torch.Tensor, count: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        """How the statistics of the batch answer to its gradient: rows ``slope`` and ``offset``.

        ``grad_d = scale * (g - slope * (d - center) - offset)`` with ``slope = rstd**2 * mean(g * (d - center))`` and
        ``offset = mean(g)`` (S. Ioffe, C. Szegedy, "Batch Normalization", 2015, section 3).

        Args:
            sums: of ``g`` and of ``g * (d - center)`` over this process's part of the batch.
            count: of values per channel over all processes.
        """
        if mode != BATCH_STATISTICS:
            return torch.zeros_like(sums)
        if group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=group)
        offset, slope = sums / max(count, 1)
        return torch.stack((slope * self.rstd.square(), offset))

    def gradients(self, mode: int, sums: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Of the bias in front, weight and shift, by this process's part of the batch."""
        scale = self.affine[1]
        bias = torch.zeros_like(scale) if mode == BATCH_STATISTICS else scale * sums[0]
        return bias.to(dtype), (self.rstd * sums[1]).to(dtype), sums[0].to(dtype)


def merged_statistics(
    statistics: torch.Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, int]:
    """Mean and biased variance of the batches of all processes, and how many values per channel they are from.

    An empty batch contributes nothing.

    Source: T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983.
    """
    if group is not None:
        part = torch.cat((statistics.flatten(), statistics.new_tensor([count])))
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group)
        gathered = torch.stack(parts)  # in the order of ranks, so that every process adds up in the same order
        counts = gathered[:, -1:]
        count = int(counts.sum())
        weights = counts / max(count, 1)
        means, variances = gathered[:, :-1].unflatten(1, (2, -1)).unbind(1)
        mean = (weights * means).sum(0)
        statistics = torch.stack((mean, (weights * (variances + (means - mean).square())).sum(0)))
    _check_count(count, group)
    return statistics, count


def _check_count(count: int, group: dist.ProcessGroup | None) -> None:
    if count == 1:
        processes = "this process" if group is None else f"all {dist.get_world_size(group)} processes"
        raise ValueError(
            "x must give more than 1 value per channel when training, since BN takes the statistics of the batch; "
            f"got one over {processes}"
        )


class SharedStatisticsFunction(torch.autograd.Function):
    """The training operator pass by pass, for statistics that processes share.

    Returns ``y``, and for each BN the statistics of the map without bias, float64 ``[2, C]``, and the number of values
    per channel that they are from. Keeps ``x``, ``p`` and small tensors.

    The gradients of the parameters are those by this process's part of the batch: whoever averages or adds the
    parameters' gradients over the processes (``DistributedDataParallel`` does) completes them, as for
    ``nn.SyncBatchNorm`` on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, groups: Groups, x: torch.Tensor, *tensors: torch.Tensor | None) -> Any:
        t = Operands(*tensors)
        dw_weight, pw_weight = t.dw_weight.contiguous(), t.pw_weight.contiguous()
        geometry, channels_last = settings[4:10], settings.channels_last

        count1 = count2 = _values_per_channel(x, settings)
        if settings.bn1_mode == BATCH_STATISTICS:
            statistics1 = _ops.depthwise_statistics(x, dw_weight, *geometry, channels_last)
            statistics1, count1 = merged_statistics(statistics1, count1, groups[0])
        else:
            statistics1 = x.new_zeros((2, x.shape[1]), dtype=torch.double)
        norm1 = _Norm.of(settings.bn1_mode, settings.bn1_eps, statistics1, *tensors[1:6])
        p, statistics2 = _ops.separable_products(
            x, dw_weight, pw_weight, norm1.affine, *geometry, settings.activation, channels_last
        )
        if settings.bn2_mode == BATCH_STATISTICS:
            statistics2, count2 = merged_statistics(statistics2, count2, groups[1])
        norm2 = _Norm.of(settings.bn2_mode, settings.bn2_eps, statistics2, *tensors[7:12])
        y = _ops.normalize(p, norm2.affine, settings.pointwise_activation, channels_last)

        ctx.settings, ctx.groups, ctx.counts = settings, groups, (count1, count2)
        ctx.mark_non_differentiable(statistics1, statistics2)
        ctx.save_for_backward(x, p, dw_weight, pw_weight, *norm1, *norm2)
        return y, statistics1, statistics2, count1, count2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, p, dw_weight, pw_weight, *vectors = ctx.saved_tensors
        norm1, norm2 = _Norm(*vectors[:2]), _Norm(*vectors[2:])
        s, needed = ctx.settings, dict(zip(("x", *Operands._fields), ctx.needs_input_grad[2:], strict=True))
        needs_depthwise = needed["x"] or needed["dw_weight"]
        needs_g1 = needs_depthwise or needed["dw_bias"] or needed["bn1_weight"] or needed["bn1_bias"]
        grads: dict[str, torch.Tensor] = {}

        sums2 = _ops.normalize_backward_reduce(grad_y, p, norm2.affine, s.pointwise_activation, s.channels_last)
        grads["pw_bias"], grads["bn2_weight"], grads["bn2_bias"] = norm2.gradients(s.bn2_mode, sums2, x.dtype)
        if needs_g1 or needed["pw_weight"]:
            correction2 = norm2.correction(s.bn2_mode, sums2, ctx.counts[1], ctx.groups[1])
            g1, grads["pw_weight"], sums1 = _ops.pointwise_backward(
                grad_y,
                x,
                p,
                dw_weight,
                pw_weight,
                norm1.affine,
                norm2.affine,
                correction2,
                *s[4:],
                needs_g1,
                needed["pw_weight"],
            )
            grads["dw_bias"], grads["bn1_weight"], grads["bn1_bias"] = norm1.gradients(s.bn1_mode, sums1, x.dtype)
        if needs_depthwise:
            correction1 = norm1.correction(s.bn1_mode, sums1, ctx.counts[0], ctx.groups[0])
            grads["x"], grads["dw_weight"] = _ops.depthwise_backward(
                g1,
                x,
                dw_weight,
                norm1.affine,
                correction1,
                *s[4:10],
                s.channels_last,
                needed["x"],
                needed["dw_weight"],
            )
        return None, None, *(grads[name] if needed[name] else None for name in needed)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _SumOverProcesses.apply(grad, ctx.group), None


def _values_per_channel(x: torch.Tensor, settings: Settings) -> int:
    s = settings
    height = output_size(x.shape[2], s.pad_top, s.pad_bottom, s.stride, s.dilation)
    width = output_size(x.shape[3], s.pad_left, s.pad_right, s.stride, s.dilation)
    return x.shape[0] * height * width
