# SPDX-License-Identifier: BSD-3-Clause
"""A module to time, in each of the variants that are compared, every one checked before it is timed."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import branches
import convnext
import inverted_residuals
import mixers
import torch
import torch.nn as nn
from shapes import Shape
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fusedsep
from fusedsep import reference
from fusedsep.cli._measure import compare
from fusedsep.cli._peers import Call, make_call

Answer = dict[str, torch.Tensor]


def _fold(module: nn.Module) -> nn.Module:
    """BN folded into the convolution in front of it: what torch itself offers for deployment. In place."""
    for parent in list(module.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent.register_module(name, fuse_conv_bn_eval(conv, norm))
                parent.register_module(norm_name, nn.Identity())
    return module


def compiled(module: nn.Module, **options: bool) -> nn.Module:
    """``module`` through inductor with ``options``. In place."""
    # All subjects share the code of one forward, and Dynamo gives up on code that was compiled more than a few times.
    torch.compiler.reset()
    module.compile(fullgraph=True, options=options)
    return module


Engines = Mapping[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]]
#: How each engine is made from the unfused module in eval mode; it may be changed in place.
ENGINES: Engines = {
    "eager": lambda module: module,
    "folded": _fold,
    "compiled": functools.partial(compiled, freezing=True),
    "fused": fusedsep.fuse,
    "frozen": fusedsep.freeze,
}


class InEngine:
    """A module in another engine, which is built for the first input and runs on no other.

    Raises:
        fusedsep.cli._peers.Unavailable: in the first call, if it is not installed or does not take the module.
    """

    def __init__(self, module: nn.Module, *, peer: str) -> None:
        self._module, self._peer = module, peer
        self._call: Call | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._call is None:
            self._call, _ = make_call(self._peer, self._module, x)
        return self._call()


PEER_ENGINES: Engines = {
    "eager": ENGINES["eager"],
    "compiled": ENGINES["compiled"],
    "onnxruntime": functools.partial(InEngine, peer="onnxruntime"),
    "openvino": functools.partial(InEngine, peer="openvino"),
    "fused": ENGINES["fused"],
    "frozen": ENGINES["frozen"],
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


#: Those that choose their own format inside get the input in one alone.
_ONE_FORMAT = {"compiled": "channels_last", "onnxruntime": "NCHW", "openvino": "NCHW"}


class Variant(NamedTuple):
    engine: str
    memory_format: str  # of the input, and so of every map

    def __str__(self) -> str:
        return f"{self.engine} {self.memory_format}"


def variants(engines: Engines, with_compile: bool = False) -> list[Variant]:
    """Every engine in both formats, or in the one that it takes."""
    return [
        Variant(engine, memory_format)
        for engine in engines
        for memory_format in FORMATS
        if _ONE_FORMAT.get(engine, memory_format) == memory_format and (engine != "compiled" or with_compile)
    ]


class Subject:
    """An unfused module, an input for it, and the answer it must give: here in eval mode, to inference.

    Args:
        network: what the module is, or is a part of.
        name: which part; unique within the network.
        module: takes the first of ``inputs``. Changed in place: its BNs get the statistics of that input, so that
            numbers keep the size that they have in a trained network, and its activations become in-place ones, as
            published networks have them.
        inputs: what :meth:`_work` takes besides the module. Maps are ``Tensor[N, C, H, W]``, float32.
    """

    engines = ENGINES
    is_all_sites = True  # every depthwise convolution belongs to a site
    inference = True  # to be called in torch.inference_mode()
    gflop_per_mult_add = 2e-9
    order = math.inf  # of the norm that errors are measured by

    def __init__(self, network: str, name: str, module: nn.Module, *inputs: torch.Tensor) -> None:
        self.network, self.name, self.module, self.inputs = network, name, module, inputs
        for child in module.modules():
            if isinstance(child, (nn.ReLU, nn.ReLU6, nn.Hardswish)):
                child.inplace = True
            elif isinstance(child, nn.BatchNorm2d):
                nn.init.uniform_(child.weight, 0.5, 1.5)
                nn.init.uniform_(child.bias, -0.5, 0.5)
        self._prepare()
        self.gflop = self.gflop_per_mult_add * fusedsep.complexity(module, tuple(inputs[0].shape)).mult_adds
        report = fusedsep.fusion_report(module)
        if self.is_all_sites and (report.chained or report.skipped or not report.fused):
            raise RuntimeError(f"{network} {name} would be timed in part unfused:\n{report}")
        self._exact = self._eager("NCHW", torch.float64)
        self._torchs = {memory_format: self._eager(memory_format) for memory_format in FORMATS}

    def call(self, variant: Variant) -> Callable[[], torch.Tensor]:
        """A call of the module as ``variant``, which gave the right answer once. It returns the output.

        Raises:
            RuntimeError: the norm of a part's error against float64 exceeds 3 times that of eager float32 in the same
                format by more than 4 roundings of the part's own norm (:func:`fusedsep.cli._measure.compare`).
        """
        module, *inputs = self._operands(variant)
        work = self._work(module, *inputs)
        answer = self._answer(work, module, *inputs)
        for part, exact in self._exact.items():
            accuracy = compare(answer[part], self._torchs[variant.memory_format][part], exact, self.order)
            if not accuracy.ok:
                raise RuntimeError(
                    f"{variant} gives a wrong {part} for {self.network} {self.name}: error {accuracy.error:.2e} "
                    f"against float64, allowed {accuracy.allowed:.2e}"
                )
        return work

    def _prepare(self) -> None:
        """Bring BNs, mode and gradients of the module into the state in which it is measured."""
        for child in self.module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.momentum = 1.0
        with torch.no_grad():
            self.module.train()(self.inputs[0])
        self.module.eval().requires_grad_(False)

    def _work(self, module: nn.Module, *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What is timed."""
        (x,) = inputs
        return lambda: module(x)

    def _answer(self, work: Callable[[], torch.Tensor], module: nn.Module, *inputs: torch.Tensor) -> Answer:
        """All that the first call of ``work`` computes, by name."""
        with torch.inference_mode():
            return {"output": work()}

    def _operands(self, variant: Variant, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """The module as ``variant``, and the inputs in its format."""
        memory_format = FORMATS[variant.memory_format]
        module = copy.deepcopy(self.module).to(dtype=dtype, memory_format=memory_format)
        maps = (x.to(dtype, memory_format=memory_format) if x.dim() == 4 else x for x in self.inputs)
        return self.engines[variant.engine](module), *maps

    def _eager(self, memory_format: str, dtype: torch.dtype = torch.float32) -> Answer:
        module, *inputs = self._operands(Variant("eager", memory_format), dtype)
        return self._answer(self._work(module, *inputs), module, *inputs)


class PeerSubject(Subject):
    """The same for the comparison with other engines."""

    engines = PEER_ENGINES


class OtherNetwork(Subject):
    """A network with depthwise convolutions of other kinds, which run in chains with the sites."""

    is_all_sites = False


def block(shape: Shape, batch: int = 1) -> Subject:
    return Subject(shape.network, shape.name, *block_and_input(shape, batch))


def network(width: float, resolution: int, batch: int = 1) -> Subject:
    return Subject("MobileNetV1", f"{width}-{resolution}", *network_and_input(width, resolution, batch))


OTHER_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **inverted_residuals.NETWORKS,
    "ShuffleNetV2": branches.ShuffleNetV2,
    "GhostNet": branches.GhostNet,
    "Xception": branches.Xception,
    "MobileOne-S1": branches.MobileOne,
    "ConvNeXt-Atto": convnext.ConvNeXt,
    "StarNet-S1": mixers.StarNet,
    "FastViT-T8": mixers.FastViT,
}


def other_network(name: str, resolution: int, batch: int = 1) -> Subject:
    torch.manual_seed(0)
    module = OTHER_NETWORKS[name]()
    return OtherNetwork(name, f"{resolution}x{resolution}", module, torch.randn(batch, 3, resolution, resolution))


def peer_network(width: float, resolution: int, batch: int) -> PeerSubject:
    name = f"{width}-{resolution}, batch {batch}"
    return PeerSubject("MobileNetV1", name, *network_and_input(width, resolution, batch))


def block_and_input(shape: Shape, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """From one seed, so that the numbers are the same in every run."""
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
    return module, torch.randn(batch, shape.in_channels, shape.size, shape.size)


def network_and_input(width: float, resolution: int, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """From one seed, as above."""
    torch.manual_seed(0)
    return reference.MobileNetV1(width_multiplier=width), torch.randn(batch, 3, resolution, resolution)
