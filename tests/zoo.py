# SPDX-License-Identifier: BSD-3-Clause
"""The networks that ``fuse`` and ``freeze`` are tested on, and how their outputs are compared.

Each entry of :data:`FUSABLE` gives a network and the number of its sites that must be found; each of
:data:`LOOK_ALIKES` one that has depthwise convolutions but no site, and words of the reason.
"""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from article import FullBlock, ShortBlock
from convolutions import NOT_PADDING_ITSELF, PADDING_ITSELF, SameConv
from models import (
    BatchNormAct2d,
    BNReLU,
    Branching,
    Detector,
    DropPath,
    ExtremeInception,
    Flat,
    FunctionalBlock,
    MobileNetV2,
    MobileNetV3Block,
    PaddedBlock,
    PadsByFunction,
    SameByMax,
    SharedConvolution,
    ShuffleUnit,
    SpelledOutHardswish,
    TimmBlock,
    WithDefaults,
    XceptionConv,
    chain,
    depthwise,
    pointwise,
)
from randomize import randomized

#: name -> (network, input channels, number of sites)
FUSABLE = {
    "article, short listing": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), ShortBlock(4, 6), ShortBlock(6, 8, 2)), 3, 2),
    "article, full listing": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), FullBlock(4, 6), FullBlock(6, 8, 2)), 3, 2),
    "MobileNetV2": lambda: (MobileNetV2(), 3, 3),
    "MobileNetV3": lambda: (nn.Sequential(MobileNetV3Block(4), MobileNetV3Block(4, activation=nn.ReLU)), 4, 2),
    "MobileNetV3, spelled out": lambda: (SpelledOutHardswish(), 6, 1),
    "timm": lambda: (nn.Sequential(TimmBlock(4, 6, 2), TimmBlock(6, 6)), 4, 2),
    "timm, BN with hardswish": lambda: (TimmBlock(4, 4, activation=nn.Hardswish), 4, 1),
    "timm, BN without activation": lambda: (TimmBlock(4, 4, activation=None), 4, 1),
    "BN subclass calling super": lambda: (nn.Sequential(depthwise(4), BNReLU(4), pointwise(4, 5), BNReLU(5)), 4, 1),
    "ShuffleNetV2": lambda: (nn.Sequential(ShuffleUnit(8), ShuffleUnit(8)), 8, 2),
    "detector": lambda: (Detector(), 6, 5),
    "F.pad": lambda: (PaddedBlock(4, None), 4, 1),
    "nn.ZeroPad2d": lambda: (PaddedBlock(4, nn.ZeroPad2d((0, 1, 0, 1))), 4, 1),
    "nn.ConstantPad2d": lambda: (PaddedBlock(4, nn.ConstantPad2d((2, 1, 0, 3), 0.0)), 4, 1),
    "two pads": lambda: (
        PaddedBlock(4, nn.Sequential(nn.ZeroPad2d(1), nn.Identity(), nn.ZeroPad2d((0, 1, 1, 0)))), 4, 1
    ),
    "negative pad": lambda: (PaddedBlock(4, nn.ZeroPad2d((-1, 1, 0, 1))), 4, 1),
    "pad with ones": lambda: (PaddedBlock(4, nn.ConstantPad2d(1, 1.0)), 4, 1),
    "reflecting pad": lambda: (PaddedBlock(4, nn.ReflectionPad2d(1)), 4, 1),
    "pad by max": lambda: (nn.Sequential(PaddedBlock(4, SameByMax()), PaddedBlock(4, SameByMax())), 4, 2),
    "pad by a function": lambda: (nn.Sequential(PadsByFunction(4), PadsByFunction(4)), 4, 2),
    "control flow in a submodule": lambda: (nn.Sequential(nn.ReLU(), Branching(chain(nn.ReLU()))), 4, 1),
    "control flow in the root": lambda: (Branching(nn.Sequential(ShortBlock(4, 4), ShortBlock(4, 6))), 4, 2),
    "Xception": lambda: (
        nn.Sequential(
            nn.ReLU(), XceptionConv(4, 5), nn.BatchNorm2d(5), nn.ReLU(), XceptionConv(5, 6), nn.BatchNorm2d(6)
        ),
        4,
        2,
    ),
    "extreme Inception": lambda: (ExtremeInception(), 4, 1),
    "defaults": lambda: (WithDefaults(), 3, 1),
    "shared convolution": lambda: (SharedConvolution(), 4, 1),
    "dropout and identity": lambda: (
        nn.Sequential(
            depthwise(4), nn.Dropout2d(0.5), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(True), DropPath(), nn.Dropout(),
            pointwise(4, 6), nn.Identity(), nn.BatchNorm2d(6), nn.Dropout(0.1), nn.ReLU6(True),
        ),
        4,
        1,
    ),
    "LeakyReLU behind": lambda: (nn.Sequential(chain(nn.ReLU()), nn.LeakyReLU(0.3)), 4, 1),
    "SiLU behind": lambda: (nn.Sequential(*chain(nn.ReLU()), nn.SiLU()), 4, 1),
    "dilation": lambda: (nn.Sequential(depthwise(4, padding=2, dilation=2), nn.ReLU(), pointwise(4, 3)), 4, 1),
    "stride 2, no padding": lambda: (nn.Sequential(depthwise(4, 2, padding=0), nn.ReLU(), pointwise(4, 3)), 4, 1),
    "padding='same'": lambda: (nn.Sequential(depthwise(4, padding="same"), nn.ReLU(), pointwise(4, 3)), 4, 1),
    **{
        f"convolution that pads itself, {name}": lambda make=make: (PaddedBlock(4, nn.Identity(), make(4)), 4, 1)
        for name, make in PADDING_ITSELF.items()
    },
    "padding in front of one that pads itself": lambda: (
        PaddedBlock(4, nn.ZeroPad2d((0, 1, 2, 0)), PADDING_ITSELF["two sides"](4)), 4, 1
    ),
    "padding in front of SAME": lambda: (PaddedBlock(4, nn.ZeroPad2d(1), PADDING_ITSELF["SAME"](4)), 4, 1),
    "one channel": lambda: (nn.Sequential(depthwise(1), nn.ReLU(), pointwise(1, 3)), 1, 1),
    **{
        f"functional {name}": lambda activation=activation: (FunctionalBlock(activation), 5, 1)
        for name, activation in {
            "F.relu": F.relu,
            "F.relu, in place": lambda x: F.relu(x, inplace=True),
            "torch.relu": torch.relu,
            "torch.relu_": torch.relu_,
            "x.relu": lambda x: x.relu(),
            "x.relu_": lambda x: x.relu_(),
            "F.relu6": F.relu6,
            "F.hardswish": F.hardswish,
            "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
            "torch.clamp": lambda x: torch.clamp(x, 0, 6),
            "clamp(min=0)": lambda x: x.clamp(min=0),
            "clamp_min": lambda x: x.clamp_min(0),
            "nn.Hardtanh": nn.Hardtanh(0.0, 6.0),
            "hardsigmoid": lambda x: x * F.hardsigmoid(x),
        }.items()
    },
}  # fmt: skip

