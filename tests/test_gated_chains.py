# SPDX-License-Identifier: BSD-3-Clause
"""Networks with squeeze-and-excitation, SiLU and GELU run in chains, fused and frozen."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from chain_layers import rows_of
from fused_pairs import assert_trains_alike, pair
from models import BatchNormAct2d, ConvBNAct, HSigmoid, MobileNetV3Block, depthwise, pointwise
from randomize import randomized
from test_residual_chains import assert_chains, assert_one_image_and_threads_give_the_same_bits, plain
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep._ops import DEPTHWISE, DEPTHWISE_MAP, MEANS, PATCHES_OF_NCHW, PIXELS, SUM

GATED = plain(MEANS, PIXELS, PIXELS)


def test_mobilenet_v3(chain_calls):
    model = nn.Sequential(MobileNetV3Block(4), MobileNetV3Block(4, 5, excite=True), MobileNetV3Block(4))
    first, last = [(PIXELS, -1), (DEPTHWISE, 0)], [(PIXELS, -1), (DEPTHWISE, 7)]
    excited = [*plain(PIXELS, DEPTHWISE_MAP, MEANS, PIXELS), (PIXELS, 2)]
    assert_chains(model, torch.randn(2, 4, 14, 15), chain_calls, [[*first, *excited, *last]])


class TimmExcitation(nn.Module):
    """timm's: the mean as a method, an identity in the place of a BN, the gate called in the product."""

    def __init__(self, channels, gate=nn.Sigmoid):
        super().__init__()
        self.conv_reduce, self.bn, self.act1 = nn.Conv2d(channels, 3, 1), nn.Identity(), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(3, channels, 1), gate()

    def forward(self, x):
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.act1(self.bn(self.conv_reduce(x_se)))
        return x * self.gate(self.conv_expand(x_se))


class EfficientNetBlock(nn.Module):
    """timm's: BNs carry their activation."""

    def __init__(self, channels, out_channels, kernel, stride, gate=nn.Sigmoid):
        super().__init__()
        inner = 6 * channels
        self.conv_pw, self.bn1 = pointwise(channels, inner), BatchNormAct2d(inner, nn.SiLU)
        self.conv_dw = depthwise(inner, stride, kernel=kernel, padding=kernel // 2)
        self.bn2, self.se = BatchNormAct2d(inner, nn.SiLU), TimmExcitation(inner, gate)
        self.conv_pwl, self.bn3 = pointwise(inner, out_channels), BatchNormAct2d(out_channels, None)
        self.has_skip = stride == 1 and channels == out_channels

    def forward(self, x):
        y = self.bn3(self.conv_pwl(self.se(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x)))))))
        return y + x if self.has_skip else y


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 6, 3, 2, 1, bias=False), BatchNormAct2d(6, nn.SiLU)
        self.blocks = nn.Sequential(
            EfficientNetBlock(6, 7, 3, 2), EfficientNetBlock(7, 7, 5, 1), EfficientNetBlock(7, 9, 5, 2, HSigmoid)
        )
        self.conv_head, self.bn2 = pointwise(9, 20), BatchNormAct2d(20, nn.SiLU)
        self.classifier = nn.Linear(20, 5)

    def forward(self, x):
        x = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        return self.classifier(F.dropout(x.mean((2, 3)), 0.2, self.training))


def test_dilated_blocks_are_one_call(chain_calls):
    """What networks for segmentation have in the place of strides."""
    blocks = [EfficientNetBlock(6, 6, kernel, 1) for kernel in (3, 5, 7)]
    for dilation, block in enumerate(blocks, 2):
        half = block.conv_dw.kernel_size[0] // 2
        block.conv_dw.dilation, block.conv_dw.padding = (dilation, dilation), (half * dilation, half * dilation)
    block = [*plain(PIXELS, DEPTHWISE_MAP), *GATED[:-1]]
    layers = [layer for residual in (0, 5, 10) for layer in (*block, (PIXELS, residual))]
    assert_chains(nn.Sequential(*blocks), torch.randn(2, 6, 24, 21), chain_calls, [layers])


def test_efficientnet_is_one_call(chain_calls):
    block = [*plain(PIXELS, DEPTHWISE_MAP), *GATED]
    residual = [*block[:-1], (PIXELS, 6)]
    expected = [*plain(PATCHES_OF_NCHW), *block, *residual, *block, *plain(PIXELS, MEANS)]
    assert_chains(EfficientNet(), torch.randn(2, 3, 33, 36), chain_calls, [expected])


