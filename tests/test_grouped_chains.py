# SPDX-License-Identifier: BSD-3-Clause
"""Grouped convolutions, convolutions of some channels each with one BN behind all, and large kernels run in chains.

So do depthwise convolutions with two filters for each channel.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from convolutions import SameConv
from models import BatchNormAct2d, ConvBNAct, depthwise, pointwise
from randomize import randomized
from test_branching_chains import assert_outputs
from test_residual_chains import assert_chains, assert_one_image_and_threads_give_the_same_bits, layers_of, plain

import fusedsep
from fusedsep._ops import DEPTHWISE, DEPTHWISE_MAP, INTERLEAVED, MEANS, PATCHES_OF_NCHW, PIXELS


class Mixed(nn.Module):
    """M. Tan, Q. Le, "MixConv", 2019, as in timm: each part of the channels has a convolution of its own."""

    def __init__(self, *convs):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.splits = [conv.in_channels for conv in convs]

    def forward(self, x):
        parts = torch.split(x, self.splits, 1)
        return torch.cat([conv(parts[i]) for i, conv in enumerate(self.convs)], 1)


def mixnet(norm=lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())):
    kernels = (3, 5, 7, 9, 11)
    return nn.Sequential(
        ConvBNAct(3, 12, 3, 2),
        *(Mixed(pointwise(6, 10), pointwise(6, 14)), norm(24)),
        *(Mixed(*(depthwise(w, 2, kernel=k, padding=k // 2) for w, k in zip((5, 5, 5, 4, 5), kernels, strict=True))),),
        *(norm(24), Mixed(pointwise(12, 6), pointwise(12, 7)), nn.BatchNorm2d(13)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(13, 5)),
    )


NORMS = {
    "BN and ReLU": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
    "one module": lambda channels: BatchNormAct2d(channels, nn.SiLU),
}


@pytest.mark.parametrize("name", NORMS)
def test_mixnet_is_one_call(name, chain_calls):
    rows = plain(PATCHES_OF_NCHW, *2 * [PIXELS], *5 * [DEPTHWISE_MAP], *2 * [PIXELS], MEANS)
    assert_chains(mixnet(NORMS[name]), torch.randn(2, 3, 45, 38), chain_calls, [rows])


def test_one_image_and_threads_give_the_same_bits():
    assert_one_image_and_threads_give_the_same_bits(mixnet(), torch.randn(5, 3, 45, 38))


def site(channels):
    return nn.Sequential(depthwise(channels), nn.BatchNorm2d(channels), nn.ReLU(), pointwise(channels, 32))


GROUPED = {
    "1x1": (nn.Conv2d(32, 48, 1, groups=2, bias=False), 2 * [PIXELS]),
    "1x1 with a bias, stride 2": (nn.Conv2d(32, 64, 1, 2, groups=4), 4 * [PIXELS]),
    "3x3": (nn.Conv2d(32, 34, 3, padding=1, groups=2), 2 * [PATCHES_OF_NCHW]),
    "3x3 of stride 2": (nn.Conv2d(32, 48, 3, 2, padding=(1, 1), groups=2, bias=False), 2 * [PATCHES_OF_NCHW]),
    "same, dilated": (nn.Conv2d(32, 32, 3, padding="same", dilation=2, groups=2), 2 * [PATCHES_OF_NCHW]),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_layers_of_their_own(name, chain_calls):
    conv, rows = GROUPED[name]
    model = nn.Sequential(site(8), conv, nn.BatchNorm2d(conv.out_channels), nn.Hardswish(), site(conv.out_channels))
    expected = [plain(DEPTHWISE, *rows, DEPTHWISE)]
    assert_chains(model, torch.randn(2, 8, 13, 14), chain_calls, expected)
    frozen = fusedsep.freeze(randomized(model).eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


def test_groups_of_the_input_stay_torchs(chain_calls):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.site = nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32), site(32)

        def forward(self, x):
            return self.site((self.bn(self.conv(x)) + x).relu())

    model = randomized(Residual()).eval()
    x = torch.randn(2, 32, 9, 10)
    assert_outputs(model, x)
    # A chain begins with a layer that reads all of its input.
    assert layers_of(chain_calls) == []


OTHERS = {
    "few channels of a group": nn.Conv2d(32, 32, 3, padding=1, groups=4),
    "5x5": nn.Conv2d(32, 32, 5, padding=2, groups=2),
    "two strides": nn.Conv2d(32, 32, 3, (1, 2), padding=1, groups=2),
    "padding around a 1x1 convolution": nn.Conv2d(32, 32, 1, padding=1, groups=2),
    "circular": nn.Conv2d(32, 32, 3, padding=1, groups=2, padding_mode="circular"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_groups_stay_torchs(name, chain_calls):
    model = randomized(nn.Sequential(site(8), OTHERS[name], site(32), pointwise(32, 4))).eval()
    x = torch.randn(2, 8, 13, 14)
    assert_outputs(model, x)
    assert layers_of(chain_calls) == 2 * [plain(DEPTHWISE, PIXELS)]


class Joined(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b = pointwise(6, 5), nn.Sequential(pointwise(6, 7), nn.BatchNorm2d(7))
        self.bn, self.wide, self.last, self.join = nn.BatchNorm2d(12), nn.BatchNorm2d(17), site(12), join

    def forward(self, x):
        y = self.join(self, self.a(x), self.b[0](x), x)
        return self.last(y[:, :12])


NOT_A_NORM_OF_CONVOLUTIONS = {
    "a BN is there": lambda m, a, b, x: m.bn(torch.cat([a, m.b[1](b)], 1)),
    "an activation is there": lambda m, a, b, x: m.bn(torch.cat([a.relu(), b], 1)),
    "a sum": lambda m, a, b, x: m.bn(torch.cat([a + a, b], 1)),
    "one twice": lambda m, a, b, x: m.wide(torch.cat([a, b, a], 1)),
    "read again": lambda m, a, b, x: m.bn(torch.cat([a, b], 1)) + torch.cat([a, b], 1),
    "the input": lambda m, a, b, x: m.wide(torch.cat([x, x[:, :4], b], 1)),
    "some channels": lambda m, a, b, x: m.bn(torch.cat([a, b], 1)[:, :]).roll(1, 1),
}


@pytest.mark.parametrize("name", NOT_A_NORM_OF_CONVOLUTIONS)
def test_other_norms_of_maps_side_by_side(name):
    model = randomized(Joined(NOT_A_NORM_OF_CONVOLUTIONS[name])).eval()
    x = torch.randn(2, 6, 9, 10)
    assert_outputs(model, x)


def test_a_norm_in_training_mode_stays(chain_calls):
    model = randomized(mixnet()).eval()
    model[2][0].train()
    ours, x = fusedsep.fuse(model), torch.randn(2, 3, 45, 38)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))
        torch.testing.assert_close(ours.state_dict(), model.state_dict())
    assert not chain_calls


def test_changes_are_noticed(chain_calls):
    model = randomized(nn.Sequential(mixnet()[:5], site(24), nn.Conv2d(32, 32, 1, groups=2), nn.BatchNorm2d(32))).eval()
    x = torch.randn(2, 3, 45, 38)
    fused = fusedsep.fuse(model)
    with torch.no_grad():
        for tensor in (fused[0][1].convs[1].weight, fused[0][2][0].running_mean, fused[2].bias, fused[3].weight):
            before = fused(x)
            tensor.add_(1)
            assert not torch.equal(fused(x), before)
    assert chain_calls


def doubling(channels, kernel, **settings):
    return nn.Conv2d(channels, 2 * channels, kernel, **{"padding": kernel // 2, "groups": channels, **settings})


DOUBLING = {
    "3x3": doubling(10, 3, bias=False),
    "7x7 of stride 2": doubling(10, 7, stride=2),
    "11x11": doubling(10, 11),
    "same, dilated": doubling(10, 3, padding="same", dilation=2),
}


@pytest.mark.parametrize("name", DOUBLING)
def test_two_filters_for_each_channel_are_interleaved(name, chain_calls):
    for first in (nn.Sequential(ConvBNAct(3, 10, 3, 2)), nn.Sequential()):
        model = nn.Sequential(*first, DOUBLING[name], nn.BatchNorm2d(20), nn.GELU(), pointwise(20, 7))
        channels, rows = (3, [PATCHES_OF_NCHW]) if len(first) else (10, [])
        number = len(rows) + 2
        expected = [*plain(*rows, DEPTHWISE_MAP, DEPTHWISE_MAP), (INTERLEAVED, number), (PIXELS, -1)]
        assert_chains(model, torch.randn(2, channels, 23, 26), chain_calls, [expected])


class LargeKernel(nn.Module):
    """A patch embedding of FastViT (P. Vasu et al., 2023, section 3.2.2)."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBNAct(3, 9, 3, 2)
        self.large = nn.Sequential(doubling(9, 7, stride=2, bias=False), nn.BatchNorm2d(18))
        self.small = nn.Sequential(doubling(9, 3, stride=2), nn.BatchNorm2d(18))
        self.act, self.last = nn.GELU(), ConvBNAct(18, 18, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.act(self.large(x) + self.small(x)))


