# SPDX-License-Identifier: BSD-3-Clause
"""A fused network draws random numbers and changes state as its Python does, and fusing does neither."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn as nn
from fused_pairs import assert_same, assert_trains_alike, pair, state_of
from models import (
    MobileNetV2,
    TimmBlock,
    chain,
)
from twins import random

import fusedsep


class RandomDepth(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.body, self.draw = chain(nn.ReLU(), channels=6), draw

    def forward(self, x):
        if self.training and self.draw() < 0.5:
            return x
        return x + self.body(x)


def _numpy_random():
    import numpy

    return numpy.random.rand()


def _python_random():
    import random

    return random.random()


_generator = torch.Generator()

DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "a generator of torch": lambda: torch.rand(1, generator=_generator).item(),
    "in place": lambda: torch.empty(1).uniform_().item(),
    "random": _python_random,
    "numpy": _numpy_random,
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("wrap", [False, True], ids=["root", "child"])
def test_random_depth_stays_random(name, wrap, training_calls):
    states = []

    def draw():
        states.append(DRAWS[name]())
        return states[-1]

    network = RandomDepth(draw)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), network) if wrap else network
    fused = fusedsep.fuse(model.double().train(), inplace=True)
    x = random(2, 6, 8, 7)
    states.clear()
    for _ in range(30):
        fused(x)
    kept = sum(state >= 0.5 for state in states)
    assert len(states) == 30
    assert 0 < kept < 30
    assert len(training_calls) == kept


@pytest.mark.parametrize("name", DRAWS)
def test_fusing_draws_no_random_numbers(name):
    import random

    import numpy

    model = RandomDepth(DRAWS[name])
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    fusedsep.fuse(model)
    fusedsep.fusion_report(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


class Counts(nn.Module):
    """Changes a buffer, a tensor that is none, or a number at each step of training."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind, self.number = chain(nn.ReLU()), kind, 0
        self.register_buffer("steps", torch.zeros(()))
        self.tensors = [torch.zeros(())]

    def forward(self, x):
        if self.training:
            if self.kind == "buffer":
                self.steps.add_(1)
            elif self.kind == "buffer, looked up":
                self._buffers["steps"].add_(1)
            elif self.kind == "tensor":
                self.tensors[0].add_(1)
            else:
                self.number += 1
        return self.body(x)


@pytest.mark.parametrize("kind", ["buffer", "buffer, looked up", "tensor", "number"])
def test_what_a_forward_changes_besides(kind, training_calls):
    model, fused = pair(Counts(kind))
    for network in (model, fused):
        assert (network.steps, network.tensors[0], network.number) == (0, 0, 0)
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert fused.steps + fused.tensors[0] + fused.number == 3
    assert len(training_calls) == 3


@pytest.mark.parametrize("function", [fusedsep.fuse, fusedsep.fusion_report])
def test_the_model_is_left_as_it_was(function):
    model = nn.Sequential(MobileNetV2(), Counts("buffer"), RandomDepth(torch.rand), TimmBlock(4, 4)).train()
    model[0].features[2].eval()
    attributes = [dict(vars(module)) for module in model.modules()]
    state = state_of(model)
    function(model)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert_same(state_of(model), state)


class InPlace(nn.Module):
    """Returns a map that its Python changes under another name."""

    def __init__(self, operation):
        super().__init__()
        self.body, self.operation = chain(nn.ReLU()), operation

    def forward(self, x):
        y = self.body(x)
        z = y * 3
        before = z
        z = self.operation(z, 2.0)
        return y, before, z


IN_PLACE = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_augmented_assignments_change_what_they_name(name, kernel_calls):
    model, fused = pair(InPlace(getattr(operator, name)))
    x = random(2, 4, 8, 7)
    with torch.no_grad():
        for ours, expected in zip(fused.eval()(x), model.eval()(x), strict=True):
            torch.testing.assert_close(ours, expected)
    assert kernel_calls
