# SPDX-License-Identifier: BSD-3-Clause
"""Whole 3x3 convolutions behind other layers of a chain, or in front of all, on maps that are no images."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from chain_layers import rows_of
from chain_models import conv_bn_relu
from randomize import randomized
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep._ops import DEPTHWISE, MEANS, PATCHES, PATCHES_OF_NCHW


class Whole(nn.Module):
    """Whole convolutions of stride 2, in a residual block and behind zeros; then a site and a classifier."""

    def __init__(self, channels=3, width=19):
        super().__init__()
        self.stem = conv_bn_relu(channels, width, 3, 2)
        self.down = conv_bn_relu(width, 24, 3, 2)
        self.block = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.SiLU())
        self.padded = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(24, 21, 3, 2), nn.ReLU())
        self.site = nn.Sequential(conv_bn_relu(21, 21, 3, groups=21), conv_bn_relu(21, 40, 1))
        self.classifier = nn.Linear(40, 5)

    def forward(self, x):
        x = self.down(self.stem(x))
        return self.classifier(self.site(self.padded(x + self.block(x))).mean((2, 3)))


FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
FUNCTIONS = pytest.mark.parametrize("function", [fusedsep.fuse, fusedsep.freeze])


@FORMATS
@FUNCTIONS
def test_all_are_one_call(function, memory_format, chain_calls):
    model = randomized(Whole()).eval()
    ours = function(model)
    x = torch.randn(3, 3, 67, 58).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert_as_close_to_float64(ours, model, x)
    first = PATCHES if memory_format is torch.channels_last else PATCHES_OF_NCHW
    assert rows_of(chain_calls)[0] == [first, PATCHES, PATCHES, PATCHES, DEPTHWISE, MEANS]


@FORMATS
@FUNCTIONS
@pytest.mark.parametrize("channels", [9, 64])
def test_maps_of_many_channels_are_not_read_as_nchw(function, memory_format, channels, chain_calls):
    model = randomized(Whole(channels)).eval()
    ours = function(model)
    x = torch.randn(2, channels, 33, 34).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert_as_close_to_float64(ours, model, x)
    assert rows_of(chain_calls)[0] == [PATCHES, PATCHES, PATCHES, PATCHES, DEPTHWISE, MEANS]


def test_the_input_of_a_chain_may_be_added(chain_calls):
    class Residual(Whole):
        def forward(self, x):
            return self.classifier(self.site(self.padded(x + self.block(x))).mean((2, 3)))

    model = randomized(Residual()).eval()
    with torch.no_grad():
        assert_as_close_to_float64(fusedsep.freeze(model), model, torch.randn(2, 24, 13, 12))
    assert rows_of(chain_calls)[0] == [PATCHES, PATCHES, DEPTHWISE, MEANS]


@FUNCTIONS
def test_convolutions_of_more_channels_than_one_chain_sums(function, chain_calls):
    model = randomized(Whole(width=150)).eval()
    with torch.no_grad():
        assert_as_close_to_float64(function(model), model, torch.randn(2, 3, 33, 34))
    assert rows_of(chain_calls)[0][1:] == [PATCHES, PATCHES, PATCHES, DEPTHWISE, MEANS]


@FUNCTIONS
def test_changed_numbers_are_noticed(function):
    model = randomized(Whole()).eval()
    ours = function(model)
    x = torch.randn(1, 3, 33, 34)
    with torch.no_grad():
        ours(x)
        for net in (model, ours):
            net.block[0].weight.mul_(-1)
        assert_as_close_to_float64(ours, model, x)
