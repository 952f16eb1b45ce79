# SPDX-License-Identifier: BSD-3-Clause
"""Sums of convolutions and BNs of one map run in chains as one convolution, however they are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from models import ConvBNAct, pointwise
from randomize import randomized
from test_branching_chains import assert_outputs
from test_residual_chains import assert_chains, assert_one_image_and_threads_give_the_same_bits, layers_of, plain

import fusedsep
from fusedsep._ops import DEPTHWISE_MAP, MEANS, PATCHES_OF_NCHW, PIXELS


def conv_bn(channels, out_channels, kernel, stride=1, groups=1):
    return ConvBNAct(channels, out_channels, kernel, stride, groups, activation=None)


class MobileOneBlock(nn.Module):
    """P. Vasu et al., "MobileOne", 2023, section 3.2, with sums in place as in timm's."""

    def __init__(self, channels, out_channels, kernel, stride=1, groups=1, branches=2):
        super().__init__()
        has_identity = stride == 1 and channels == out_channels
        self.identity = nn.BatchNorm2d(channels) if has_identity else None
        self.conv_scale = conv_bn(channels, out_channels, 1, stride, groups) if kernel > 1 else None
        self.conv_kxk = nn.ModuleList(conv_bn(channels, out_channels, kernel, stride, groups) for _ in range(branches))
        self.drop_path, self.attn, self.act = nn.Identity(), nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        identity_out = 0 if self.identity is None else self.identity(x)
        out = 0 if self.conv_scale is None else self.conv_scale(x)
        for conv in self.conv_kxk:
            out += conv(x)
        out = self.drop_path(out)
        out += identity_out
        return self.act(self.attn(out))


def mobileone():
    return nn.Sequential(
        MobileOneBlock(3, 8, 3, 2),
        *(MobileOneBlock(8, 8, 3, 2, 8), MobileOneBlock(8, 14, 1)),
        *(MobileOneBlock(14, 14, 5, 1, 14), MobileOneBlock(14, 14, 1, branches=3)),
        *(MobileOneBlock(14, 14, 3, 1), MobileOneBlock(14, 20, 1, branches=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)),
    )


def test_mobileone_is_one_call(chain_calls):
    rows = plain(PATCHES_OF_NCHW, DEPTHWISE_MAP, PIXELS, DEPTHWISE_MAP, PIXELS, PATCHES_OF_NCHW, PIXELS, MEANS)
    assert_chains(mobileone(), torch.randn(2, 3, 33, 36), chain_calls, [rows])


def test_one_image_and_threads_give_the_same_bits():
    assert_one_image_and_threads_give_the_same_bits(mobileone(), torch.randn(5, 3, 33, 36))


