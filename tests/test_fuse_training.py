# SPDX-License-Identifier: BSD-3-Clause
"""A fused network trains through its sites, and as the unfused network does: outputs, gradients and buffers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fused_pairs import assert_same, assert_trains_alike, pair, state_of, train
from models import (
    Branching,
    InvertedResidual,
    MobileNetV2,
    chain,
    depthwise,
    pointwise,
)
from randomize import randomized
from torch.utils.checkpoint import checkpoint
from twins import random
from zoo import FUSABLE, build, tensors_of

import fusedsep

#: Entries of FUSABLE with a site that drops values in the middle: in training mode, its modules run themselves.
DROPPING = {"dropout and identity"}

#: Entries whose own gradients are less precise: torch takes 1/6 in float32 for the one of ``F.hardsigmoid``.
TOLERANCE = {"functional hardsigmoid": 1e-7}


@pytest.mark.parametrize("name", FUSABLE)
def test_steps_of_sgd(name, site_calls, training_calls, backward_calls):
    model, x, sites = build(FUSABLE[name])
    model, x = model.double().train(), x.double()
    fused = fusedsep.fuse(model)
    ours = train(fused, x)
    if name in DROPPING:
        assert not training_calls + site_calls
    else:  # without any BN, the two modes are one
        assert len(training_calls) + len(site_calls) >= 3 * sites
        assert len(backward_calls) >= 3 * sites
    assert_same(ours, train(model, x), TOLERANCE.get(name, 1e-9))
    site_calls.clear()
    with torch.no_grad():
        ours, theirs = tensors_of(fused.eval()(x)), tensors_of(model.eval()(x))
        assert_same(ours, theirs)
        assert len(site_calls) >= sites


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_single_precision(channels_last, training_calls):
    model = randomized(MobileNetV2()).train()
    model.classifier[0].p = 0.0
    fused, exact = fusedsep.fuse(model), copy.deepcopy(model).double()
    x = random(4, 3, 32, 32, dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ours, theirs, truth = train(fused, x, 1), train(model, x, 1), train(exact, x.double(), 1)
    assert len(training_calls) == 3
    for actual, reference, expected in zip(ours, theirs, truth, strict=True):
        error, allowed = (actual - expected).abs().max(), (reference - expected).abs().max()
        assert error <= 3 * allowed + 1e-6 * expected.abs().max().clamp(min=1)


def test_statistics_follow_without_gradients(training_calls):
    model, fused = pair(MobileNetV2())
    x = random(2, 3, 16, 16)
    with torch.no_grad():
        for network in (model, fused):
            torch.manual_seed(0)
            network(x)
    assert_same(state_of(fused), state_of(model))
    assert len(training_calls) == 3


@pytest.mark.parametrize("skip", ["x + y", "y += x"])
def test_residual_connections(skip, training_calls):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*chain(nn.ReLU(True), channels=6))

        def forward(self, x):
            y = self.body(x)
            if skip == "x + y":
                return x + y
            y += x
            return y

    model, fused = pair(nn.Sequential(nn.Conv2d(6, 6, 1), Residual(), Residual()))
    assert_trains_alike(model, fused, random(2, 6, 8, 7))
    assert len(training_calls) == 6


@pytest.mark.parametrize("tracked", [False, True])
def test_batch_norm_without_running_statistics(tracked, training_calls):
    model = chain(nn.ReLU())
    model[1] = nn.BatchNorm2d(4, track_running_stats=False)
    model[4] = nn.BatchNorm2d(6, track_running_stats=tracked)
    model = model.double()
    fused = fusedsep.fuse(model)
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert_same([fused.eval()(x)], [model.eval()(x)])
    assert len(training_calls) == 4


def test_the_turns_of_a_shared_batch_norm(training_calls):
    class TakesTurns(nn.Module):
        """Two sites with one BN: those that start first are not the first to update it."""

        def __init__(self, swap):
            super().__init__()
            self.dw, self.bn, self.pw, self.swap = depthwise(4), nn.BatchNorm2d(4), pointwise(4, 4), swap

        def forward(self, x):
            maps = self.dw(x), self.dw(x * 3 + 1)
            maps = maps[::-1] if self.swap else maps
            maps = [F.relu(self.bn(h)) for h in maps]
            return self.pw(maps[0]) + self.pw(maps[1])

    x = random(2, 4, 8, 7)
    for swap, sites in [(False, 2), (True, 1)]:
        training_calls.clear()
        model, fused = pair(TakesTurns(swap))
        assert_trains_alike(model, fused, x, steps=2)
        assert len(training_calls) == 2 * sites


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("path", ["0", "1", "2", "3", "4"])
def test_hooks_see_what_they_always_saw(path, training_calls):
    model, fused = pair(chain(nn.ReLU()))
    x = random(2, 4, 8, 7)
    seen = {}
    for network in (model, fused):
        module = network.get_submodule(path)
        seen[network] = []
        module.register_forward_hook(lambda *_, seen=seen[network]: seen.append(_[2].detach()))
        module.register_full_backward_hook(lambda *_, seen=seen[network]: seen.append(_[2][0].detach()))
    assert_trains_alike(model, fused, x)
    assert len(seen[fused]) == 6
    assert_same(seen[fused], seen[model])
    assert not training_calls


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "fuse again", "defuse"])
def test_copies_in_between(how, training_calls):
    model, fused = pair(MobileNetV2())
    x = random(2, 3, 16, 16)
    train(model, x), train(fused, x)
    if how == "deepcopy":
        fused = copy.deepcopy(fused)
    elif how == "pickle":
        fused = pickle.loads(pickle.dumps(fused))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        fused = torch.load(buffer, weights_only=False)
    elif how == "state_dict":
        state = fused.state_dict()
        fused = fusedsep.fuse(MobileNetV2().double())
        fused.load_state_dict(state)
    elif how == "fuse again":
        fused = fusedsep.fuse(fused)
    else:
        fused = fusedsep.defuse(fused)
    assert fused.training
    training_calls.clear()
    assert_trains_alike(model, fused, x)
    assert len(training_calls) == (0 if how == "defuse" else 9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_checkpointing(reentrant, inside, training_calls):
    class Checkpointed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return checkpoint(self.body, x.requires_grad_(), use_reentrant=reentrant)

    if inside:
        model, fused = pair(Checkpointed(chain(nn.ReLU())))
    else:
        model, fused = map(Checkpointed, pair(chain(nn.ReLU())))
    ours, theirs = (train(network, random(2, 4, 8, 7)) for network in (fused, model))
    # Without reentrance, a checkpoint computes as little as it needs again: buffers may follow once or twice.
    without_buffers = 3 + 2 * len(list(model.parameters()))
    assert_same(ours if reentrant else ours[:without_buffers], theirs if reentrant else theirs[:without_buffers])
    assert len(training_calls) == 3 * 2  # again when the gradient is asked for


def test_saved_bytes():
    """At most the input of the site and its raw pointwise product are kept, besides small tensors."""
    fused = fusedsep.fuse(chain(nn.ReLU()).double())
    x = random(2, 4, 32, 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fused(x)
    assert sorted(tensor.shape for tensor in saved if tensor.dim() == 4 and tensor.numel() > 1000) == [
        x.shape,
        (2, 6, 32, 32),
    ]


def test_a_graph_of_control_flow_keeps_its_fused_parts(training_calls):
    model, fused = pair(Branching(InvertedResidual(4, 4, 1, 6)))
    assert_trains_alike(model, fused, random(2, 4, 8, 7))
    assert len(training_calls) == 3


def test_one_value_per_channel():
    model, fused = pair(chain(nn.ReLU()))
    for network in (model, fused):
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            network(random(1, 4, 1, 1))
