# SPDX-License-Identifier: BSD-3-Clause
"""What a training step does to the buffers of a BN."""

from __future__ import annotations

from typing import Any

import torch


def update_running_statistics(bn: Any, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """What ``nn.BatchNorm2d`` does to its buffers in a training step.

    Args:
        bn: ``nn.BatchNorm2d``, or anything else with its ``running_mean``, ``running_var`` and ``momentum``; a
            ``num_batches_tracked`` is welcome.
        mean, var: of the batch; ``var`` is the biased one.
        count: how many values a channel they are taken from; none leaves the running ones as they are.
    """
    with torch.no_grad():
        weight = bn.momentum
        counter = getattr(bn, "num_batches_tracked", None)

        def follow(running: torch.Tensor, value: torch.Tensor, weight: float | torch.Tensor) -> None:
            if running.dtype == value.dtype:
                running.lerp_(value, weight)
            else:  # 16-bit maps have float32 statistics
                running.copy_(running.to(value.dtype).lerp_(value, weight))

        if counter is not None:
            counter.add_(1)
            if weight is None:  # the average over all batches so far
                weight = counter.to(mean.dtype).reciprocal()
        if bn.running_mean is not None and count > 0:
            weight = 0.0 if weight is None else weight
            follow(bn.running_mean, mean, weight)
            follow(bn.running_var, var * (count / (count - 1)), weight)
