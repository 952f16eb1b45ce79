# SPDX-License-Identifier: BSD-3-Clause
"""Networks whose pointwise convolutions, BNs and activations are trained as one operation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fused_pairs import assert_same, assert_trains_alike, pair
from models import BatchNormAct2d, MobileNetV2, depthwise, pointwise
from randomize import randomized
from test_kept_input import every_input_kept, kept_maps
from training_pairs import in_format, step
from twins import random

import fusedsep
from fusedsep import _convolution
from fusedsep._convolution import ConvNormActivation

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expansions_train_in_one_operation(channels_last, dtype, pointwise_calls, training_calls, small_maps):
    model = randomized(MobileNetV2()).train().to(dtype)
    model.classifier[0].p = 0.0
    fused = fusedsep.fuse(model)
    x = in_format(random(4, 3, 32, 32, dtype=dtype), channels_last)
    if dtype == torch.float64:
        assert_same(step(fused, x), step(model, x))
    else:
        exact = step(copy.deepcopy(model).double(), x.double())
        for ours, theirs, expected in zip(step(fused, x), step(model, x), exact, strict=True):
            error, allowed = (ours - expected).abs().max(), (theirs - expected).abs().max()
            assert error <= 3 * allowed + 1e-6 * expected.abs().max().clamp(min=1)
    assert len(pointwise_calls) == len(training_calls) == 3
    assert len(pointwise_calls) == 3


def test_no_map_of_an_expansion_is_kept_but_its_product(small_maps):
    model = randomized(MobileNetV2()).train().double()
    model.classifier[0].p = 0.0
    fused, other = fusedsep.fuse(model), fusedsep.fuse(model)
    x = random(2, 3, 40, 40)
    maps, y = kept_maps(fused, x)
    wide = [tuple(t.shape) for t in maps.values() if t.shape[1] in (30, 42)]
    assert sorted(wide) == [(2, 30, 20, 20), (2, 42, 10, 10)]
    y.sum().backward()
    with every_input_kept():
        other(x).sum().backward()
    for ours, theirs in zip(fused.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_second_derivatives_through_a_network(small_maps):
    model = nn.Sequential(
        *(pointwise(3, 6), nn.BatchNorm2d(6), nn.ReLU6()),
        *(depthwise(6), nn.BatchNorm2d(6), nn.ReLU6(), pointwise(6, 4), nn.BatchNorm2d(4)),
        *(pointwise(4, 5), nn.BatchNorm2d(5), nn.Hardswish()),
    )
    model, fused = pair(model)
    x = random(2, 3, 6, 5)
    results = []
    for network in (model, fused):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [leaf, *network.parameters()]))
    assert_same(*results)


def with_expansion(bn=None, activation=None):
    """An expansion and a site behind it."""
    first = [pointwise(4, 6), bn or nn.BatchNorm2d(6), activation or nn.ReLU6()]
    site = [depthwise(6), nn.BatchNorm2d(6), nn.ReLU6(), pointwise(6, 4), nn.BatchNorm2d(4)]
    return nn.Sequential(nn.Sequential(*first), nn.Sequential(*site))


def test_modes_of_the_batch_norm(pointwise_calls, small_maps):
    model, fused = pair(with_expansion())
    x = random(2, 4, 8, 7)
    for network in (model, fused):
        network[0][1].eval()
    assert_trains_alike(model, fused, x, steps=2)
    assert len(pointwise_calls) == 2
    with torch.no_grad():
        assert_same([fused(x)], [model(x)])
    assert len(pointwise_calls) == 2  # nothing to be gained
    for network in (model, fused):
        network.eval()
    assert_same(step(fused, x), step(model, x))
    assert len(pointwise_calls) == 2


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_statistics_follow_without_gradients(momentum, pointwise_calls, small_maps):
    model, fused = pair(with_expansion(nn.BatchNorm2d(6, momentum=momentum)))
    with torch.no_grad():
        for x in (random(2, 4, 8, 7), random(1, 4, 5, 6)):
            assert_same([fused(x)], [model(x)])
    assert_same(list(fused.buffers()), list(model.buffers()))
    assert len(pointwise_calls) == 2


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("path", ["0", "0.0", "0.1", "0.2"])
def test_hooks_see_what_they_always_saw(path, pointwise_calls, small_maps):
    model, fused = pair(with_expansion())
    seen = {}
    for network in (model, fused):
        seen[network] = []
        network.get_submodule(path).register_forward_hook(lambda *_, seen=seen[network]: seen.append(_[2].detach()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert_same(seen[fused], seen[model])
    assert len(pointwise_calls) == (2 if path == "0" else 0)


@pytest.mark.parametrize("what", ["replaced", "autocast", "one pixel", "three dimensions"])
def test_what_it_leaves_to_the_modules(what, pointwise_calls, small_maps):
    model, fused = pair(with_expansion())
    x = random(2, 4, 8, 7)
    if what == "replaced":
        for network in (model, fused):
            network[0][2] = nn.SiLU()
        assert_trains_alike(model, fused, x)
    elif what == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same([fused.float()(x.float()).float()], [model.float()(x.float()).float()])
    else:
        x, error = (x[:1, :, :1, :1], "more than 1 value per channel") if what == "one pixel" else (x[0], "4D input")
        for network in (model, fused):
            with pytest.raises(ValueError, match=error):
                network(x)
    assert not pointwise_calls


def test_an_activation_inside_the_batch_norm(pointwise_calls, training_calls, small_maps):
    model, fused = pair(with_expansion(BatchNormAct2d(6), nn.Identity()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert len(pointwise_calls) == len(training_calls) == 2


def test_the_turns_of_a_shared_batch_norm(pointwise_calls, small_maps):
    class TakesTurns(nn.Module):
        """Two convolutions with one BN: the one that starts first is not the first to update it."""

        def __init__(self, swap):
            super().__init__()
            self.a, self.b, self.bn, self.swap = pointwise(4, 6), pointwise(4, 6), nn.BatchNorm2d(6), swap
            self.site = nn.Sequential(depthwise(6), nn.ReLU(), pointwise(6, 4))

        def forward(self, x):
            maps = self.a(x), self.b(x)
            maps = maps[::-1] if self.swap else maps
            first, second = [F.relu(self.bn(h)) for h in maps]
            return self.site(first - second)

    for swap, calls in [(False, 2), (True, 1)]:
        pointwise_calls.clear()
        model, fused = pair(TakesTurns(swap))
        assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=1)
        assert len(pointwise_calls) == calls


def test_networks_without_a_depthwise_convolution_stay_as_they_are(pointwise_calls, small_maps):
    model, fused = pair(nn.Sequential(pointwise(4, 6), nn.BatchNorm2d(6), nn.ReLU()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7))
    assert not pointwise_calls


def test_compiled(pointwise_calls, small_maps):
    torch._dynamo.reset()
    model, fused = pair(with_expansion())
    x = random(2, 4, 8, 7)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, x), step(model, x))
    assert pointwise_calls


@pytest.mark.parametrize(("size", "calls"), [((2, 4, 73, 74), 0), ((2, 4, 73, 75), 1)])
def test_maps_too_small_to_be_worth_it(size, calls, pointwise_calls):
    model, fused = pair(with_expansion())
    assert_same(step(fused, random(*size)), step(model, random(*size)))
    assert 6 * 2 * 73 * 74 < _convolution.LEAST_NUMBERS <= 6 * 2 * 73 * 75
    assert len(pointwise_calls) == calls


def test_its_repr_tells_the_activation():
    assert repr(ConvNormActivation("relu6")) == "ConvNormActivation(relu6)"