#: name -> (network, input channels, words of the reason)
LOOK_ALIKES = {
    "LeakyReLU": lambda: (chain(nn.LeakyReLU(0.1)), 4, r"LeakyReLU \(2\) between"),
    "SiLU": lambda: (chain(nn.SiLU()), 4, "SiLU"),
    "F.leaky_relu": lambda: (Flat(depthwise(4), F.leaky_relu, pointwise(4, 6)), 4, "leaky_relu between"),
    "hardtanh of other bounds": lambda: (chain(nn.Hardtanh(-1, 6)), 4, "Hardtanh"),
    "clamp at another bound": lambda: (Flat(depthwise(4), lambda x: x.clamp(0, 5), pointwise(4, 6)), 4, "clamp"),
    "two activations": lambda: (chain(nn.ReLU(), nn.ReLU6()), 4, "ReLU6"),
    "BN after the activation": lambda: (chain(nn.ReLU(), nn.BatchNorm2d(4)), 4, "BatchNorm2d"),
    "squeeze-excitation": lambda: (MobileNetV3Block(4, excite=True), 4, "several operations read"),
    "5x5": lambda: (MobileNetV3Block(4, 5), 4, r"kernel size \(5, 5\)"),
    "grouped 1x1": lambda: (Flat(depthwise(4), F.relu, pointwise(4, 6, groups=2)), 4, "groups=2"),
    "strided 1x1": lambda: (Flat(depthwise(4), F.relu, pointwise(4, 6, stride=2)), 4, r"stride \(2, 2\)"),
    "padded 1x1": lambda: (Flat(depthwise(4), F.relu, pointwise(4, 6, padding=1)), 4, "padding"),
    "3x3 behind": lambda: (Flat(depthwise(4), F.relu, nn.Conv2d(4, 6, 3)), 4, r"kernel size \(3, 3\)"),
    "channel multiplier": lambda: (
        Flat(nn.Conv2d(4, 8, 3, groups=4), F.relu, pointwise(8, 6)), 4, "channel multiplier 2"
    ),
    "padding mode": lambda: (Flat(depthwise(4, padding_mode="reflect"), F.relu, pointwise(4, 6)), 4, "padding mode"),
    "uneven stride": lambda: (Flat(depthwise(4, (1, 2)), F.relu, pointwise(4, 6)), 4, r"stride \(1, 2\)"),
    "stride 3": lambda: (Flat(depthwise(4, 3), F.relu, pointwise(4, 6)), 4, r"stride \(3, 3\)"),
    "hardswish of a changed map": lambda: (
        Flat(depthwise(4), lambda x: x * F.relu6(x.add_(3)) / 6, pointwise(4, 6)), 4, "several operations read"
    ),
    "hardsigmoid in place": lambda: (
        Flat(depthwise(4), lambda x: x * F.hardsigmoid(x, inplace=True), pointwise(4, 6)), 4, "several operations read"
    ),
    "second reader": lambda: (
        Flat(depthwise(4), F.relu, pointwise(4, 6), tap=True), 4, "several operations read .*mean"
    ),
    **{
        f"convolution that {name}": lambda make=make, reason=reason: (
            Flat(make(4), F.relu, pointwise(4, 6)), 4, f"has a forward of its own{reason}"
        )
        for name, (make, reason) in NOT_PADDING_ITSELF.items()
    },
    "1x1 convolution with a forward of its own": lambda: (
        Flat(depthwise(4), F.relu, SameConv(4, 6, 1)), 4, "is not pointwise: SameConv has a forward of its own"
    ),
    "BN with LeakyReLU inside": lambda: (
        nn.Sequential(depthwise(4), BatchNormAct2d(4, nn.LeakyReLU), pointwise(4, 6)), 4, "applies LeakyReLU"
    ),
    "BN of the batch with ReLU inside": lambda: (
        nn.Sequential(depthwise(4), BNReLU(4, track_running_stats=False), pointwise(4, 6)),
        4,
        "has no running statistics",
    ),
    "no pointwise": lambda: (nn.Sequential(depthwise(4), nn.BatchNorm2d(4), nn.ReLU()), 4, "no pointwise .* returned"),
}  # fmt: skip