def test_branches_with_two_filters_for_each_channel(chain_calls):
    expected = [*plain(PATCHES_OF_NCHW, DEPTHWISE_MAP, DEPTHWISE_MAP), (INTERLEAVED, 3), (PIXELS, -1)]
    model = LargeKernel()
    assert_chains(model, torch.randn(2, 3, 33, 36), chain_calls, [expected])
    assert_one_image_and_threads_give_the_same_bits(model, torch.randn(5, 3, 33, 36))
    report = fusedsep.fusion_report(fusedsep.freeze(model.eval()))
    assert [site.name for site in report.chained] == ["large.0", "small.0"]


def test_two_filters_for_each_channel_in_float64():
    model = randomized(LargeKernel()).double().eval()
    x = torch.randn(2, 3, 21, 22, dtype=torch.double)
    with torch.no_grad():
        for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
            torch.testing.assert_close(net(x), model(x))


def test_two_filters_for_each_channel_of_a_convolution_that_pads_itself(chain_calls):
    """In the chain, and layer by layer where a gradient is wanted."""
    padded = SameConv(10, 20, 5, 2, groups=10)
    model = randomized(nn.Sequential(pointwise(4, 10), padded, nn.BatchNorm2d(20), nn.SiLU(), pointwise(20, 7))).eval()
    expected = [*plain(PIXELS, DEPTHWISE_MAP, DEPTHWISE_MAP), (INTERLEAVED, 3), (PIXELS, -1)]
    x = torch.randn(2, 4, 22, 23)
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        chain_calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(net(x), model(x))
        assert layers_of(chain_calls) == [expected]
        torch.testing.assert_close(net(x.clone().requires_grad_()), model(x))
        assert len(chain_calls) == 1
