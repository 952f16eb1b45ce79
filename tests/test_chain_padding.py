# SPDX-License-Identifier: BSD-3-Clause
"""Zeros in front of the first convolution are part of its layer; anything else in front of it stays there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from chain_models import Plain
from convolutions import CountingConv, PaddedConv, RoundedWeightConv, SameConv
from models import pointwise
from randomize import randomized
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep import _ops, reference
from fusedsep._ops import DEPTHWISE, PATCHES_OF_NCHW
from fusedsep._padding import SamePad


class PaddedStem(Plain):
    def __init__(self, pad, padding=0):
        super().__init__()
        self.stem[0].padding = (padding, padding)
        self.pad = pad

    def forward(self, x):
        return super().forward(self.pad(x))


#: name -> (what stands in front, padding of the convolution, zeros of its layer for a map of 24 x 25)
ABSORBED = {
    "F.pad": (lambda x: F.pad(x, (0, 1, 2, 0)), 0, (0, 1, 2, 0)),
    "nn.ZeroPad2d": (nn.ZeroPad2d((0, 1, 0, 1)), 0, (0, 1, 0, 1)),
    "two": (nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((0, 1, 1, 0), 0.0)), 0, (1, 2, 2, 1)),
    "besides its own": (nn.ZeroPad2d((0, 1, 0, 1)), 1, (1, 2, 1, 2)),
    "SAME": (SamePad(2), 0, (1, 1, 0, 1)),
}
KEPT = {
    "of ones": nn.ConstantPad2d(1, 1.0),
    "by reflection": nn.ReflectionPad2d(1),
    "negative": nn.ZeroPad2d((-1, 1, 0, 0)),
    "SAME for another stride": SamePad(1),
}


def first_layers(calls):
    return [_ops.layers_of(text)[0] for _, _, text, *_ in calls]


@pytest.mark.parametrize("name", ABSORBED)
@pytest.mark.parametrize("make", [fusedsep.fuse, fusedsep.freeze])
def test_zeros_are_absorbed(name, make, chain_calls):
    pad, padding, expected = ABSORBED[name]
    model = randomized(PaddedStem(pad, padding)).eval()
    net = make(model)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 24, 25).contiguous(memory_format=memory_format)
            assert_as_close_to_float64(net, model, x)
    for layer in first_layers(chain_calls):
        assert (layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom) == expected
    (chain,) = net.forward.programs[False].sites.values()
    assert len(chain.elements) == 5
    assert "pad(" not in net.forward.programs[False].source


#: name -> (first convolution, zeros of its layer for a map of 24 x 25)
PADDING_ITSELF = {
    "SAME": (SameConv(3, 8, 3, 2), (1, 1, 0, 1)),
    "two sides": (PaddedConv(3, 8, 3, 2), (0, 1, 2, 0)),
    "two sides besides its own": (PaddedConv(3, 8, 3, padding=1), (1, 2, 3, 1)),
}


@pytest.mark.parametrize("name", PADDING_ITSELF)
@pytest.mark.parametrize("make", [fusedsep.fuse, fusedsep.freeze])
def test_a_first_convolution_that_pads_itself(name, make, chain_calls):
    model = Plain()
    model.stem[0], expected = copy.deepcopy(PADDING_ITSELF[name])
    model = randomized(model).eval()
    net = make(model)
    with torch.no_grad():
        for size in ((24, 25), (23, 22), (24, 25)):
            assert_as_close_to_float64(net, model, torch.randn(2, 3, *size))
    assert first_layers(chain_calls)[-1][4:8] == expected
    (chain,) = net.forward.programs[False].sites.values()
    assert len(chain.elements) == 5


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kind", [SameConv, PaddedConv])
def test_a_depthwise_convolution_that_pads_itself(kernel, stride, dilation, kind, chain_calls):
    dw = kind(12, 12, kernel, stride, dilation=dilation, groups=12)
    reach = (kernel - 1) * dilation + 1
    model = nn.Sequential(pointwise(4, 12), dw, nn.BatchNorm2d(12), nn.SiLU(), pointwise(12, 5), nn.GELU())
    model = randomized(model).eval()
    for make in (fusedsep.fuse, fusedsep.freeze):
        net = make(model)
        with torch.no_grad():
            for size in ((reach, reach + 2), (24, 25), (25, 24), (32, 31)):
                chain_calls.clear()
                assert_as_close_to_float64(net, model, torch.randn(2, 4, *size))
                assert len(chain_calls) == 1
            before = net(torch.ones(1, 4, 24, 25))
            net[1].dilation = (3, 3)
            assert not torch.equal(before[..., :1, :1], net(torch.ones(1, 4, 24, 25))[..., :1, :1])


def test_zeros_in_front_of_same_padding_stay_there(chain_calls):
    model = PaddedStem(nn.ZeroPad2d(1))
    model.stem[0] = SameConv(3, 8, 3, 2)
    model = randomized(model).eval()
    for make in (fusedsep.fuse, fusedsep.freeze):
        with torch.no_grad():
            assert_as_close_to_float64(make(model), model, torch.randn(2, 3, 24, 25))
    assert [layer[4:8] for layer in first_layers(chain_calls)] == 2 * [(1, 1, 0, 1)]


def test_convolutions_with_a_forward_of_their_own_stay(chain_calls):
    x = torch.randn(2, 3, 24, 25)
    for conv in (RoundedWeightConv(3, 8, 3, 2), CountingConv(3, 8, 3, 2)):
        model = Plain()
        model.stem[0] = conv
        model = randomized(model).eval()
        for make in (fusedsep.fuse, fusedsep.freeze):
            chain_calls.clear()
            with torch.no_grad():
                assert_as_close_to_float64(make(model), model, x)
            (layer,) = first_layers(chain_calls)
            assert layer.rows == DEPTHWISE


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("make", [fusedsep.fuse, fusedsep.freeze])
def test_others_stay_in_front(name, make, chain_calls):
    model = randomized(PaddedStem(KEPT[name])).eval()
    with torch.no_grad():
        assert_as_close_to_float64(make(model), model, torch.randn(2, 3, 24, 25))
    (layer,) = first_layers(chain_calls)
    assert layer.rows in (PATCHES_OF_NCHW, DEPTHWISE)
    assert layer[4:8] in ((0, 0, 0, 0), (1, 1, 1, 1))


def test_a_padding_module_that_changes_is_noticed(chain_calls):
    model = randomized(PaddedStem(nn.ZeroPad2d((0, 1, 0, 1)))).eval()
    x = torch.randn(2, 3, 24, 25)
    for make in (fusedsep.fuse, fusedsep.freeze):
        net = make(model)
        with torch.no_grad():
            before = net(x)
            net.pad.padding = (3, 3, 3, 3)
            after = net(x)
        assert not torch.equal(before, after)
    assert len(chain_calls) == 2


@pytest.mark.parametrize("model_class", [fusedsep.MobileNetV1, reference.MobileNetV1])
def test_same_padding_of_the_whole_network(model_class, chain_calls):
    model = randomized(model_class(7, 0.25, padding="same")).eval()
    for make in (fusedsep.fuse, fusedsep.freeze):
        with torch.no_grad():
            assert_as_close_to_float64(make(model), model, torch.randn(1, 3, 48, 64))
    assert [layer[4:8] for layer in first_layers(chain_calls)] == 2 * [(0, 1, 0, 1)]
    for wrong in (torch.randn(1, 4, 48, 64), torch.randn(3, 48, 64)):
        with pytest.raises(ValueError, match="x must be images of shape"):
            fusedsep.freeze(model)(wrong)
