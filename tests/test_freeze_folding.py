# SPDX-License-Identifier: BSD-3-Clause
"""BNs behind the layers of a frozen chain are folded into them, unless something else reads either."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from models import BatchNormAct2d, ConvBNAct, MobileNetV2, depthwise, pointwise
from randomize import randomized
from test_gated_chains import EfficientNet
from test_residual_chains import TimmMobileNet
from zoo import assert_as_close_to_float64

import fusedsep


def norms_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("make", [MobileNetV2, EfficientNet, TimmMobileNet])
def test_no_norm_is_left(make, chain_calls):
    model = randomized(make()).eval()
    before = copy.deepcopy(model.state_dict())
    frozen, x = fusedsep.freeze(model), torch.randn(2, 3, 33, 36)
    assert norms_of(model) and not norms_of(frozen)
    with torch.no_grad():
        assert_as_close_to_float64(frozen, model, x)
    assert len(chain_calls) == 1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_parts_run_on_their_own():
    """Also those whose BN applied an activation itself."""
    model = randomized(TimmMobileNet()).eval()
    frozen, x = fusedsep.freeze(model), torch.randn(2, 3, 33, 36)
    with torch.no_grad():
        ours, expected = frozen.bn1(frozen.conv_stem(x)), model.bn1(model.conv_stem(x))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(frozen.blocks(ours), model.blocks(expected))
    assert type(model.bn1) is BatchNormAct2d and isinstance(frozen.bn1, (nn.ReLU, nn.ReLU6, nn.SiLU))


def test_layer_by_layer_and_in_channels_last():
    model = randomized(EfficientNet()).eval().to(memory_format=torch.channels_last)
    frozen = fusedsep.freeze(model)
    x = torch.randn(2, 3, 33, 36, requires_grad=True)
    torch.testing.assert_close(frozen(x), model(x))
    for name, parameter in frozen.named_parameters():
        assert name not in dict(model.named_parameters()) or parameter.stride() == model.get_parameter(name).stride()


class Net(nn.Module):
    """A 1x1 convolution with its BN in front of a site, and what a test does with either."""

    def __init__(self, also=lambda net, x, y: y):
        super().__init__()
        self.conv, self.bn, self.act = pointwise(4, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.dw, self.pw = depthwise(8, bias=True), pointwise(8, 4)
        self.also = also

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return self.also(self, x, self.pw(self.act(self.dw(y))))


def norm_called_twice(net, x, y):
    return net.bn(y.repeat(1, 2, 1, 1))


def convolution_called_twice(net, x, y):
    return y.repeat(1, 2, 1, 1) + net.conv(x)


def norm_read(net, x, y):
    return y * net.bn.weight[0]


def weight_read(net, x, y):
    return y + net.conv.weight.sum()


OTHER_USES = {
    "norm called twice": norm_called_twice,
    "convolution called twice": convolution_called_twice,
    "norm read": norm_read,
    "weight read": weight_read,
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_what_something_else_uses_stays(name):
    model = randomized(Net(OTHER_USES[name])).eval()
    frozen = fusedsep.freeze(model)
    assert norms_of(frozen) == ["bn"]
    with torch.no_grad():
        assert_as_close_to_float64(frozen, model, torch.randn(2, 4, 9, 10))


def test_what_another_module_holds_stays():
    """It may call it where no trace shows that."""

    class Other(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.conv = net, net.conv

        def forward(self, x):
            if x.sum() > 0:  # no graph
                return self.net(x), self.conv(x)
            return self.net(-x), self.conv(-x)

    model = randomized(Other(Net())).eval()
    frozen, x = fusedsep.freeze(model), torch.randn(2, 4, 9, 10)
    assert norms_of(frozen) == ["net.bn"]
    with torch.no_grad():
        for ours, expected in zip(frozen(x), model(x), strict=True):
            torch.testing.assert_close(ours, expected)


def test_hooks_and_parametrizations_stay():
    x = torch.randn(2, 4, 9, 10)
    for change in (
        lambda net: net.bn.register_forward_hook(lambda module, args, y: y + 1),
        lambda net: net.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda net: nn.utils.parametrize.register_parametrization(net.conv, "weight", nn.Tanh()),
    ):
        model = randomized(Net()).eval()
        change(model)
        frozen = fusedsep.freeze(model)
        assert norms_of(frozen) == ["bn"]
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model(x))


def test_tied_weights_are_folded_each_for_itself():
    model = nn.Sequential(ConvBNAct(8, 8, 1), nn.Sequential(depthwise(8), pointwise(8, 8)), ConvBNAct(8, 8, 1))
    model[2][0].weight = model[0][0].weight
    model = randomized(model).eval()
    frozen, x = fusedsep.freeze(model), torch.randn(2, 8, 9, 10)
    assert not norms_of(frozen)
    with torch.no_grad():
        assert_as_close_to_float64(frozen, model, x)


class Pair(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = depthwise(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv(x))


class Indexed(nn.Module):
    """Containers whose layers are called one by one, and not all of them."""

    def __init__(self, opaque):
        super().__init__()
        self.first = nn.Sequential(pointwise(4, 8), nn.BatchNorm2d(8), nn.ReLU())
        large = depthwise(8, kernel=5, padding=2)
        self.second = nn.Sequential(large, nn.BatchNorm2d(8), nn.ReLU(), pointwise(8, 5), nn.BatchNorm2d(5))
        self.pair, self.opaque = Pair(5), opaque

    def forward(self, x):
        x = self.first[0](x) if not self.opaque or x.sum() != 0 else x
        y = self.second[3](self.second[2](self.second[0](x)))
        return self.pair.conv(y) + self.second[4](self.second[3](self.second[1](x)))


@pytest.mark.parametrize("opaque", [False, True])
def test_layers_of_containers_that_are_called_one_by_one(opaque):
    model, x = randomized(Indexed(opaque)).eval(), torch.randn(2, 4, 9, 10)
    frozen = fusedsep.freeze(model)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))
        torch.testing.assert_close(frozen.first(x), model.first(x))
        torch.testing.assert_close(fusedsep.fuse(model)(x), model(x))
