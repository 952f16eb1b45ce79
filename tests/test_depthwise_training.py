# SPDX-License-Identifier: BSD-3-Clause
"""Networks whose depthwise convolutions, BNs and activations are trained as one operation where they are no sites."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from convolutions import PaddedConv, ReflectConv, SameConv
from fused_pairs import assert_same, assert_trains_alike, pair
from models import BatchNormAct2d, SqueezeExcitation, depthwise, pointwise
from randomize import randomized
from test_gated_chains import EfficientNet, Swish, TimmExcitation
from test_kept_input import kept_maps
from torch.utils.checkpoint import checkpoint
from training_pairs import in_format, step
from twins import random

import fusedsep
from fusedsep import _convolution


def inverted_residual(dw=None, activation=nn.ReLU6, between=None, norm=nn.BatchNorm2d):
    """Expansion, ``dw``, projection, and what stands between the last two."""
    dw = dw or depthwise(6, kernel=5)
    channels = dw.out_channels
    layers = [pointwise(4, channels), norm(channels), activation(), dw, norm(channels), activation()]
    return nn.Sequential(*layers, between or nn.Identity(), pointwise(channels, 3), norm(3))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_a_network_trains_as_before(channels_last, depthwise_calls, pointwise_calls, training_calls, small_maps):
    model, fused = pair(EfficientNet())
    x = in_format(random(4, 3, 32, 30), channels_last)
    results = []
    for network in (fused, model):
        torch.manual_seed(0)  # of the dropout
        results.append(step(network, x))
    assert_same(*results)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert len(depthwise_calls) == len(convolutions)
    assert len(pointwise_calls) >= len(convolutions)
    assert not training_calls


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.Identity, Swish])
def test_layers(kernel, stride, activation, depthwise_calls, pointwise_calls, small_maps):
    between = SqueezeExcitation(6) if kernel == 3 else nn.Identity()
    model, fused = pair(inverted_residual(depthwise(6, stride, kernel), activation, between))
    assert_trains_alike(model, fused, random(2, 4, 11, 14))
    assert len(depthwise_calls) == 3
    assert len(pointwise_calls) == 6


@pytest.mark.parametrize(
    "dw",
    [
        nn.Conv2d(6, 6, 5, 1, "same", groups=6),
        nn.Conv2d(6, 6, 7, 2, "valid", groups=6, bias=False),
        nn.Conv2d(6, 6, 5, 2, (0, 3), groups=6),
        SameConv(6, 6, 5, 2, groups=6),
        PaddedConv(6, 6, 7, 1, 2, groups=6),
    ],
    ids=str,
)
def test_paddings_and_biases(dw, depthwise_calls, small_maps):
    model, fused = pair(inverted_residual(copy.deepcopy(dw)))
    assert_trains_alike(model, fused, random(2, 4, 11, 14))
    assert len(depthwise_calls) == 3


@pytest.mark.parametrize("change", [lambda conv: setattr(conv, "sides", (1, 1, 1, 1)), lambda conv: conv.eval()])
def test_a_convolution_that_pads_itself_may_change(change, depthwise_calls, small_maps):
    dw = PaddedConv(6, 6, 5, groups=6)
    dw.sides = dw.sides  # its own
    model, fused = pair(inverted_residual(dw))
    for network in (model, fused):
        change(network[3])
    assert_trains_alike(model, fused, random(2, 4, 11, 14))
    assert not depthwise_calls


def test_only_products_are_kept(small_maps):
    model = randomized(inverted_residual(activation=nn.SiLU)).double().train()
    fused = fusedsep.fuse(model)
    x = random(2, 4, 9, 8)
    maps, _ = kept_maps(fused, x)
    assert sorted(tuple(t.shape) for t in maps.values()) == [(2, 3, 9, 8), (2, 4, 9, 8), (2, 6, 9, 8), (2, 6, 9, 8)]


@pytest.mark.parametrize(
    "dw",
    [
        nn.Conv2d(6, 6, 5, dilation=2, groups=6),
        nn.Conv2d(6, 6, 5, 3, groups=6),
        nn.Conv2d(6, 6, (3, 5), groups=6),
        nn.Conv2d(6, 6, 9, 1, 4, groups=6),
        nn.Conv2d(6, 12, 5, groups=6),
        nn.Conv2d(6, 6, 5, groups=2),
        nn.Conv2d(6, 6, 5, 1, 2, groups=6, padding_mode="reflect"),
        ReflectConv(6, 6, 5, 2, groups=6),
    ],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(dw, depthwise_calls, small_maps):
    if dw.out_channels == 12:
        model = nn.Sequential(pointwise(4, 6), nn.BatchNorm2d(6), dw, nn.BatchNorm2d(12), nn.ReLU(), pointwise(12, 3))
    else:
        model = inverted_residual(copy.deepcopy(dw))
    model, fused = pair(model)
    assert_trains_alike(model, fused, random(2, 4, 12, 12), steps=1)
    assert not depthwise_calls


@pytest.mark.parametrize("what", ["autocast", "too small", "one value", "eval", "replaced"])
def test_what_it_leaves_to_the_modules(what, depthwise_calls, small_maps):
    model, fused = pair(inverted_residual(nn.Conv2d(6, 6, 5, groups=6)))
    x = random(2, 4, 9, 8)
    if what == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same([fused.float()(x.float()).float()], [model.float()(x.float()).float()])
    elif what == "eval":
        for network in (model, fused):
            network.eval()
        assert_same(step(fused, x), step(model, x))
    elif what == "replaced":
        for network in (model, fused):
            network[5] = nn.ELU()
        assert_trains_alike(model, fused, x)
    else:
        x, message = (
            (x[:, :, :4], "Kernel size can't be greater") if what == "too small" else (x[:1, :, :5, :5], "more than 1")
        )
        for network in (model, fused):
            with pytest.raises((RuntimeError, ValueError), match=message):
                network(x)
    assert not depthwise_calls


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("path", ["3", "4", "5"])
def test_hooks_see_what_they_always_saw(path, depthwise_calls, small_maps):
    model, fused = pair(inverted_residual())
    seen = {}
    for network in (model, fused):
        seen[network] = []
        network.get_submodule(path).register_forward_hook(lambda *_, seen=seen[network]: seen.append(_[2].detach()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert_same(seen[fused], seen[model])
    assert not depthwise_calls


def test_frozen_statistics(depthwise_calls, small_maps):
    model, fused = pair(inverted_residual(activation=nn.SiLU))
    for network in (model, fused):
        network[4].eval()
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert len(depthwise_calls) == 2


def test_an_activation_inside_the_batch_norm(depthwise_calls, pointwise_calls, small_maps):
    def norm(channels):
        return BatchNormAct2d(channels, nn.SiLU)

    model, fused = pair(inverted_residual(activation=nn.Identity, norm=norm))
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert len(depthwise_calls) == 2
    assert len(pointwise_calls) == 4


def test_a_residual_and_a_second_reader(depthwise_calls, small_maps):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.side = inverted_residual(activation=nn.SiLU), depthwise(4, kernel=7)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            h = F.silu(self.bn(self.side(x)))
            y = self.body(h)
            return torch.cat([y, h], 1)

    model, fused = pair(Residual())
    assert_trains_alike(model, fused, random(2, 4, 8, 7))
    assert len(depthwise_calls) == 6


def test_checkpointed(depthwise_calls, small_maps):
    model, fused = pair(inverted_residual(activation=nn.SiLU))
    x = random(2, 4, 12, 11)
    results = []
    for network in (model, fused):
        checkpoint(network, x, use_reentrant=False).square().sum().backward()
        results.append([parameter.grad for parameter in network.parameters()])
    assert_same(*results)
    assert len(depthwise_calls) == 2


def test_second_derivatives_through_a_network(depthwise_calls, small_maps):
    model, fused = pair(inverted_residual(activation=nn.SiLU, between=TimmExcitation(6)))
    x, results = random(2, 4, 8, 7), []
    for network in (model, fused):
        parameters = list(network.parameters())
        grads = torch.autograd.grad(network(x).square().sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters))
    assert_same(*results)
    assert len(depthwise_calls) == 1


def test_compiled(depthwise_calls, small_maps):
    torch._dynamo.reset()
    model, fused = pair(inverted_residual(activation=nn.SiLU))
    x = random(2, 4, 8, 7)
    assert_same(step(torch.compile(fused, backend="aot_eager", fullgraph=True), x), step(model, x))
    assert depthwise_calls


def test_maps_too_small_to_be_worth_it(depthwise_calls):
    model, fused = pair(inverted_residual())
    for size, calls in [((2, 4, 73, 74), 0), ((2, 4, 73, 75), 1)]:
        assert_same(step(fused, random(*size)), step(model, random(*size)))
        assert len(depthwise_calls) == calls
    assert 6 * 2 * 73 * 74 < _convolution.LEAST_NUMBERS <= 6 * 2 * 73 * 75