def test_the_report_names_layers_of_chains():
    model = EfficientNet()
    report = fusedsep.fusion_report(model)
    assert [site.name for site in report.chained] == [f"blocks.{i}.conv_dw" for i in range(3)]
    assert report.fused == report.skipped == []
    assert str(report).startswith(
        "0 of 3 depthwise convolutions fused, 3 more in chains in eval mode\n  chained  blocks.0"
    )
    fused = fusedsep.fuse(model)
    assert fusedsep.fusion_report(fused) == report
    assert fusedsep.fusion_report(fused.eval()) == report
    of_frozen = fusedsep.fusion_report(fusedsep.freeze(model.eval()))  # whose BNs are folded
    assert [site.name for site in of_frozen.chained] == [site.name for site in report.chained]
    assert of_frozen.fused == of_frozen.skipped == []
    mixed = nn.Sequential(MobileNetV3Block(4), MobileNetV3Block(4, 5, excite=True)).eval()
    for net in (mixed, fusedsep.fuse(mixed), fusedsep.freeze(mixed)):
        report = fusedsep.fusion_report(net)
        assert (len(report.fused), [site.name for site in report.chained], report.skipped) == (1, ["1.block.1.0"], [])


def test_one_image_and_threads_give_the_same_bits():
    assert_one_image_and_threads_give_the_same_bits(EfficientNet(), torch.randn(5, 3, 33, 36))


@pytest.mark.parametrize("make", [EfficientNet, lambda: MobileNetV3Block(3, 5, excite=True)])
def test_training_and_gradients_are_as_before(make, chain_calls):
    model, fused = pair(make())
    assert_trains_alike(model, fused, torch.randn(4, 3, 64, 65).double(), steps=1)
    model.eval(), fused.eval()
    x = torch.randn(2, 3, 33, 36).double()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
    torch.testing.assert_close(found, expected)
    assert not chain_calls


@pytest.mark.parametrize("name", ["conv_reduce", "conv_expand", "gate"])
def test_changes_and_hooks_are_noticed(name, chain_calls):
    model = randomized(EfficientNet()).eval()
    x = torch.randn(2, 3, 33, 36)
    for make in (fusedsep.fuse, fusedsep.freeze):
        chain_calls.clear()
        net = make(model)
        module = getattr(net.blocks[1].se, name)
        with torch.no_grad():
            before = net(x)
            for parameter in module.parameters():
                parameter.add_(0.5)
                changed = net(x)
                assert not torch.equal(changed, before)
                before = changed
            called = []
            module.register_forward_hook(lambda *arguments, called=called: called.append(1))
            calls = len(chain_calls)
            torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3)
        assert called == [1]
        assert len(chain_calls) == calls


