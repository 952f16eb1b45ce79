# SPDX-License-Identifier: BSD-3-Clause
"""Residual networks run in chains, fused and frozen; what the operator has no kernel for ends a chain."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import (
    BatchNormAct2d,
    ConvBNAct,
    InvertedResidual,
    MobileNetV2,
    TimmBlock,
    depthwise,
    pointwise,
)
from randomize import randomized
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, DEPTHWISE_MAP, MEANS, PATCHES, PATCHES_OF_NCHW, PIXELS


def layers_of(calls):
    """Rows and residual of each layer of each call; images in either memory format are the same."""
    calls = [_ops.layers_of(text) for _, _, text, *_ in calls]
    return [[(PATCHES_OF_NCHW if n.rows == PATCHES else n.rows, n.residual) for n in layers] for layers in calls]


def plain(*rows):
    return [(row, -1) for row in rows]


def assert_chains(model, x, chain_calls, expected):
    model = randomized(model).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            chain_calls.clear()
            with torch.no_grad():
                y = net(x.contiguous(memory_format=memory_format))
                assert_as_close_to_float64(lambda x, y=y: y, model, x)
            assert layers_of(chain_calls) == expected


def test_mobilenet_v2_is_one_call(chain_calls):
    expected = [
        *plain(PATCHES_OF_NCHW, DEPTHWISE, PIXELS, DEPTHWISE, PIXELS),
        (DEPTHWISE, 4),
        *plain(PIXELS, MEANS),
    ]
    assert_chains(MobileNetV2(), torch.randn(2, 3, 33, 36), chain_calls, [expected])


def assert_one_image_and_threads_give_the_same_bits(model, x):
    model = randomized(model).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad():
            torch.set_num_threads(1)
            expected = torch.cat([net(image) for image in x.split(1)])
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(net(x), expected)


def test_one_image_and_threads_give_the_same_bits():
    assert_one_image_and_threads_give_the_same_bits(MobileNetV2(), torch.randn(5, 3, 33, 36))


class TimmMobileNet(nn.Module):
    """timm's stem and blocks: BNs carry their activation; `x = drop_path(x) + shortcut`."""

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), BatchNormAct2d(8)
        self.blocks = nn.Sequential(TimmBlock(8, 12, 2), TimmBlock(12, 12), TimmBlock(12, 16))
        self.conv_head, self.bn2 = pointwise(16, 40), BatchNormAct2d(40)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.drop_rate = 0.2
        self.classifier = nn.Linear(40, 5)

    def forward(self, x):
        x = self.blocks(self.bn1(self.conv_stem(x)))
        x = self.global_pool(self.bn2(self.conv_head(x)))
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return self.classifier(x)


def test_timm(chain_calls):
    expected = [*plain(PATCHES_OF_NCHW, DEPTHWISE), (DEPTHWISE, 2), *plain(DEPTHWISE, PIXELS, MEANS)]
    assert_chains(TimmMobileNet(), torch.randn(2, 3, 32, 35), chain_calls, [expected])


class EfficientNetLite(nn.Module):
    """A block with a 5x5 kernel between those of 3x3."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBNAct(3, 8, 3, 2)
        self.first = nn.Sequential(InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 8, 1, 6))
        self.expand, self.dw = ConvBNAct(8, 24, 1), ConvBNAct(24, 24, 5, 2, 24)
        self.project = ConvBNAct(24, 12, 1, activation=None)
        self.second = nn.Sequential(InvertedResidual(12, 12, 1, 6), ConvBNAct(12, 30, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(30, 5))

    def forward(self, x):
        x = self.project(self.dw(self.expand(self.first(self.stem(x)))))
        return self.classifier(self.second(x).mean((2, 3)))


def test_efficientnet_lite(chain_calls):
    before = [(PATCHES_OF_NCHW, -1), (DEPTHWISE, 1), (PIXELS, -1), (DEPTHWISE, 2)]
    between = plain(PIXELS, DEPTHWISE_MAP, PIXELS)
    after = [(PIXELS, -1), (DEPTHWISE, 7), *plain(PIXELS, MEANS)]
    assert_chains(EfficientNetLite(), torch.randn(2, 3, 32, 35), chain_calls, [[*before, *between, *after]])


class TwoOutputs(nn.Module):
    """A detector's backbone: the map in the middle is also an output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(ConvBNAct(3, 8, 3, 2), InvertedResidual(8, 8, 1, 6))
        self.second = nn.Sequential(InvertedResidual(8, 12, 2, 6), InvertedResidual(12, 12, 1, 6))

    def forward(self, x):
        middle = self.first(x)
        return middle, self.second(middle)


