# SPDX-License-Identifier: BSD-3-Clause
"""A network and its fused copy, and what training makes of the two."""

from __future__ import annotations

import torch
from randomize import randomized
from zoo import tensors_of

import fusedsep


def pair(model):
    """A network in float64 and training mode with random BNs, and a fused copy of it."""
    model = randomized(model).double().train()
    return model, fusedsep.fuse(model)


def train(model, x, steps=3):
    """All that some steps of SGD give: outputs, the last gradients, parameters and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(0)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(tensors_of(model(x)))
        sum(part.square().mean() for part in outputs[-1]).backward()
        optimizer.step()
    outputs = [part.detach() for parts in outputs for part in parts]
    return outputs + [parameter.grad for parameter in model.parameters()] + state_of(model)


def state_of(model):
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def assert_same(ours, theirs, tolerance=1e-9):
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0.1 * tolerance)


def assert_trains_alike(model, fused, x, steps=3):
    assert_same(train(fused, x, steps), train(model, x, steps))