class Excited(nn.Module):
    """A depthwise convolution, what ``excite`` makes of its map and of what gates give, and a 1x1 convolution."""

    def __init__(self, excite, **options):
        super().__init__()
        self.dw = ConvBNAct(12, 12, 5, 1, 12)
        squeezed = options.get("squeezed", 4)
        self.reduce = nn.Conv2d(12, squeezed, options.get("kernel", 1), padding=options.get("kernel", 1) // 2)
        self.expand = nn.Conv2d(squeezed, options.get("expanded", 12), 1)
        self.pw = ConvBNAct(12, 5, 1)
        self.excite = excite

    def forward(self, x):
        return self.pw(self.excite(self.dw(x), self.reduce, self.expand))


def gated(mean=lambda x: x.mean((2, 3), keepdim=True), act=F.relu, gate=torch.sigmoid, multiply=lambda x, g: x * g):
    return lambda x, reduce, expand: multiply(x, gate(expand(act(reduce(mean(x))))))


SPELLINGS = {
    "x * gate": gated(),
    "gate * x": gated(multiply=lambda x, g: g * x),
    "torch.mul": gated(multiply=torch.mul),
    "x.mul": gated(multiply=lambda x, g: x.mul(g)),
    "pool": gated(mean=lambda x: F.adaptive_avg_pool2d(x, 1)),
    "torch.mean": gated(mean=lambda x: torch.mean(x, dim=(-2, -1), keepdim=True)),
    "no activation": gated(act=lambda x: x),
    "silu": gated(act=F.silu),
    "swish": gated(act=lambda x: x * x.sigmoid()),
    "hardswish": gated(act=F.hardswish),
    "spelled-out hardswish": gated(act=lambda x: x * F.relu6(x + 3) / 6),
    "x.sigmoid": gated(gate=lambda x: x.sigmoid()),
    "hardsigmoid": gated(gate=F.hardsigmoid),
    "spelled-out hardsigmoid": gated(gate=lambda x: F.relu6(x + 3.0) / 6.0),
    "in place": gated(gate=lambda x: x.add_(3).clamp_(0, 6).div_(6)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, chain_calls):
    expected = [[*plain(DEPTHWISE_MAP), *GATED]]
    assert_chains(Excited(SPELLINGS[name]), torch.randn(2, 12, 14, 15), chain_calls, expected)


def other_map(x, reduce, expand):
    return F.relu(x) * torch.sigmoid(expand(reduce(x.mean((2, 3), keepdim=True))))


def read_twice(x, reduce, expand):
    gate = torch.sigmoid(expand(reduce(x.mean((2, 3), keepdim=True))))
    return x * gate + gate


def shared_gate(x, reduce, expand):
    squeezed = reduce(x.mean((2, 3), keepdim=True))
    return x * torch.sigmoid(expand(squeezed)) * squeezed.mean()


OTHERS = {
    "of another map": Excited(other_map),
    "a gate with two readers": Excited(read_twice),
    "a squeezed map with two readers": Excited(shared_gate),
    "sum": Excited(gated(multiply=lambda x, g: x + g)),
    "in place": Excited(gated(multiply=lambda x, g: x.mul_(g))),
    "tanh": Excited(gated(gate=torch.tanh)),
    "an approximation of GELU": Excited(gated(act=lambda x: F.gelu(x, approximate="tanh"))),
    "max": Excited(gated(mean=lambda x: x.amax((2, 3), keepdim=True))),
    "2x2": Excited(gated(mean=lambda x: F.adaptive_avg_pool2d(x, 2)[:, :, :1, :1])),
    "a 3x3 convolution": Excited(gated(), kernel=3),
    "one factor for all channels": Excited(gated(), expanded=1),
    "the factors as a map": Excited(gated(mean=lambda x: x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_squeeze_and_excitation(name, chain_calls):
    model = randomized(OTHERS[name]).eval()
    x = torch.randn(2, 12, 14, 15)
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad():
            assert_as_close_to_float64(net, model, x)
    assert not any(MEANS in rows for rows in rows_of(chain_calls))


@pytest.mark.parametrize("behind", [lambda: nn.Conv2d(12, 5, 3), lambda: nn.Conv2d(12, 5, 1, 2)])
def test_what_follows_may_be_another_layer(behind, chain_calls):
    model = Excited(gated())
    model.pw = behind()
    last = PATCHES_OF_NCHW if model.pw.kernel_size == (3, 3) else PIXELS  # which stands for both of them
    expected = plain(DEPTHWISE_MAP, MEANS, PIXELS, SUM, last)
    assert_chains(model, torch.randn(2, 12, 14, 15), chain_calls, [expected])


SMOOTH = {
    "module": nn.SiLU,
    "in place": lambda: nn.SiLU(inplace=True),
    "swish": lambda: Swish(),
    "GELU": nn.GELU,
    "functional GELU": lambda: Gelu(),
}


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="none")


@pytest.mark.parametrize("name", SMOOTH)
def test_silu_and_gelu(name, chain_calls):
    act = SMOOTH[name]
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), act()),
        *(depthwise(8), nn.BatchNorm2d(8), act(), pointwise(8, 9), nn.BatchNorm2d(9), act()),
        *(depthwise(9), nn.BatchNorm2d(9), nn.ReLU(), pointwise(9, 4), nn.BatchNorm2d(4), act()),
    )
    # The last one is a site, whose kernel applies another activation than SiLU to its product: it is a pass of its own.
    expected = [plain(PATCHES_OF_NCHW, DEPTHWISE_MAP, PIXELS, DEPTHWISE)]
    assert_chains(model, torch.randn(2, 3, 14, 15), chain_calls, expected)


#: As in torchvision/ops/stochastic_depth.py: one call for FX.
STOCHASTIC_DEPTH = """
import torch

def stochastic_depth(input, p, mode, training=True):
    if not training or p == 0.0:
        return input
    return input * input.new_empty([input.shape[0], 1, 1, 1]).bernoulli_(1 - p).div_(1 - p)

torch.fx.wrap("stochastic_depth")

class StochasticDepth(torch.nn.Module):
    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input):
        return stochastic_depth(input, self.p, self.mode, self.training)
"""


def test_stochastic_depth_of_torchvision(chain_calls):
    module = types.ModuleType("torchvision.ops.stochastic_depth")
    exec(STOCHASTIC_DEPTH, vars(module))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand, self.dw, self.pw = ConvBNAct(4, 12, 1), ConvBNAct(12, 12, 5, 1, 12), pointwise(12, 4)
            self.stochastic_depth = module.StochasticDepth(0.2, "row")

        def forward(self, x):
            return x + self.stochastic_depth(self.pw(self.dw(self.expand(x))))

    assert_chains(Block(), torch.randn(2, 4, 9, 9), chain_calls, [[*plain(PIXELS, DEPTHWISE_MAP), (PIXELS, 0)]])
