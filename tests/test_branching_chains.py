# SPDX-License-Identifier: BSD-3-Clause
"""Networks with branches run in chains: concatenation, channel shuffle, slices, sums of two branches and max pools."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from chain_layers import DEPTHWISE, DEPTHWISE_MAP, INTERLEAVED, MAX_POOL, MEANS, PATCHES_OF_NCHW, PIXELS, SUM
from models import ConvBNAct, depthwise, pointwise
from randomize import randomized
from test_residual_chains import assert_chains, layers_of, plain
from zoo import assert_as_close_to_float64

import fusedsep


def separable(channels, out_channels, stride=1):
    return nn.Sequential(
        depthwise(channels, stride), nn.BatchNorm2d(channels), pointwise(channels, out_channels), nn.ReLU(inplace=True)
    )


def assert_outputs(model, x):
    """Of the fused and of the frozen model."""
    with torch.no_grad():
        for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
            assert_as_close_to_float64(net, model, x)


def assert_outputs_and_the_same_bits(model, x):
    """The same, in threads and for each image by itself."""
    with torch.no_grad():
        for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert_as_close_to_float64(net, model, x)
                y = net(x)
                assert torch.equal(torch.cat([net(image) for image in x.split(1)]), y)


def view_and_transpose(x):
    """As in torchvision/models/shufflenetv2.py."""
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def reshape_and_permute(x):
    halves = x.reshape(x.shape[0], 2, -1, x.shape[2], x.shape[3])
    return halves.permute(0, 2, 1, 3, 4).flatten(1, 2)


SHUFFLES = {
    "view and transpose": view_and_transpose,
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "torch.channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "F.channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "reshape and permute": reshape_and_permute,
}


class ShuffleNet(nn.Module):
    """A stem with a max pool, a unit that halves the map, two that pass on half of the channels, and a classifier."""

    def __init__(self, shuffle=view_and_transpose, width=10):
        super().__init__()
        self.stem, self.pool = ConvBNAct(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1)
        self.short = separable(8, width, 2)
        self.long = nn.Sequential(ConvBNAct(8, width, 1), separable(width, width, 2))
        self.units = nn.ModuleList(nn.Sequential(ConvBNAct(width, width, 1), separable(width, width)) for _ in range(2))
        self.head, self.classifier = ConvBNAct(2 * width, 24, 1), nn.Linear(24, 5)
        self.shuffle = shuffle

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = self.shuffle(torch.cat((self.short(x), self.long(x)), dim=1))
        for unit in self.units:
            a, b = x.chunk(2, dim=1)
            x = self.shuffle(torch.cat((a, unit(b)), dim=1))
        return self.classifier(self.head(x).mean([2, 3]))


@pytest.mark.parametrize("name", SHUFFLES)
def test_shufflenet_is_one_call(name, chain_calls):
    unit = plain(PIXELS, DEPTHWISE)
    expected = [
        *plain(PATCHES_OF_NCHW, MAX_POOL, DEPTHWISE, PIXELS, DEPTHWISE),
        *((INTERLEAVED, 5), *unit, (INTERLEAVED, 8), *unit, (INTERLEAVED, 11)),
        *plain(PIXELS, MEANS),
    ]
    assert_chains(ShuffleNet(SHUFFLES[name]), torch.randn(2, 3, 41, 44), chain_calls, [expected])


OTHER_SHUFFLES = {
    "of five groups": lambda x: torch.channel_shuffle(x, 5),
    "of pixels": lambda x: x.transpose(2, 3),
    "the other way round": lambda x: torch.channel_shuffle(x, x.shape[1] // 2),
    "in one of the images": lambda x: torch.cat((x[:1], torch.channel_shuffle(x[1:], 2))),
}


@pytest.mark.parametrize("name", OTHER_SHUFFLES)
def test_other_shuffles_end_a_chain(name, chain_calls):
    assert_outputs(randomized(ShuffleNet(OTHER_SHUFFLES[name])).eval(), torch.randn(2, 3, 41, 44))
    assert chain_calls and INTERLEAVED not in [row for call in layers_of(chain_calls) for row, _ in call]


class Ghost(nn.Module):
    """timm's GhostModule: what a cheap convolution makes of some maps, beside them."""

    def __init__(self, channels, out_channels, act=True):
        super().__init__()
        self.out_channels, half = out_channels, -(-out_channels // 2)
        self.primary = ConvBNAct(channels, half, 1, activation=nn.ReLU6 if act else None)
        self.cheap = ConvBNAct(half, half, 3, 1, half, activation=nn.ReLU6 if act else None)

    def forward(self, x):
        a = self.primary(x)
        b = self.cheap(a)
        return torch.cat([a, b], dim=1)[:, : self.out_channels, :, :]


class GhostNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvBNAct(3, 10, 3, 2)
        self.first, self.second = Ghost(10, 20), Ghost(20, 10, act=False)
        self.third, self.halve, self.fourth = Ghost(10, 21), ConvBNAct(21, 21, 3, 2, 21), Ghost(21, 12, act=False)
        self.short = nn.Sequential(depthwise(10, 2), nn.BatchNorm2d(10), pointwise(10, 12), nn.BatchNorm2d(12))

    def forward(self, x):
        x = self.stem(x)
        y = self.second(self.first(x))
        y += x
        z = self.fourth(self.halve(self.third(y)))
        z += self.short(y)
        return z


def test_ghostnet_is_one_call(chain_calls):
    """The last sum becomes a part of the shortcut. The one before, whose map two layers write, is a layer."""
    expected = [
        *plain(PATCHES_OF_NCHW, PIXELS, DEPTHWISE_MAP, PIXELS, DEPTHWISE_MAP),
        (SUM, 1),
        *plain(PIXELS, DEPTHWISE_MAP, DEPTHWISE, DEPTHWISE_MAP),
        (DEPTHWISE, 9),
    ]
    assert_chains(GhostNet(), torch.randn(2, 3, 33, 36), chain_calls, [expected])


class SlicedShortcut(nn.Module):
    """ReXNet's shortcut to some of the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = ConvBNAct(3, 8, 3, 2), nn.Sequential(ConvBNAct(8, 24, 1), separable(24, 13))
        self.last = ConvBNAct(13, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.block(x)
        return self.last(torch.cat([y[:, 0:8] + x, y[:, 8:]], dim=1))


def test_a_shortcut_to_some_channels(chain_calls):
    expected = [*plain(PATCHES_OF_NCHW, PIXELS, DEPTHWISE), (SUM, 1), *plain(SUM, PIXELS)]
    assert_chains(SlicedShortcut(), torch.randn(2, 3, 17, 20), chain_calls, [expected])


class Branches(nn.Module):
    """Three branches of one map, joined by a function of the map and what the branches give."""

    def __init__(self, join, channels=8):
        super().__init__()
        self.stem = ConvBNAct(3, 8, 3, 2)
        self.a, self.b, self.c = ConvBNAct(8, 8, 1), separable(8, 8), depthwise(8, kernel=5)
        self.last = ConvBNAct(channels, 7, 1)
        self.join = join

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.join(x, self.a(x), self.b(x), self.c(x)))


def split_and_join(x, a, b, c):
    first, second, third = torch.split(torch.cat([b, c], 1), [3, 8, 5], dim=1)
    return torch.concat([third, first, second], dim=-3)


def keep_what_was_there(x, a, b, c):
    """A sum in place, of a map that was read before."""
    joined = torch.cat([a, b], 1)
    a += c
    return torch.cat([joined, a], 1)


JOINS = {
    "cat": (lambda x, a, b, c: torch.cat([a, b, c], 1), 24),
    "cat in another order": (lambda x, a, b, c: torch.cat([c, x, a, b], 1), 32),
    "the same map twice": (lambda x, a, b, c: torch.cat([a, a, b, c], 1), 32),
    "cat of cats": (lambda x, a, b, c: torch.cat([torch.cat([a, b], 1), torch.cat([b, c], 1)], 1), 32),
    "sums": (lambda x, a, b, c: a + b + c + x, 8),
    "a sum read twice": (lambda x, a, b, c: torch.cat([a + b, (a + b) + c], 1), 16),
    "twice the same": (lambda x, a, b, c: (a + a) + b + c, 8),
    "a part of a sum": (lambda x, a, b, c: torch.cat([(a + b)[:, 2:5], c], 1), 11),
    "halves": (lambda x, a, b, c: torch.cat([a.chunk(2, 1)[1] + b[:, :4], c[:, -3:]], 1), 7),
    "split": (split_and_join, 16),
    "in place": (lambda x, a, b, c: a.add_(b).add_(c), 8),
    "identities": (lambda x, a, b, c: F.dropout(a, 0.5, False) + F.dropout(b + c, 0.2, training=False), 8),
}


@pytest.mark.parametrize("name", JOINS)
def test_branches_are_one_call(name, chain_calls):
    join, channels = JOINS[name]
    assert_outputs_and_the_same_bits(randomized(Branches(join, channels)).eval(), torch.randn(2, 3, 17, 20))
    calls = layers_of(chain_calls)
    assert calls and all(call[0][0] == PATCHES_OF_NCHW and call[-1][0] == PIXELS for call in calls)


def change_a_part(x, a, b, c):
    a[:, :2] += 1.0
    return a + b + c


def change_a_view(x, a, b, c):
    half, _ = a.chunk(2, 1)
    half += b[:, :4]
    return a + c


def change_before_the_last_read(x, a, b, c):
    a += b
    return a + x + c


NOT_JOINS = {
    "along the rows": (lambda x, a, b, c: torch.cat([a, b, c], 2), 8),
    "along the images": (lambda x, a, b, c: torch.cat([a, b, c]), 8),
    "every other channel": (lambda x, a, b, c: torch.cat([a[:, ::2], b, c], 1), 20),
    "a part of the map": (lambda x, a, b, c: (a + b + c)[:, :, 1:], 8),
    "stack": (lambda x, a, b, c: torch.stack([a, b, c], 1).flatten(1, 2), 24),
    "one channel that is broadcast": (lambda x, a, b, c: a + b[:, :1] + c, 8),
    "a number is added": (lambda x, a, b, c: a + 1.0 + b + c, 8),
    "a multiple is added": (lambda x, a, b, c: torch.add(a, b, alpha=2) + c, 8),
    "channels are written": (change_a_part, 8),
    "a view is written": (change_a_view, 8),
    "the map that others read is written": (lambda x, a, b, c: x.add_(a) + b + c, 8),
    "read before it is written": (keep_what_was_there, 24),
    "written and read": (change_before_the_last_read, 8),
}


@pytest.mark.parametrize("name", NOT_JOINS)
def test_other_functions_of_branches_give_what_they_gave(name):
    join, channels = NOT_JOINS[name]
    assert_outputs(randomized(Branches(join, channels)).eval(), torch.randn(2, 3, 17, 20))


class InputInBranches(nn.Module):
    """The input of a chain is cut and read again, also by others."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.a, self.b = separable(6, 6), ConvBNAct(6, 6, 1)
        self.part = separable(3, 6)
        self.change = change

    def forward(self, x):
        x = torch.tanh(x)
        y = self.a(x)
        first, second = x.chunk(2, 1)
        y = torch.cat([y, self.part(second)], 1)
        self.change(x)
        return torch.cat([y, self.b(x), x, first.exp()], 1)


def test_the_input_is_read_again(chain_calls):
    assert_outputs(randomized(InputInBranches()).eval(), torch.randn(2, 6, 9, 10))
    assert any(len(call) > 1 for call in layers_of(chain_calls))


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x.chunk(2, 1)[0].mul_(2)])
def test_the_input_is_changed_before_it_is_read_again(change):
    assert_outputs(randomized(InputInBranches(change)).eval(), torch.randn(2, 6, 9, 10))


