# SPDX-License-Identifier: BSD-3-Clause
"""A module to time, in each of the variants that are compared, every one checked before it is timed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from shapes import Shape
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fusedsep
from fusedsep import reference
from fusedsep.cli._measure import compare


def _fold(module: nn.Module) -> nn.Module:
    """BN folded into the convolution in front of it: what torch itself offers for deployment. In place."""
    for parent in list(module.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent.register_module(name, fuse_conv_bn_eval(conv, norm))
                parent.register_module(norm_name, nn.Identity())
    return module


def _compile(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    # All subjects share the code of one forward, and Dynamo gives up on code that was compiled more than a few times.
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, options={"freezing": True})


#: How each engine is made from the unfused module in eval mode.
ENGINES: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "eager": lambda module: module,
    "folded": _fold,
    "compiled": _compile,
    "fused": fusedsep.fuse,
    "frozen": fusedsep.freeze,
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Variant(NamedTuple):
    engine: str
    memory_format: str  # of the input, and so of every map

    def __str__(self) -> str:
        return f"{self.engine} {self.memory_format}"


def variants(with_compile: bool = False) -> list[Variant]:
    """Every engine in both formats, but ``compiled`` in channels_last alone: Inductor chooses its own format inside."""
    return [
        Variant(engine, memory_format)
        for engine in ENGINES
        for memory_format in FORMATS
        if engine != "compiled" or (with_compile and memory_format == "channels_last")
    ]


class Subject:
    """An unfused module, an input for it, and the answer it must give.

    Args:
        network: what the module is, or is a part of.
        name: which part; unique within the network.
        module: takes ``x``. Changed in place: its BNs get the statistics of ``x``, so that numbers keep the size that
            they have in a trained network, and its activations become in-place ones, as published networks have them.
        x: ``Tensor[1, C, H, W]``, float32.
    """

    def __init__(self, network: str, name: str, module: nn.Module, x: torch.Tensor) -> None:
        self.network, self.name, self.x = network, name, x
        self.module = _calibrated(_with_inplace_activations(module), x)
        self.gflop = 2e-9 * fusedsep.complexity(module, tuple(x.shape)).mult_adds
        report = fusedsep.fusion_report(module)
        if report.skipped or not report.fused:
            raise RuntimeError(f"{network} {name} would be timed in part unfused:\n{report}")
        with torch.inference_mode():
            self._torchs = module(x)
            self._exact = copy.deepcopy(module).double()(x.double())

    def call(self, variant: Variant) -> Callable[[], torch.Tensor]:
        """A call of the module as ``variant``, which gave the right answer once.

        Raises:
            RuntimeError: the largest error against float64 exceeds 3 times that of eager float32 by more than 4 units
                in the last place of the largest output (:func:`fusedsep.cli._measure.compare`).
        """
        memory_format = FORMATS[variant.memory_format]
        run = ENGINES[variant.engine](copy.deepcopy(self.module).to(memory_format=memory_format))
        x = self.x.to(memory_format=memory_format)
        with torch.inference_mode():
            accuracy = compare(run(x), self._torchs, self._exact)
        if not accuracy.ok:
            raise RuntimeError(
                f"{variant} gives a wrong answer for {self.network} {self.name}: error {accuracy.error:.2e} against "
                f"float64, allowed {accuracy.allowed:.2e}"
            )
        return lambda: run(x)


def block(shape: Shape) -> Subject:
    torch.manual_seed(0)
    module = reference.DepthwiseSeparableBlock(
        shape.in_channels,
        shape.out_channels,
        shape.stride,
        activation=shape.activation,
        pointwise_activation=shape.pointwise_activation,
    )
    if not shape.depthwise_norm:
        module.bn1 = nn.Identity()
    return Subject(shape.network, shape.name, module, torch.randn(1, shape.in_channels, shape.size, shape.size))


def network(width: float, resolution: int) -> Subject:
    torch.manual_seed(0)
    module = reference.MobileNetV1(width_multiplier=width)
    return Subject("MobileNetV1", f"{width}-{resolution}", module, torch.randn(1, 3, resolution, resolution))


def _with_inplace_activations(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, (nn.ReLU, nn.ReLU6, nn.Hardswish)):
            child.inplace = True
    return module


def _calibrated(module: nn.Module, x: torch.Tensor) -> nn.Module:
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    with torch.no_grad():
        module.train()(x)
    return module.eval().requires_grad_(False)