class Branching(nn.Module):
    """A depthwise convolution, another one of its map, a BN, and a layer behind what is made of them."""

    def __init__(self, combine, kernel=3, **settings):
        super().__init__()
        self.first = pointwise(3, 8)
        self.large = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.conv = nn.Conv2d(8, 8, kernel, **{"padding": kernel // 2, "groups": 8, **settings})
        self.bn, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.gamma, self.flat = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(8))
        self.last = pointwise(8, 4)
        self.combine = combine

    def forward(self, x):
        return self.last(self.combine(self, self.first(x)))


SUMS = {
    "identity": lambda m, x: m.large(x) + m.conv(x) + x,
    "identity first": lambda m, x: x + (m.bn(m.conv(x)) + m.large(x)),
    "BN of the sum": lambda m, x: m.other(m.large(x) + m.bn(m.conv(x))),
    "BN of the sum and an activation": lambda m, x: m.other(m.large(x) + m.bn(x)).relu(),
    "built-in sum": lambda m, x: sum([m.large(x), m.conv(x), m.bn(x)]),
    "in place": lambda m, x: m.large(x).add_(m.conv(x)),
    "torch.add": lambda m, x: torch.add(m.bn(m.large(x)), m.other(x)),
    "difference": lambda m, x: m.large(x) - m.bn(m.conv(x)),
    "difference from the map": lambda m, x: torch.sub(x, m.bn(m.conv(x)) - m.large(x)),
    "difference in place": lambda m, x: m.large(x).sub_(m.conv(x)),
    "RepMixer": lambda m, x: x + (m.bn(m.large(x)) + m.conv(x) - m.other(x)) * m.gamma,
    "factors of one": lambda m, x: m.gamma * m.large(x) - m.conv(x),
    "factors in place": lambda m, x: (m.large(x) + m.conv(x)).mul_(m.gamma) + x,
    "factors of factors": lambda m, x: m.flat.view(1, -1, 1, 1) * (x - m.gamma * m.large(x)),
    "factors of the map": lambda m, x: m.large(x) + x * m.flat.reshape(8, 1, 1),
    "BN of what has factors": lambda m, x: m.bn(m.gamma * m.large(x)),
    "one that is taken away": lambda m, x: x - m.large(x),
    "a branch twice": lambda m, x: (y := m.bn(m.conv(x))) + m.large(x) + y,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_one_convolution(name, chain_calls):
    model = Branching(SUMS[name])
    assert_chains(model, torch.randn(2, 3, 9, 10), chain_calls, [plain(PIXELS, DEPTHWISE_MAP, PIXELS)])


OTHERS = {
    "one branch": Branching(lambda m, x: m.large(x) + x),
    "a branch is read again": Branching(lambda m, x: (y := m.conv(x)) + m.large(x) + torch.tanh(y)),
    "factors in front": Branching(lambda m, x: m.conv(m.gamma * x) + m.large(x)),
    "factors that are computed": Branching(lambda m, x: m.conv(x) * m.gamma.exp() + m.large(x)),
    "a BN behind factors of one": Branching(lambda m, x: m.bn(m.gamma * m.conv(x)) - m.large(x)),
    "a number less": Branching(lambda m, x: m.conv(x) - 1 + m.large(x)),
    "less a multiple": Branching(lambda m, x: torch.sub(m.conv(x), m.large(x), alpha=2)),
    "less in place, read again": Branching(lambda m, x: (y := m.conv(x)).sub_(m.large(x)) + y),
    "scaled in place, read again": Branching(lambda m, x: (y := m.conv(x)).mul_(m.gamma) + m.large(x) + y),
    "a quotient": Branching(lambda m, x: (m.conv(x) + m.large(x)) / m.gamma),
    "a map in between": Branching(lambda m, x: m.conv(x) + m.large(torch.tanh(x)) + m.bn(x)),
    "scaled": Branching(lambda m, x: torch.add(m.conv(x), m.large(x), alpha=2)),
    "the map is written to": Branching(lambda m, x: m.conv(x) + m.large(x.relu_())),
    "the map is the sum": Branching(lambda m, x: x.add_(m.large(x)) + m.conv(x)),
    "written behind another name": Branching(lambda m, x: (y := m.conv(x)).add_(m.large(x)) + y),
    "a constant": Branching(lambda m, x: m.conv(x) + m.large(x) + 1),
    "other taps": Branching(lambda m, x: m.conv(x) + m.large(x), dilation=2, padding=2),
    "other padding": Branching(lambda m, x: m.conv(x) + m.large(x)[:, :, 1:-1, 1:-1], padding=0),
    "padding around an even kernel": Branching(lambda m, x: m.conv(x)[:, :, 1:, 1:] + m.large(x), kernel=4),
    "zeros are not what is padded": Branching(lambda m, x: m.conv(x) + m.large(x), padding_mode="reflect"),
    "other groups": Branching(lambda m, x: m.conv(x) + m.large(x), groups=4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_one_convolution(name, chain_calls):
    model = randomized(OTHERS[name]).eval()
    x = torch.randn(2, 3, 9, 10)
    assert_outputs(model, x)
    assert all(rows != plain(PIXELS, DEPTHWISE_MAP, PIXELS) for rows in layers_of(chain_calls))


def test_a_bn_in_training_mode_is_no_branch(chain_calls):
    model = randomized(Branching(SUMS["BN of the sum"]))
    for name in ("bn", "other"):
        model.eval()
        getattr(model, name).train()
        ours, x = fusedsep.fuse(model), torch.randn(2, 3, 9, 10)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), model(x))
            torch.testing.assert_close(ours.state_dict(), model.state_dict())
    assert not any(DEPTHWISE_MAP in rows for rows in layers_of(chain_calls))


def test_changes_are_noticed(chain_calls):
    model = randomized(mobileone()).eval()
    x = torch.randn(2, 3, 33, 36)
    for make in (fusedsep.fuse, fusedsep.freeze):
        net = make(model)
        block = net[3]
        with torch.no_grad():
            for tensor in (block.conv_scale[0].weight, block.conv_kxk[1][0].weight, block.identity.running_var):
                before = net(x)
                assert len(chain_calls) == 1
                tensor.mul_(2)
                after = net(x)
                assert not torch.equal(after, before)
                chain_calls.clear()
            handle = block.conv_scale[0].register_forward_hook(lambda module, inputs, output: 0 * output)
            assert not torch.equal(net(x), after) and not chain_calls
            handle.remove()
            assert torch.equal(net(x), after)
            chain_calls.clear()


def test_changes_of_factors_are_noticed(chain_calls):
    model = randomized(Branching(SUMS["RepMixer"])).eval()
    x = torch.randn(2, 3, 9, 10)
    for make in (fusedsep.fuse, fusedsep.freeze):
        net = make(model)
        with torch.no_grad():
            before = net(x)
            net.gamma.mul_(2)
            assert not torch.equal(net(x), before)
            net.gamma = nn.Parameter(net.gamma / 2)
            assert torch.equal(net(x), before)


def test_bns_of_branches_are_folded():
    model = randomized(mobileone()).eval()
    frozen = fusedsep.freeze(model)
    norms = [name for name, module in frozen.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == [f"{i}.identity" for i in (3, 4, 5)]
    x = torch.randn(2, 3, 33, 36)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
        by_modules = type(frozen).forward(frozen, x)
        torch.testing.assert_close(by_modules, model(x), rtol=1e-4, atol=1e-5)


def test_the_report_names_all_branches():
    depthwise = [f"{block}.{conv}" for block in (1, 3) for conv in ("conv_scale.0", "conv_kxk.0.0", "conv_kxk.1.0")]
    for model in (mobileone(), fusedsep.fuse(mobileone()), fusedsep.freeze(mobileone().eval())):
        report = fusedsep.fusion_report(model)
        assert [site.name for site in report.chained] == depthwise
        assert report.fused == report.skipped == []
