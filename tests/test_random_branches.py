# SPDX-License-Identifier: BSD-3-Clause
"""Networks of layers and functions that are joined at random, some of which write to their input or are never used."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import ConvBNAct, depthwise, pointwise
from randomize import randomized

import fusedsep
from fusedsep._chain import LayerChain


def add_in_place(a, b):
    a += b
    return a


def gate(x, reduce, expand):
    return x * torch.sigmoid(expand(torch.relu(reduce(x.mean((2, 3), keepdim=True)))))


class Random(nn.Module):
    """Each step reads maps of those before, mostly of late ones: a function of them and of modules."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.steps, self.shapes, self.parts = [], [], nn.ModuleList()
        self.add(torch.tanh, [], (self.draw.choice([3, 6, 8]), 0))  # channels, and how often the map was halved
        for _ in range(self.draw.randint(5, 20)):
            number = self.draw.randrange(max(0, len(self.shapes) - 4), len(self.shapes))
            self.draw.choice(self.KINDS)(self, number, *self.shapes[number])
        others = [self.draw.randrange(len(self.steps))] if self.draw.random() < 0.4 else []
        self.outputs = [len(self.steps) - 1, *others]
        del self.draw

    def add(self, function, read, shape, *parts):
        self.steps.append((function, read, range(len(self.parts), len(self.parts) + len(parts))))
        self.shapes.append(shape)
        self.parts.extend(parts)

    def others(self, shape_fits):
        return [number for number, shape in enumerate(self.shapes) if shape_fits(shape)]

    def layer(self, number, channels, halved):
        out_channels = self.draw.choice([4, 8, 12])
        activation = self.draw.choice([nn.ReLU, nn.ReLU6, nn.SiLU, None])
        layers = {
            "pointwise": ConvBNAct(channels, out_channels, 1, activation=activation),
            "whole": ConvBNAct(channels, out_channels, 3, activation=activation),
            "site": nn.Sequential(ConvBNAct(channels, channels, 3, 1, channels), pointwise(channels, out_channels)),
            "depthwise": ConvBNAct(channels, channels, self.draw.choice([3, 5]), 1, channels, activation=activation),
            "identity": self.draw.choice([nn.Identity(), nn.Dropout(0.3)]),
        }
        kind = self.draw.choice(list(layers))
        if kind in ("whole", "depthwise"):
            conv, dilation = layers[kind][0], self.draw.choice([1, 1, 2])
            conv.dilation, conv.padding = (dilation, dilation), tuple(dilation * pad for pad in conv.padding)
        shape = channels if kind in ("depthwise", "identity") else out_channels, halved
        self.add(lambda x, part: part(x), [number], shape, layers[kind])

    def halve(self, number, channels, halved):
        if halved < 2:
            site = nn.Sequential(depthwise(channels, 2), nn.BatchNorm2d(channels), pointwise(channels, channels))
            pool = self.draw.choice([nn.MaxPool2d(3, 2, 1), site, nn.Conv2d(channels, channels, 1, 2)])
            self.add(lambda x, part: part(x), [number], (channels, halved + 1), pool)

    def enlarge(self, number, channels, halved):
        if halved > 0:
            function = self.draw.choice([lambda x: F.interpolate(x, scale_factor=2), nn.Upsample(scale_factor=2)])
            self.add(function, [number], (channels, halved - 1))

    def join(self, number, channels, halved):
        others = self.others(lambda shape: shape[1] == halved and channels + shape[0] < 60)
        if others:
            read = self.draw.sample([number, self.draw.choice(others)], 2)
            self.add(lambda *maps: torch.cat(maps, 1), read, (sum(self.shapes[i][0] for i in read), halved))

    def sum(self, number, channels, halved):
        add = self.draw.choice([lambda a, b: a + b, torch.add, add_in_place])
        read = [number, self.draw.choice(self.others(lambda shape: shape == (channels, halved)))]
        self.add(add, read, (channels, halved))

    def multiply(self, number, channels, halved):
        function = self.draw.choice([lambda a, b: a * torch.sigmoid(b), lambda a, b: a.mul_(b.sigmoid()), torch.mul])
        read = [number, self.draw.choice(self.others(lambda shape: shape == (channels, halved)))]
        self.add(function, read, (channels, halved))

    def cut(self, number, channels, halved):
        if channels % 2 == 0 and self.draw.random() < 0.5:
            which = self.draw.randrange(2)
            self.add(lambda x: x.chunk(2, 1)[which], [number], (channels // 2, halved))
        else:
            begin = self.draw.randrange(channels)
            self.add(lambda x: x[:, begin:], [number], (channels - begin, halved))

    def shuffle(self, number, channels, halved):
        if channels % 2 == 0:
            self.add(lambda x: torch.channel_shuffle(x, 2), [number], (channels, halved))

    def excite(self, number, channels, halved):
        self.add(gate, [number], (channels, halved), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1))

    def reparametrize(self, number, channels, halved):
        draw, groups = self.draw, self.draw.choice([1, channels])
        convs = [ConvBNAct(channels, channels, draw.choice([1, 3, 3]), 1, groups, activation=None) for _ in range(2)]
        draw.choice(convs)[1] = draw.choice([nn.BatchNorm2d(channels), nn.Identity()])
        functions = [
            lambda x, a, b, bn: a(x) + b(x) + x,
            lambda x, a, b, bn: bn(add_in_place(a(x), b(x))),
            lambda x, a, b, bn: torch.relu(bn(x) + a(x)),
            lambda x, a, b, bn: sum([a(x), bn(x), b(x)]),
            lambda x, a, b, bn: x - (a(x) - bn(x)),
        ]
        self.add(draw.choice(functions), [number], (channels, halved), *convs, nn.BatchNorm2d(channels))

    def activate(self, number, channels, halved):
        functions = [torch.relu, torch.relu_, F.relu6, F.silu, torch.sigmoid_, lambda x: x * torch.sigmoid(x)]
        if self.draw.random() < 0.5:
            self.add(self.draw.choice(functions), [number], (channels, halved))
        else:
            modules = [nn.ReLU(), nn.ReLU(inplace=True), nn.Hardswish(), nn.SiLU(inplace=True), nn.Hardsigmoid()]
            self.add(lambda x, part: part(x), [number], (channels, halved), self.draw.choice(modules))

    def other(self, number, channels, halved):
        """Nothing that a chain has a kernel for."""
        function = self.draw.choice([torch.tanh, torch.tanh_, lambda x: x.mul_(0.5)])
        if self.draw.random() < 0.4:
            self.add(function, [number], (channels, halved))

    KINDS = (
        *6 * (layer,),
        *2 * (join, sum, activate),
        multiply,
        cut,
        shuffle,
        halve,
        enlarge,
        excite,
        reparametrize,
        other,
    )

    def forward(self, x):
        maps = []
        for function, read, parts in self.steps:
            maps.append(function(*([maps[i] for i in read] or [x]), *(self.parts[i] for i in parts)))
        return tuple(maps[i] for i in self.outputs)


@pytest.fixture
def chains_run(monkeypatch):
    """How often a chain of several layers was one call."""
    counts = []
    run = LayerChain._run

    def counted(chain, x):
        y = run(chain, x)
        counts.append(y is not None)
        return y

    monkeypatch.setattr(LayerChain, "_run", counted)
    return counts


def test_outputs_are_those_of_the_modules(chains_run):
    for seed in range(100):
        torch.manual_seed(seed)
        model = randomized(Random(seed)).eval()
        x = torch.randn(2, model.shapes[0][0], 12, 20)
        x = x.contiguous(memory_format=torch.channels_last) if seed % 2 else x
        with torch.no_grad():
            exact = [y.double() for y in model.double()(x.double())]
            model.float()
            for make in (fusedsep.fuse, fusedsep.freeze):
                for ours, expected in zip(make(model)(x.clone()), exact, strict=True):
                    error, size = (ours.double() - expected).abs().max(), expected.abs().max().clamp(min=1)
                    assert ours.shape == expected.shape and error <= 1e-5 * size, f"seed {seed}, {make.__name__}"
    assert sum(chains_run) > 60


class Unused(nn.Module):
    """A map that is cut last, behind a layer whose map nobody reads."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(ConvBNAct(6, 6, 3, 1, 6), pointwise(6, 12))
        self.b = ConvBNAct(6, 16, 1)

    def forward(self, x):
        x = torch.tanh(x)
        y = self.a(x)
        self.b(x)
        y[:, 2:9]
        return y.chunk(2, 1)[0]


def test_what_is_never_used_is_no_output():
    model = randomized(Unused()).eval()
    x = torch.randn(2, 6, 9, 10)
    with torch.no_grad():
        for make in (fusedsep.fuse, fusedsep.freeze):
            torch.testing.assert_close(make(model)(x), model(x))
