# SPDX-License-Identifier: BSD-3-Clause
"""The passes of the training operator, one by one, beside the bytes that each has to move.

They run as for ``nn.SyncBatchNorm``, which needs them apart; the operator of a process alone runs the same passes, and
may keep from one to the next what is computed twice here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn as nn

import fusedsep

from .. import _ops, _sync
from .._activations import ACTIVATION_CODES
from .._ops import BATCH_STATISTICS, Operands, Settings
from ._limits import Limits
from ._measure import time_interleaved

_WARM_UP = 1


class Shape(NamedTuple):
    """Elements of the maps and weights of one block."""

    x: int
    depthwise: int  # the map between the convolutions
    product: int  # the output
    dw_weight: int
    pw_weight: int

    @property
    def depthwise_mult_adds(self) -> int:
        return 9 * self.depthwise

    @property
    def pointwise_mult_adds(self) -> int:
        return self.pw_weight * (self.depthwise // (self.dw_weight // 9))


class Pass(NamedTuple):
    """What a pass reads and writes, each element once, and its Mult-Adds. ``operator`` is its name in ``_ops``."""

    name: str
    operator: str
    elements: Callable[[Shape], int]
    mult_adds: Callable[[Shape], int]


PASSES = (
    Pass("depthwise statistics", "depthwise_statistics", lambda s: s.x, lambda s: s.depthwise_mult_adds),
    Pass(
        "products",
        "separable_products",
        lambda s: s.x + s.product + s.pw_weight,
        lambda s: s.depthwise_mult_adds + s.pointwise_mult_adds,
    ),
    Pass("normalize", "normalize", lambda s: 2 * s.product, lambda s: s.product),
    Pass("reduce", "normalize_backward_reduce", lambda s: 2 * s.product, lambda s: 2 * s.product),
    Pass(
        "pointwise backward",
        "pointwise_backward",
        lambda s: 2 * s.product + s.x + s.depthwise + 2 * s.pw_weight,
        lambda s: s.depthwise_mult_adds + 2 * s.pointwise_mult_adds,
    ),
    Pass(
        "depthwise backward",
        "depthwise_backward",
        lambda s: s.depthwise + 2 * s.x,
        lambda s: 3 * s.depthwise_mult_adds,
    ),
)


class _Block(NamedTuple):
    name: str
    x: torch.Tensor
    grad_y: torch.Tensor
    operands: Operands
    settings: Settings


def measure_passes(network: nn.Module, images: torch.Tensor, repeats: int, limits: Limits) -> dict[str, Any]:
    """Fastest time of each pass, and of forward and backward as one operation, summed over the blocks; for the JSON.

    Every depthwise-separable block of ``network`` counts as one with ReLU and BN behind both convolutions, on random
    numbers in channels_last. As one operation, its work counts as three times that of the forward.
    """
    whole = {"ms": 0.0, "gflop": 0.0}
    totals = [
        {"name": one.name, "ms": 0.0, "gflop": 0.0, "moved_bytes": 0, "arithmetic_ms": 0.0, "moved_ms": 0.0}
        for one in PASSES
    ]
    for block in _blocks(network, images):
        shape = _shape(block)
        whole["ms"] += _time_whole(block, repeats)
        whole["gflop"] += 3 * 2e-9 * (shape.depthwise_mult_adds + shape.pointwise_mult_adds)
        for total, one, milliseconds in zip(totals, PASSES, _time(block, repeats), strict=True):
            size, flop = 4 * one.elements(shape), 2 * one.mult_adds(shape)
            total["ms"] += milliseconds
            total["gflop"] += 1e-9 * flop
            total["moved_bytes"] += size
            total["arithmetic_ms"] += 1e-6 * flop / limits.fma_gflops
            total["moved_ms"] += 1e-6 * size / limits.level_for(size).gbs
    for total in totals:
        if total["ms"] > 0:
            total["gflops"] = 1e3 * total["gflop"] / total["ms"]
            total["intensity"] = 1e9 * total["gflop"] / total["moved_bytes"]
    if whole["ms"] > 0:
        whole["share_of_peak"] = 1e3 * whole["gflop"] / whole["ms"] / limits.fma_gflops
    return {"whole": whole, "passes": [total for total in totals if total["ms"] > 0]}


def _blocks(network: nn.Module, images: torch.Tensor) -> list[_Block]:
    pairs = fusedsep.complexity(network, tuple(images.shape)).separable
    network = copy.deepcopy(network)  # its running statistics are nobody's
    shapes: dict[str, torch.Size] = {}
    hooks = [
        network.get_submodule(pair.depthwise).register_forward_pre_hook(
            lambda _, inputs, name=pair.depthwise: shapes.__setitem__(name, inputs[0].shape)
        )
        for pair in pairs
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    blocks = []
    for pair in pairs:
        dw, pw = network.get_submodule(pair.depthwise), network.get_submodule(pair.pointwise)
        if dw.kernel_size == (3, 3) and dw.stride[0] == dw.stride[1] <= 2 and dw.out_channels == dw.in_channels:
            blocks.append(_block(pair.depthwise, dw, pw, shapes[pair.depthwise]))
    return blocks


def _block(name: str, dw: nn.Conv2d, pw: nn.Conv2d, shape: torch.Size) -> _Block:
    def norm(channels: int) -> tuple[torch.Tensor | None, ...]:
        return torch.ones(channels), torch.zeros(channels), None, None

    x = torch.randn(shape).to(memory_format=torch.channels_last)
    stride, dilation, relu = dw.stride[0], dw.dilation[0], ACTIVATION_CODES["relu"]
    height, width = (-(-size // stride) for size in shape[2:])
    return _Block(
        name,
        x.requires_grad_(),
        torch.randn(shape[0], pw.out_channels, height, width).to(memory_format=torch.channels_last),
        Operands(
            dw.weight.detach().clone().requires_grad_(),
            None,
            *norm(dw.out_channels),
            pw.weight.detach().clone().requires_grad_(),
            None,
            *norm(pw.out_channels),
        ),
        # Padded so that the map keeps its size, whatever the network does: a pixel more or less is no matter.
        Settings(BATCH_STATISTICS, 1e-5, BATCH_STATISTICS, 1e-5, stride, dilation, *4 * [dilation], relu, relu, True),
    )


def _shape(block: _Block) -> Shape:
    channels = block.x.shape[1]
    pixels = block.grad_y.numel() // block.grad_y.shape[1]
    weights = block.operands.dw_weight.numel(), block.operands.pw_weight.numel()
    return Shape(block.x.numel(), channels * pixels, block.grad_y.numel(), *weights)


def _time_whole(block: _Block, repeats: int) -> float:
    """Milliseconds of forward and backward of a block, the fastest of ``repeats``."""
    module = fusedsep.DepthwiseSeparableBlock(
        block.x.shape[1],
        block.grad_y.shape[1],
        block.settings.stride,
        padding=block.settings.dilation,
        dilation=block.settings.dilation,
    )

    def step() -> None:
        module.zero_grad()
        block.x.grad = None
        module(block.x).backward(block.grad_y)

    return min(time_interleaved({"": step}, repeats, inference=False)[""].samples)


def _time(block: _Block, repeats: int) -> list[float]:
    """Milliseconds of each pass, the fastest of ``repeats``."""
    fastest = dict.fromkeys((one.operator for one in PASSES), float("inf"))

    def timed(operator: str) -> Callable[..., Any]:
        run = getattr(_ops, operator)

        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = run(*arguments)
            fastest[operator] = min(fastest[operator], 1e3 * (time.perf_counter() - begin))
            return result

        return call

    with mock.patch.multiple(_ops, **{operator: timed(operator) for operator in fastest}):
        for _ in range(_WARM_UP + repeats):
            y = _sync.run(block.x, block.operands, block.settings, (None, None), None, None)
            y.backward(block.grad_y)
    return [fastest[one.operator] for one in PASSES]
