# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers and LayerNorm of the channels of each pixel, and factors of channels, run in chains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_branching_chains import assert_outputs
from test_residual_chains import assert_chains, assert_one_image_and_threads_give_the_same_bits, layers_of, plain

import fusedsep
from fusedsep._ops import DEPTHWISE_MAP, NORMALIZED_PIXELS, PIXELS, SUM

WIDTH = 12


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision and timm."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class OwnLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, weight=self.weight, bias=self.bias, eps=self.eps)


class Permute(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class Scaled(nn.Module):
    """Has factors of channels: a parameter of random numbers, of any shape."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))


class LinearBlock(Scaled):
    """timm's block of ConvNeXt with linear layers."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__(WIDTH)
        self.dw = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.norm = norm(WIDTH, eps=1e-6)
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(WIDTH, 40), nn.GELU(), nn.Dropout(0.2), nn.Linear(40, WIDTH)

    def forward(self, x):
        y = self.dw(x).permute(0, 2, 3, 1)
        y = self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm(y)))))).permute(0, 3, 1, 2)
        return y.mul(self.gamma.reshape(1, -1, 1, 1)) + x


class ConvolutionBlock(LinearBlock):
    """The same with 1x1 convolutions."""

    def __init__(self):
        super().__init__(LayerNorm2d)
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, 40, 1), nn.Conv2d(40, WIDTH, 1, bias=False)

    def forward(self, x):
        y = self.fc2(self.drop(self.act(self.fc1(self.norm(self.dw(x))))))
        return x + y * self.gamma.view(1, -1, 1, 1)


class TorchvisionBlock(Scaled):
    def __init__(self):
        super().__init__(WIDTH, 1, 1)
        self.block = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(WIDTH, eps=1e-6),
            nn.Linear(WIDTH, 40),
            nn.GELU(),
            nn.Linear(40, WIDTH, bias=False),
            Permute([0, 3, 1, 2]),
        )

    def forward(self, x):
        result = self.gamma * self.block(x)
        result += x
        return result


class EdgeBlock(LinearBlock):
    """As in EdgeNeXt: factors in front of the permutation, and torch's LayerNorm in a class of its own."""

    def __init__(self):
        super().__init__(OwnLayerNorm)

    def forward(self, x):
        y = self.norm(torch.permute(self.dw(x), dims=(0, 2, 3, -3)))
        return x + (self.gamma * self.fc2(F.silu(self.fc1(y)))).permute([0, -1, 1, 2])


