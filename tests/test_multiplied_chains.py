# SPDX-License-Identifier: BSD-3-Clause
"""Products of two maps run in chains, so that star blocks and gates of every pixel do."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn as nn
from models import ConvBNAct, depthwise
from randomize import randomized
from test_branching_chains import Branches, assert_outputs, assert_outputs_and_the_same_bits, separable
from test_residual_chains import assert_chains, layers_of, plain
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep import _ops
from fusedsep._ops import DEPTHWISE, DEPTHWISE_MAP, MEANS, PATCHES_OF_NCHW, PIXELS, SUM


class Star(nn.Module):
    """A block of StarNet."""

    def __init__(self, channels):
        super().__init__()
        self.first = ConvBNAct(channels, channels, 7, 1, channels, activation=None)
        self.a, self.b = (nn.Conv2d(channels, 3 * channels, 1) for _ in range(2))
        self.act, self.g = nn.ReLU6(), ConvBNAct(3 * channels, channels, 1, activation=None)
        self.second = depthwise(channels, bias=True)

    def forward(self, x):
        y = self.first(x)
        return x + self.second(self.g(self.act(self.a(y)) * self.b(y)))


class StarNet(nn.Sequential):
    def __init__(self):
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
        super().__init__(ConvBNAct(3, 8, 3, 2), Star(8), ConvBNAct(8, 12, 3, 2), Star(12), head)


def multiplied(calls):
    """Rows, and what they are multiplied by, of each layer of each call that multiplies."""
    calls = [_ops.layers_of(text) for _, _, text, *_ in calls]
    return [[(n.rows, n.residual) for n in layers if n.multiplies] for layers in calls]


def test_starnet_is_one_call(chain_calls):
    block = [*plain(DEPTHWISE_MAP, PIXELS), (PIXELS, 3), (PIXELS, -1)]
    expected = [
        *((PATCHES_OF_NCHW, -1), *block, (DEPTHWISE_MAP, 1)),
        *((PATCHES_OF_NCHW, -1), *plain(DEPTHWISE_MAP, PIXELS), (PIXELS, 9), (PIXELS, -1), (DEPTHWISE_MAP, 7)),
        (MEANS, -1),
    ]
    assert_chains(StarNet(), torch.randn(2, 3, 33, 36), chain_calls, [expected])
    assert multiplied(chain_calls) == [[(PIXELS, 3), (PIXELS, 9)]]


def multiply_in_place(a, b):
    a *= b
    return a


PRODUCTS = {
    "operator": lambda x, a, b, c: a * b + c,
    "function": lambda x, a, b, c: torch.mul(c, torch.multiply(a, b)),
    "method": lambda x, a, b, c: a.mul(b) + c,
    "in place": lambda x, a, b, c: multiply_in_place(a, b).mul_(c),
    "read again": lambda x, a, b, c: a * b + a + c,
    "the map itself": lambda x, a, b, c: (a * x) * (b * x) + c,
    "a square": lambda x, a, b, c: a * a + b * c,
    "some channels": lambda x, a, b, c: torch.cat([a[:, 3:] * b[:, :5], c[:, 5:]], 1),
    "a gate": lambda x, a, b, c: torch.sigmoid(a) * b + c,
    "an activation behind it": lambda x, a, b, c: torch.relu(a * b) * c,
    "a sum and a product": lambda x, a, b, c: (a + x) * (b + c),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_one_call(name, chain_calls):
    assert_outputs_and_the_same_bits(randomized(Branches(PRODUCTS[name])).eval(), torch.randn(2, 3, 17, 20))
    assert all(call[0][0] == PATCHES_OF_NCHW and call[-1][0] == PIXELS for call in layers_of(chain_calls))
    assert chain_calls and all(multiplied(chain_calls))


def test_a_product_of_maps_that_others_read_is_a_step(chain_calls):
    assert_outputs(randomized(Branches(lambda x, a, b, c: a * b + a + b + c)).eval(), torch.randn(2, 3, 17, 20))
    assert chain_calls and all([row for row, _ in rows] == [SUM] for rows in multiplied(chain_calls))


NOT_PRODUCTS = {
    "a number": lambda x, a, b, c: a * 2.0 + b + c,
    "one channel": lambda x, a, b, c: a * b[:, :1] + c,
    "one pixel": lambda x, a, b, c: a * b.amax((2, 3), keepdim=True) + c,
    "one image": lambda x, a, b, c: a * b[:1] + c,
    "a quotient": lambda x, a, b, c: operator.truediv(a, 9.0 + b) + c,
    "read after it is written": lambda x, a, b, c: (multiply_in_place(a, b), a + c)[1],
}


@pytest.mark.parametrize("name", NOT_PRODUCTS)
def test_other_products_give_what_they_gave(name, chain_calls):
    assert_outputs(randomized(Branches(NOT_PRODUCTS[name])).eval(), torch.randn(2, 3, 17, 20))
    assert not any(multiplied(chain_calls))


class OtherSizes(nn.Module):
    """A product with a map of one pixel, which only this image size makes."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = ConvBNAct(3, 8, 3, 2), nn.MaxPool2d(4, 2)
        self.site = separable(8, 8)

    def forward(self, x):
        x = self.stem(x)
        return self.site(x * self.pool(x))


def test_a_product_with_a_pixel_that_is_broadcast(chain_calls):
    model, x = randomized(OtherSizes()).eval(), torch.randn(2, 3, 8, 8)
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad():
            assert_as_close_to_float64(net, model, x)
            with pytest.raises(RuntimeError, match="must match the size of tensor"):
                net(torch.randn(2, 3, 16, 16))
    assert not any((DEPTHWISE, -1) in call and len(call) > 1 for call in layers_of(chain_calls))
