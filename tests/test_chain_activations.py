# SPDX-License-Identifier: BSD-3-Clause
"""Activations in chains that are not behind a convolution: in front of layers, behind sums, behind gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import ConvBNAct, depthwise, pointwise
from randomize import randomized
from test_branching_chains import assert_outputs
from test_residual_chains import assert_chains, layers_of, plain
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, DEPTHWISE_MAP, MAX_POOL, MEANS, PATCHES_OF_NCHW, PIXELS, SUM


def activations_of(calls):
    """The activation behind the sum of each layer."""
    return [[layer.joined_activation for layer in _ops.layers_of(text)] for _, _, text, *_ in calls]


class XceptionBlock(nn.Module):
    """F. Chollet, "Xception", 2017, figure 5: activations in front, a max pool, and a strided convolution beside."""

    def __init__(self, channels, out_channels, inplace):
        super().__init__()
        layers = [nn.ReLU(inplace=False), depthwise(channels), pointwise(channels, out_channels)]
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=inplace)]
        layers += [depthwise(out_channels), pointwise(out_channels, out_channels), nn.BatchNorm2d(out_channels)]
        self.rep = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))
        self.skip = nn.Conv2d(channels, out_channels, 1, 2, bias=False)
        self.skipbn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        y = self.rep(x)
        y += self.skipbn(self.skip(x))
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_xception_is_one_call(chain_calls, inplace):
    model = nn.Sequential(
        ConvBNAct(3, 8, 3, 2),
        XceptionBlock(8, 20, inplace),
        XceptionBlock(20, 9, inplace),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)),
    )
    first = [(SUM, -1), (DEPTHWISE, -1), (DEPTHWISE, -1), (MAX_POOL, -1), (PIXELS, 5)]
    second = [(SUM, -1), (DEPTHWISE, -1), (DEPTHWISE, -1), (MAX_POOL, -1), (PIXELS, 10)]
    expected = [[*plain(PATCHES_OF_NCHW), *first, *second, *plain(MEANS)]]
    assert_chains(model, torch.randn(2, 3, 33, 36), chain_calls, expected)


class Residual(nn.Module):
    """``act(layers(x) + x)``."""

    def __init__(self, layers, act):
        super().__init__()
        self.layers, self.act = layers, act

    def forward(self, x):
        return self.act(self.layers(x) + x)


ACTS = {
    "module": (nn.ReLU(inplace=True), 1),
    "function": (F.relu6, 2),
    "method": (lambda x: x.clamp_(min=0), 1),
    "spelled out": (lambda x: x * torch.sigmoid(x), 4),
    "sigmoid": (nn.Sigmoid(), 5),
}


@pytest.mark.parametrize("name", ACTS)
def test_activations_behind_sums(chain_calls, name):
    act, code = ACTS[name]
    layers = nn.Sequential(ConvBNAct(6, 13, 1), depthwise(13), nn.BatchNorm2d(13), pointwise(13, 6))
    model = nn.Sequential(Residual(layers, act), Residual(ConvBNAct(6, 6, 5, groups=6, activation=None), act))
    expected = [[(PIXELS, -1), (DEPTHWISE, 0), (DEPTHWISE_MAP, 2)]]
    assert_chains(model, torch.randn(2, 6, 9, 10), chain_calls, expected)
    assert activations_of(chain_calls) == [[0, code, code]]


class Rexnet(nn.Module):
    """timm's block of ReXNet: a BN in the gate, an activation behind it, a sum of some channels."""

    def __init__(self, channels=6, out_channels=9, inner=20):
        super().__init__()
        self.channels = channels
        self.expand, self.dw = ConvBNAct(channels, inner, 1, activation=nn.SiLU), ConvBNAct(inner, inner, 3, 1, inner)
        self.fc1, self.bn, self.fc2 = nn.Conv2d(inner, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, inner, 1)
        self.act, self.project = nn.ReLU6(), nn.Sequential(pointwise(inner, out_channels), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        y = self.dw(self.expand(x))
        gate = F.relu(self.bn(self.fc1(y.mean((2, 3), keepdim=True))))
        y = self.project(self.act(y * torch.sigmoid(self.fc2(gate))))
        return torch.cat([y[:, : self.channels] + x, y[:, self.channels :]], dim=1)


def test_activations_behind_gates(chain_calls):
    rows = plain(PIXELS, DEPTHWISE_MAP, MEANS, PIXELS, SUM, PIXELS)
    model = Rexnet()
    assert_chains(model, torch.randn(2, 6, 9, 10), chain_calls, [[*rows, (SUM, 0), (SUM, -1)]])
    assert activations_of(chain_calls) == [[0, 0, 0, 0, 2, 0, 0, 0]]
    frozen = fusedsep.freeze(randomized(model).eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


class SideBySide(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b = ConvBNAct(6, 5, 1, activation=None), nn.Sequential(depthwise(6), pointwise(6, 7))
        self.join = join
        self.project = pointwise(join(torch.randn(1, 5, 1, 1), torch.randn(1, 7, 1, 1)).shape[1], 4)

    def forward(self, x):
        return self.project(self.join(self.a(x), self.b(x)))


JOINS = {
    "each by itself": (lambda a, b: torch.cat([a, b], 1).relu(), 0),
    "one twice": (lambda a, b: F.silu(torch.cat([a, b, a], 1)), 1),
    "some channels of one": (lambda a, b: F.silu(torch.cat([a, a[:, 1:], b], 1)), 2),
    "one is read again": (lambda a, b: torch.cat([F.silu(torch.cat([a, b], 1)), b], 1), 1),
    "both before and after": (lambda a, b: torch.cat([F.relu6(a), b, a.relu()], 1), 2),
    "twice": (lambda a, b: F.silu(F.silu(torch.cat([a, b], 1))), 2),
}


@pytest.mark.parametrize("name", JOINS)
def test_activations_of_maps_side_by_side(chain_calls, name):
    join, passes = JOINS[name]
    x = torch.randn(2, 6, 9, 10)
    model = randomized(SideBySide(join)).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        chain_calls.clear()
        with torch.no_grad():
            assert_as_close_to_float64(net, model, x)
        (layers,) = layers_of(chain_calls)
        assert sum(rows == SUM for rows, _ in layers) == passes


class WritesInPlace(nn.Module):
    """What is in the memory of a map when it is read, before and behind an activation that writes there."""

    def __init__(self, read):
        super().__init__()
        self.first, self.other, self.read = nn.Sequential(depthwise(6), pointwise(6, 6)), pointwise(6, 6), read

    def forward(self, x):
        return self.read(self.first(x), self.other)


READS = {
    "before": lambda y, other: other(y) + y.relu_(),
    "behind": lambda y, other: y.relu_() + other(y),
    "both": lambda y, other: other(y) + other(y.relu_()) + y,
    "by another name": lambda y, other: other(y[:, :]) + F.relu(y, inplace=True) + other(y),
}


@pytest.mark.parametrize("name", READS)
def test_activations_in_place(name):
    model = randomized(WritesInPlace(READS[name])).eval()
    x = torch.randn(2, 6, 9, 10)
    assert_outputs(model, x)


def test_an_input_is_not_written_to(chain_calls):
    model = randomized(nn.Sequential(nn.ReLU(inplace=True), XceptionBlock(6, 8, True))).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        x = torch.randn(2, 6, 9, 10)
        with torch.no_grad():
            y, written, expected = net(x), x.clone(), model(x)
        assert torch.equal(x, written) and x.min() == 0
        torch.testing.assert_close(y, expected)
    assert chain_calls


def test_changes_are_noticed(chain_calls):
    model = randomized(nn.Sequential(Residual(ConvBNAct(6, 6, 1, activation=None), nn.ReLU()), depthwise(6))).eval()
    x = torch.randn(2, 6, 9, 10)
    for make in (fusedsep.fuse, fusedsep.freeze):
        net = make(model)
        with torch.no_grad():
            before = net(x)
            assert chain_calls
            chain_calls.clear()
            handle = net[0].act.register_forward_hook(lambda module, inputs, output: 0 * output)
            assert not torch.equal(net(x), before)
            handle.remove()
            assert torch.equal(net(x), before)
            net[0].act.forward = torch.tanh
            assert not torch.equal(net(x), before)