def test_a_map_that_is_an_output_ends_a_chain(chain_calls):
    first = [(PATCHES_OF_NCHW, -1), (PIXELS, -1), (DEPTHWISE, 1)]
    second = [*plain(PIXELS, DEPTHWISE, PIXELS), (DEPTHWISE, 2)]
    assert_chains(TwoOutputs(), torch.randn(2, 3, 32, 35), chain_calls, [first, second])


DEPTHWISE_ALONE = {
    "5x5": lambda: depthwise(12, kernel=5, padding=2),
    "7x7, stride 2, uneven padding": lambda: depthwise(12, 2, kernel=7, padding=(3, 1)),
    "3x3 with a bias": lambda: depthwise(12, bias=True),
    "SAME": lambda: depthwise(12, kernel=5, padding="same"),
}


@pytest.mark.parametrize("name", DEPTHWISE_ALONE)
def test_a_chain_without_a_site(name, chain_calls):
    """A depthwise convolution that another kind of layer follows, behind a 1x1 convolution."""
    model = nn.Sequential(ConvBNAct(4, 12, 1), DEPTHWISE_ALONE[name](), nn.BatchNorm2d(12), nn.Hardswish(), nn.GELU())
    assert_chains(model, torch.randn(2, 4, 14, 15), chain_calls, [plain(PIXELS, DEPTHWISE_MAP)])