class PlainBlock(LinearBlock):
    """Without a norm, and with one that has no numbers in front of the second layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(40, elementwise_affine=False)

    def forward(self, x):
        y = self.fc2(self.norm(F.relu(self.fc1(self.dw(x).permute(0, 2, 3, 1)))))
        return F.hardswish(y.permute(0, 3, 1, 2)) + x


BLOCKS = {block.__name__: block for block in (LinearBlock, ConvolutionBlock, TorchvisionBlock, EdgeBlock, PlainBlock)}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_one_call(name, chain_calls):
    torch.manual_seed(0)
    block = [*plain(DEPTHWISE_MAP, NORMALIZED_PIXELS), (PIXELS, 0)]
    later = [*block[:-1], (PIXELS, 3)]
    if name == "PlainBlock":  # an activation between the second product and the sum
        block = [*plain(DEPTHWISE_MAP, PIXELS, NORMALIZED_PIXELS), (SUM, 0)]
        later = [*block[:-1], (SUM, 4)]
    assert_chains(
        nn.Sequential(BLOCKS[name](), BLOCKS[name]()), torch.randn(2, WIDTH, 9, 10), chain_calls, [block + later]
    )


def test_one_image_and_threads_give_the_same_bits():
    torch.manual_seed(1)
    model = nn.Sequential(LinearBlock(), ConvolutionBlock(), EdgeBlock())
    assert_one_image_and_threads_give_the_same_bits(model, torch.randn(5, WIDTH, 21, 20))


class Other(LinearBlock):
    """A block with another body."""

    def __init__(self, body, **parts):
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.body(self, self.dw(x))


def linears(block, y, behind=lambda y: y):
    return behind(block.fc2(block.act(block.fc1(y.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


OTHERS = {
    "another permutation": Other(lambda b, y: b.fc2(b.fc1(y.permute(0, 3, 2, 1))).permute(0, 3, 2, 1)),
    "only one permutation": Other(lambda b, y: b.fc2(b.fc1(y.permute(0, 2, 3, 1)))),
    "a second reader": Other(lambda b, y: linears(b, y, lambda z: z + z.mean())),
    "a norm of the whole image": Other(lambda b, y: b.norm(y), norm=nn.LayerNorm((WIDTH, 9, 10))),
    "a norm of columns": Other(lambda b, y: b.fc1(b.norm(y)), norm=nn.LayerNorm(10), fc1=nn.Linear(10, 7)),
    "a norm and a 3x3 convolution": Other(
        lambda b, y: b.fc1(b.norm(y)), norm=LayerNorm2d(WIDTH), fc1=nn.Conv2d(WIDTH, 8, 3)
    ),
    "two norms": Other(lambda b, y: b.norm(b.norm(y)), norm=LayerNorm2d(WIDTH)),
    "a norm at the end": Other(lambda b, y: b.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "an approximation": Other(lambda b, y: linears(b, y), act=nn.GELU("tanh")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_give_what_torch_gives(name, chain_calls):
    torch.manual_seed(2)
    assert_outputs(copy.deepcopy(OTHERS[name]).eval(), torch.randn(2, WIDTH, 9, 10))
    assert not any(len(call) > 1 for call in layers_of(chain_calls))


class Factors(Scaled):
    """Factors in several forms behind a separable convolution."""

    def __init__(self, multiply, *shape, act=False):
        super().__init__(*shape)
        self.dw, self.bn = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm2d(WIDTH)
        self.pw, self.last = nn.Conv2d(WIDTH, 10, 1), nn.Conv2d(10, 10, 5, padding=2, groups=10)
        self.multiply, self.act = multiply, nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.last(self.multiply(self.act(self.pw(F.silu(self.bn(self.dw(x))))), self.gamma))


FACTORS = {
    "of a map": Factors(lambda y, g: g * y, 10, 1, 1),
    "with a batch": Factors(lambda y, g: y * g, 1, 10, 1, 1),
    "in place": Factors(lambda y, g: y.mul_(g), 10, 1, 1),
    "reshaped": Factors(lambda y, g: torch.mul(y, torch.reshape(g, (1, -1, 1, 1))), 10),
}
OTHER_FACTORS = {
    "of columns": Factors(lambda y, g: y * g, 10),
    "of pixels": Factors(lambda y, g: y * g, 9, 10),
    "of each number": Factors(lambda y, g: y * g, 10, 9, 10),
    "one": Factors(lambda y, g: y * g, 1),
    "computed": Factors(lambda y, g: y * g.exp(), 10, 1, 1),
    "read twice": Factors(lambda y, g: y * g + g, 10, 1, 1),
    "added": Factors(lambda y, g: y + g, 10, 1, 1),
    "behind an activation": Factors(lambda y, g: y * g, 10, 1, 1, act=True),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_part_of_a_product(name, chain_calls):
    torch.manual_seed(3)
    expected = [plain(DEPTHWISE_MAP, PIXELS, DEPTHWISE_MAP)]
    assert_chains(copy.deepcopy(FACTORS[name]), torch.randn(2, WIDTH, 9, 10), chain_calls, expected)


@pytest.mark.parametrize("name", OTHER_FACTORS)
def test_other_factors_end_a_chain(name, chain_calls):
    torch.manual_seed(3)
    assert_outputs(copy.deepcopy(OTHER_FACTORS[name]).eval(), torch.randn(2, WIDTH, 9, 10))
    assert not any(len(call) > 2 for call in layers_of(chain_calls))


def change_factors(model):
    model[1].gamma.data.mul_(2)


def change_norm(model):
    model[1].norm.weight.data.add_(1)


def change_eps(model):
    model[1].norm.eps = 0.5


def change_linear(model):
    model[1].fc2.bias = None


def change_parameter(model):
    model[1].gamma = nn.Parameter(torch.ones(WIDTH))


@pytest.mark.parametrize("change", [change_factors, change_norm, change_eps, change_linear, change_parameter])
def test_changes_count(change):
    torch.manual_seed(4)
    model, x = nn.Sequential(LinearBlock(), LinearBlock()).eval(), torch.randn(1, WIDTH, 9, 10)
    fused = fusedsep.fuse(model)
    with torch.no_grad():
        before = fused(x)
        change(model), change(fused)
        expected = model(x)
        assert not torch.allclose(before, expected, atol=1e-3)
        torch.testing.assert_close(fused(x), expected)
        torch.testing.assert_close(fusedsep.freeze(fused)(x), expected)


def test_copies_and_gradients():
    torch.manual_seed(5)
    model, x = nn.Sequential(LinearBlock(), TorchvisionBlock()).eval(), torch.randn(1, WIDTH, 9, 10)
    twin = copy.deepcopy(fusedsep.fuse(model))
    change_factors(nn.Sequential(model[0], model[0]))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), model(x))
    twin(x).square().sum().backward(), model(x).square().sum().backward()
    for ours, torchs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-4, atol=1e-4)
