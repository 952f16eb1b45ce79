# SPDX-License-Identifier: BSD-3-Clause
"""Networks whose 3x3 convolution of images, its BN and its activation are trained as one operation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from convolutions import SameConv
from fused_pairs import assert_same, assert_trains_alike, pair
from models import MobileNetV2, depthwise, pointwise
from randomize import randomized
from test_kept_input import kept_maps
from torch.utils.checkpoint import checkpoint
from training_pairs import in_format
from twins import random

import fusedsep
from fusedsep import _convolution, reference

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])


def first_and_site(first=None, activation=None):
    """A first convolution and a site behind it."""
    first = first or nn.Conv2d(3, 6, 3, 2, 1, bias=False)
    channels = first.out_channels
    site = [depthwise(channels), nn.BatchNorm2d(channels), nn.ReLU6(), pointwise(channels, 4), nn.BatchNorm2d(4)]
    return nn.Sequential(nn.Sequential(first, nn.BatchNorm2d(channels), activation or nn.ReLU6()), nn.Sequential(*site))


def step(model, x):
    """Output, gradients of the parameters, and buffers after one step on images."""
    y = model(x)
    model.zero_grad()
    y.backward(random(*y.shape, seed=1, dtype=y.dtype))
    gradients = [parameter.grad for parameter in model.parameters()]
    return [y.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


@FORMATS
@pytest.mark.parametrize(
    "make",
    [MobileNetV2, lambda: reference.MobileNetV1(7, 0.25), lambda: fusedsep.MobileNetV1(7, 0.25, padding="same")],
    ids=["MobileNetV2", "MobileNetV1", "blocks"],
)
def test_networks_train_as_before(make, channels_last, convolution_calls, small_maps):
    model, fused = pair(make())
    for module in (*model.modules(), *fused.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = in_format(random(4, 3, 64, 64), channels_last)
    assert_same(step(fused, x), step(model, x))
    assert len(convolution_calls) == 1


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("images", [False, True], ids=["", "images"])
def test_the_format_is_what_torch_makes_of_it(weights, images, convolution_calls, small_maps):
    model = randomized(first_and_site()).train()
    if weights:
        model.to(memory_format=torch.channels_last)
    fused, x = fusedsep.fuse(model), in_format(random(2, 3, 16, 15, dtype=torch.float32), images)
    for path in ("0", ""):
        ours, theirs = (network.get_submodule(path)(x) for network in (fused, model))
        assert ours.stride() == theirs.stride()
    assert len(convolution_calls) == 2


@pytest.mark.parametrize(
    "first", [nn.Conv2d(1, 6, 3, 1, "same", 2), nn.Conv2d(4, 6, 3, 2, (0, 2)), nn.Conv2d(8, 5, 3), SameConv(3, 6, 3, 2)]
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardswish(), nn.Identity()])
def test_convolutions(first, activation, convolution_calls, small_maps):
    model, fused = pair(first_and_site(copy.deepcopy(first), activation))
    assert_trains_alike(model, fused, random(2, first.in_channels, 11, 14))
    assert len(convolution_calls) == 3


def test_only_the_image_and_the_product_are_kept(small_maps):
    _, fused = pair(first_and_site(nn.Conv2d(3, 7, 3, 2, 1)))
    x = random(2, 3, 40, 40)
    maps, _ = kept_maps(fused, x)
    assert sorted(tuple(t.shape) for t in maps.values()) == [(2, 3, 40, 40), (2, 4, 20, 20), (2, 7, 20, 20)]


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(9, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(3, 6, 3, 3),
        nn.Conv2d(3, 6, 3, (1, 2)),
        nn.Conv2d(3, 6, 3, dilation=(1, 2)),
        nn.Conv2d(3, 6, 5),
        nn.Conv2d(3, 6, 3, 1, 1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(first, convolution_calls, small_maps):
    model, fused = pair(first_and_site(copy.deepcopy(first)))
    assert_trains_alike(model, fused, random(2, first.in_channels, 12, 12), steps=1)
    assert not convolution_calls


@pytest.mark.parametrize("what", ["gradient of the image", "autocast", "too small", "one value", "eval"])
def test_what_it_leaves_to_the_modules(what, convolution_calls, small_maps):
    model, fused = pair(first_and_site(nn.Conv2d(3, 6, 3, 2)))
    x = random(2, 3, 9, 8)
    if what == "gradient of the image":
        gradients = []
        for network in (model, fused):
            leaf = x.clone().requires_grad_()
            network(leaf).square().sum().backward()
            gradients.append(leaf.grad)
        assert_same(gradients[:1], gradients[1:])
    elif what == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same([fused.float()(x.float()).float()], [model.float()(x.float()).float()])
    elif what == "eval":
        for network in (model, fused):
            network.eval()
        with torch.no_grad():
            assert_same([fused(x)], [model(x)])
    else:
        x, message = (
            (x[:, :, :2], "Kernel size can't be greater") if what == "too small" else (x[:1, :, :3, :3], "more")
        )
        for network in (model, fused):
            with pytest.raises((RuntimeError, ValueError), match=message):
                network(x)
    assert not convolution_calls


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("path", ["0", "0.0", "0.1", "0.2"])
def test_hooks_see_what_they_always_saw(path, convolution_calls, small_maps):
    model, fused = pair(first_and_site())
    seen = {}
    for network in (model, fused):
        seen[network] = []
        network.get_submodule(path).register_forward_hook(lambda *_, seen=seen[network]: seen.append(_[2].detach()))
    assert_trains_alike(model, fused, random(2, 3, 8, 7), steps=2)
    assert_same(seen[fused], seen[model])
    assert len(convolution_calls) == (2 if path == "0" else 0)


def test_frozen_statistics(convolution_calls, small_maps):
    model, fused = pair(first_and_site())
    for network in (model, fused):
        network[0][1].eval()
    assert_trains_alike(model, fused, random(2, 3, 8, 7), steps=2)
    assert len(convolution_calls) == 2


def test_checkpointed(convolution_calls, small_maps):
    model, fused = pair(first_and_site())
    x = random(2, 3, 12, 11)
    results = []
    for network in (model, fused):
        checkpoint(network, x, use_reentrant=False).square().sum().backward()
        results.append([parameter.grad for parameter in network.parameters()])
    assert_same(*results)
    assert len(convolution_calls) == 2


def test_second_derivatives_through_a_network(convolution_calls, small_maps):
    model, fused = pair(first_and_site(activation=nn.Hardswish()))
    x, results = random(2, 3, 8, 7), []
    for network in (model, fused):
        parameters = list(network.parameters())
        grads = torch.autograd.grad(network(x).square().sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters))
    assert_same(*results)
    assert len(convolution_calls) == 1


def test_compiled(convolution_calls, small_maps):
    torch._dynamo.reset()
    model, fused = pair(first_and_site())
    x = random(2, 3, 8, 7)
    assert_same(step(torch.compile(fused, backend="aot_eager", fullgraph=True), x), step(model, x))
    assert convolution_calls


def test_maps_too_small_to_be_worth_it(convolution_calls):
    model, fused = pair(first_and_site())
    for size, calls in [((2, 3, 146, 147), 0), ((2, 3, 146, 149), 1)]:
        assert_same(step(fused, random(*size)), step(model, random(*size)))
        assert len(convolution_calls) == calls
    assert 6 * 2 * 73 * 74 < _convolution.LEAST_NUMBERS <= 6 * 2 * 73 * 75