class ChangedAndJoined(nn.Module):
    """What is put beside a map is the input as it is then."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b = separable(6, 6), separable(6, 6)
        self.change = change

    def forward(self, x):
        x = torch.tanh(x)
        y = self.a(x)
        z = self.b(y)
        self.change(x)
        return torch.cat([y, z, x], 1)


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.mul_(2), lambda x: x[:, 3:].mul_(2)])
def test_the_input_is_changed_before_it_is_put_beside_a_map(change):
    assert_outputs(randomized(ChangedAndJoined(change)).eval(), torch.randn(2, 6, 9, 10))


POOLS = {
    "3, 2, 1": nn.MaxPool2d(3, 2, 1),
    "2": nn.MaxPool2d(2),
    "3, 1, (1, 1)": nn.MaxPool2d((3, 3), (1, 1), (1, 1)),
    "13, 1, 6": nn.MaxPool2d(13, 1, 6),
}
OTHER_POOLS = {
    "ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "dilation": nn.MaxPool2d(3, 1, 1, dilation=2),
    "oblong": nn.MaxPool2d((3, 2)),
    "large": nn.MaxPool2d(15, 1, 7),
    "stride 3": nn.MaxPool2d(3),
    "mean": nn.AvgPool2d(2),
}


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.stem, self.pool, self.body = ConvBNAct(3, 9, 3), pool, separable(9, 7)

    def forward(self, x):
        return self.body(self.pool(self.stem(x)))


@pytest.mark.parametrize("name", POOLS)
def test_max_pools(name, chain_calls):
    expected = [plain(PATCHES_OF_NCHW, MAX_POOL, DEPTHWISE)]
    assert_chains(Pooled(POOLS[name]), torch.randn(2, 3, 18, 21), chain_calls, expected)


@pytest.mark.parametrize("name", OTHER_POOLS)
def test_other_pools_end_a_chain(name, chain_calls):
    assert_outputs(randomized(Pooled(OTHER_POOLS[name])).eval(), torch.randn(2, 3, 18, 21))
    assert not any(len(call) > 1 for call in layers_of(chain_calls))


def test_maps_that_do_not_fit_get_the_error_of_torch():
    model = randomized(Branches(lambda x, a, b, c: torch.cat([a, b, c], 1), 24)).eval()
    model.c.stride = (2, 2)
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            net(torch.randn(1, 3, 17, 20))


@pytest.mark.parametrize("make", [ShuffleNet, GhostNet, SlicedShortcut])
def test_layer_by_layer(make, chain_calls):
    """What the operator does not cover runs the layers one by one: gradients, other types, a copy, no batch."""
    model = randomized(make()).eval()
    fused, x = fusedsep.fuse(model), torch.randn(2, 3, 33, 36, requires_grad=True)
    y, expected = fused(x), model(x)
    torch.testing.assert_close(y, expected)
    (grad,), (grad_expected,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-5)
    frozen = fusedsep.freeze(model)
    torch.testing.assert_close(frozen(x), expected)
    assert not chain_calls
    with torch.no_grad():
        expected = frozen(x)
        for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(twin(x), expected)
        half = copy.deepcopy(frozen).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert chain_calls
        chain_calls.clear()


def test_changed_modules_are_noticed(chain_calls):
    """Those inside a branch, and a max pool."""
    model = randomized(ShuffleNet()).eval()
    fused, x = fusedsep.fuse(model), torch.randn(2, 3, 41, 44)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
        assert chain_calls
        for net in (model, fused):
            net.units[1][0][0].weight.mul_(-1)
        torch.testing.assert_close(fused(x), model(x))
        chain_calls.clear()
        for net in (model, fused):
            net.pool.stride = 1
        torch.testing.assert_close(fused(x), model(x))
        assert not any(MAX_POOL in [row for row, _ in call] for call in layers_of(chain_calls))