def build(entry):
    """The network of an entry with random BNs in eval mode, a batch for it, and what the entry expects."""
    torch.manual_seed(0)
    model, channels, expected = entry()
    x = torch.randn(2, channels, 13, 14, generator=torch.Generator().manual_seed(1))
    return randomized_with_carried(model).eval(), x, expected


def randomized_with_carried(model):
    """:func:`randomized`, also where a BN has no running statistics."""
    fixed = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is None]
    for bn in fixed:
        bn.running_mean, bn.running_var = torch.zeros(bn.num_features), torch.ones(bn.num_features)
    randomized(model)
    for bn in fixed:
        bn.running_mean = bn.running_var = None
    return model


def tensors_of(output):
    return [output] if isinstance(output, torch.Tensor) else [t for part in output for t in tensors_of(part)]


def assert_as_close_to_float64(fused, plain, x, **kwargs):
    """The error of ``fused`` against float64 is at most three times that of ``plain``, up to rounding."""
    exact = tensors_of(copy.deepcopy(plain).double()(x.double(), **kwargs))
    for ours, theirs, truth in zip(tensors_of(fused(x, **kwargs)), tensors_of(plain(x, **kwargs)), exact, strict=True):
        assert ours.shape == truth.shape
        assert ours.dtype == theirs.dtype
        scale = truth.abs().max().clamp(min=1)
        error, reference = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 3 * reference + 4 * torch.finfo(x.dtype).eps * scale
