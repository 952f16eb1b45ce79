# SPDX-License-Identifier: BSD-3-Clause
"""Upsampling by two runs in chains, so that decoders do."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import ConvBNAct
from randomize import randomized
from test_branching_chains import Pooled, assert_outputs, separable
from test_residual_chains import assert_chains, layers_of, plain

import fusedsep
from fusedsep._ops import DEPTHWISE, PATCHES_OF_NCHW, UPSAMPLE

UPSAMPLING = {
    "module": nn.Upsample(scale_factor=2),
    "sides": nn.Upsample(scale_factor=(2, 2), mode="nearest-exact"),
    "subclass": nn.UpsamplingNearest2d(scale_factor=2),
    "function": lambda x: F.interpolate(x, scale_factor=2),
    "function, sides": lambda x: F.interpolate(x, None, [2.0, 2.0], "nearest"),
}
OTHER_UPSAMPLING = {
    "three": nn.Upsample(scale_factor=3),
    "one side": nn.Upsample(scale_factor=(2, 1)),
    "a size": nn.Upsample((36, 42)),
    "linear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "function, linear": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "function, a size": lambda x: F.interpolate(x, (36, 42)),
}


@pytest.mark.parametrize("name", UPSAMPLING)
def test_upsampling(name, chain_calls):
    expected = [plain(PATCHES_OF_NCHW, UPSAMPLE, DEPTHWISE)]
    assert_chains(Pooled(UPSAMPLING[name]), torch.randn(2, 3, 18, 21), chain_calls, expected)


@pytest.mark.parametrize("name", OTHER_UPSAMPLING)
def test_other_upsampling_ends_a_chain(name, chain_calls):
    assert_outputs(randomized(Pooled(OTHER_UPSAMPLING[name])).eval(), torch.randn(2, 3, 18, 21))
    assert not any(len(call) > 1 for call in layers_of(chain_calls))


class Decoder(nn.Module):
    """An encoder and a decoder that reads its maps too, beside its own and added to it."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = ConvBNAct(3, 8, 3, 2), nn.ModuleList([separable(8, 12, 2), separable(12, 16, 2)])
        self.up = nn.ModuleList([separable(16, 12), ConvBNAct(20, 6, 3)])
        self.upsample = nn.Upsample(scale_factor=2)

    def forward(self, x):
        first = self.stem(x)
        second = self.down[0](first)
        x = self.upsample(self.up[0](self.down[1](second))) + second
        return self.up[1](torch.cat([F.interpolate(x, scale_factor=2), first], 1))


def test_a_decoder_is_one_call(chain_calls):
    expected = [
        *plain(PATCHES_OF_NCHW, DEPTHWISE, DEPTHWISE, DEPTHWISE),
        *((UPSAMPLE, 2), (UPSAMPLE, -1), (PATCHES_OF_NCHW, -1)),  # written beside the other map, and 3x3 of both
    ]
    assert_chains(Decoder(), torch.randn(2, 3, 48, 32), chain_calls, [expected])


def test_an_upsampled_map_of_another_size_gets_the_error_of_torch():
    model = randomized(Decoder()).eval()
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            net(torch.randn(2, 3, 47, 30))