NO_KERNEL = {
    "channel multiplier": lambda: nn.Conv2d(12, 36, 5, padding=2, groups=12),
    "groups": lambda: nn.Conv2d(12, 12, 5, padding=2, groups=6),
    "13x13": lambda: depthwise(12, kernel=13, padding=6),
    "even": lambda: depthwise(12, kernel=4, padding=2),
    "oblong": lambda: depthwise(12, kernel=(3, 5), padding=(1, 2)),
    "stride": lambda: depthwise(12, 3, kernel=5, padding=2),
    "dilation": lambda: depthwise(12, kernel=5, padding=(4, 2), dilation=(2, 1)),
    "padding mode": lambda: depthwise(12, kernel=5, padding=2, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", NO_KERNEL)
def test_a_depthwise_convolution_without_a_kernel_is_left_alone(name, chain_calls):
    model = nn.Sequential(ConvBNAct(4, 12, 1), NO_KERNEL[name](), nn.GELU())
    expected = [] if name == "groups" else [plain(PIXELS)]  # nothing in it is depthwise then
    assert_chains(model, torch.randn(2, 4, 14, 15), chain_calls, expected)


class Shortcut(nn.Module):
    """A residual block whose addition is written in another way."""

    def __init__(self, add):
        super().__init__()
        self.stem = ConvBNAct(3, 8, 3, 2)
        self.identity, self.dropout = nn.Identity(), nn.Dropout(0.5)
        self.expand = ConvBNAct(8, 24, 1)
        self.dw, self.act, self.pw = depthwise(24), nn.ReLU(), pointwise(24, 8)
        self.last = ConvBNAct(8, 5, 1)
        self.add = add

    def forward(self, x):
        x = self.stem(x)
        shortcut = self.identity(x)
        y = self.dropout(self.pw(self.act(self.dw(self.expand(x)))))
        return self.last(self.add(shortcut, y))


def add_to_the_shortcut(a, b):
    a += b
    return a


ADDITIONS = {
    "a + b": lambda a, b: a + b,
    "b + a": lambda a, b: b + a,
    "torch.add": torch.add,
    "a.add": lambda a, b: a.add(b),
    "a += b": add_to_the_shortcut,
    "b += a": lambda a, b: add_to_the_shortcut(b, a),
    "a.add_": lambda a, b: a.add_(b),
    "b.add_": lambda a, b: b.add_(a),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions(name, chain_calls):
    expected = [*plain(PATCHES_OF_NCHW, PIXELS), (DEPTHWISE, 1), (PIXELS, -1)]
    assert_chains(Shortcut(ADDITIONS[name]), torch.randn(2, 3, 16, 17), chain_calls, [expected])


OTHERS = {
    "scaled": lambda a, b: torch.add(a, b, alpha=2),
    "subtracted": lambda a, b: a - b,
    "of a number": lambda a, b: b + 1,
    "twice": lambda a, b: a + b + a,
    "with itself": lambda a, b: b + b,
    "of the activated": lambda a, b: a.relu_() + b,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_addition_of_two_maps(name, chain_calls):
    model = randomized(Shortcut(OTHERS[name])).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad():
            assert_as_close_to_float64(net, model, torch.randn(2, 3, 16, 17))


class ChangedInput(nn.Module):
    """Its block adds what it was given, after somebody has changed that in place."""

    def __init__(self, change):
        super().__init__()
        self.block = InvertedResidual(4, 4, 1, 6)
        self.change = change

    def forward(self, x):
        x = x * 1
        y = self.block.conv(x)
        self.change(x)
        return x + y


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x.view(-1).mul_(2)])
def test_an_input_that_changes_meanwhile(change):
    model = randomized(ChangedInput(change)).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad():
            assert_as_close_to_float64(net, model, torch.randn(2, 4, 9, 9))


class AddsToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = InvertedResidual(4, 4, 1, 6)

    def forward(self, x):
        x += self.block.conv(x)
        return x


def test_an_input_that_the_block_changes_is_changed():
    model = randomized(AddsToItsInput()).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        x = torch.randn(2, 4, 9, 9)
        with torch.no_grad():
            expected = model(x.clone())
            y = net(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert y is x


class Broadcasting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(depthwise(4), nn.ReLU(), pointwise(4, 4))
        self.second = nn.Sequential(depthwise(4, 2, padding=0), nn.ReLU(), pointwise(4, 4))

    def forward(self, x):
        x = self.first(x)
        return self.second(x) + x


def test_maps_of_two_shapes_are_added_as_torch_does(chain_calls):
    model = randomized(Broadcasting()).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad():
            assert_as_close_to_float64(net, model, torch.randn(2, 4, 3, 3))
            with pytest.raises(RuntimeError, match="must match"):
                net(torch.randn(2, 4, 9, 9))
    assert not chain_calls


def test_changes_of_an_expansion_are_noticed(chain_calls):
    model = randomized(MobileNetV2()).eval()
    x = torch.randn(2, 3, 32, 32)
    for make in (fusedsep.fuse, fusedsep.freeze):
        net = make(model)
        expand = net.features[2].conv[0]
        with torch.no_grad():
            before = net(x)
            expand[0].weight.add_(0.25)
            changed = net(x)
            assert not torch.allclose(changed, before, rtol=1e-3)
            (expand[1].running_mean if make is fusedsep.fuse else expand[0].bias).add_(0.5)
            assert not torch.allclose(net(x), changed, rtol=1e-3)
            again = net(x)
            assert len(chain_calls) == 4
            called = []
            expand.register_forward_hook(lambda *arguments, called=called: called.append(1))
            torch.testing.assert_close(net(x), again, rtol=1e-3, atol=1e-3)
        assert called == [1]
        assert len(chain_calls) == 4
        chain_calls.clear()


def test_gradients_go_through_the_modules(chain_calls):
    model = randomized(MobileNetV2()).eval().double()
    fused, x = fusedsep.fuse(model), torch.randn(2, 3, 32, 32, dtype=torch.double)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
    torch.testing.assert_close(found, expected)
    assert not chain_calls
