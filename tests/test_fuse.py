# SPDX-License-Identifier: BSD-3-Clause
"""``fuse`` finds every site, leaves look-alikes alone, and changes nothing but the speed."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from article import ShortBlock
from copies import WAYS, copied
from models import MobileNetV2, PaddedBlock, WithDefaults, chain, depthwise, pointwise
from randomize import randomized
from zoo import FUSABLE, LOOK_ALIKES, assert_as_close_to_float64, build, tensors_of

import fusedsep
from fusedsep._chain import LayerChain
from fusedsep._chain_convolutions import Site
from fusedsep.surgery.program import FusedConvolution


def regenerated(model):
    return [module for module in model.modules() if "forward" in vars(module)]


def sites_of(module):
    """Those that its forward runs in eval mode, one by one or in chains."""
    program = module.forward.programs.get(False)
    for site in program.sites.values() if program is not None else ():
        if isinstance(site, LayerChain):
            yield from (element for element in site.elements if isinstance(element, Site))
        else:
            yield site


@pytest.mark.parametrize("name", FUSABLE)
def test_every_site_runs_as_one_operation(name, site_calls):
    model, x, sites = build(FUSABLE[name])
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        fused = fusedsep.fuse(model)
        assert len({id(site.dw) for m in regenerated(fused) for site in sites_of(m)}) == sites
        assert not regenerated(model)
        fused(x)
        assert len(site_calls) >= sites
        assert_as_close_to_float64(fused, model, x)
        assert_as_close_to_float64(fused, model, x.contiguous(memory_format=torch.channels_last))
    assert fused.state_dict().keys() == keys.keys()
    assert all(torch.equal(value, keys[key]) for key, value in fused.state_dict().items())


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone(name):
    model, x, _ = build(LOOK_ALIKES[name])
    fused = fusedsep.fuse(model)
    assert not any(list(sites_of(module)) for module in regenerated(fused))
    # The depthwise convolution and its BN may be one operation, without the pointwise one.
    calls = [
        call
        for module in regenerated(fused)
        for program in module.forward.programs.values()
        for call in program.sites.values()
    ]
    assert all(isinstance(call, (FusedConvolution, LayerChain)) for call in calls)
    with torch.no_grad():
        for ours, expected in zip(tensors_of(fused(x)), tensors_of(model(x)), strict=True):
            torch.testing.assert_close(ours, expected)
    fused.train(), model.train()
    assert all(map(torch.equal, tensors_of(fused(x)), tensors_of(model(x))))


def test_padding_is_absorbed_only_where_it_is_zeros():
    def pre_pad(pad):
        fused = fusedsep.fuse(PaddedBlock(4, pad).eval())
        (site,) = fused.forward.programs[False].sites.values()
        return tuple(site.separable.pre_pad)

    assert pre_pad(None) == pre_pad(nn.ZeroPad2d((0, 1, 0, 1))) == (0, 1, 0, 1)
    assert pre_pad(nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((0, 1, 2, 0), 0.0))) == (1, 2, 3, 1)
    for in_front in (nn.ConstantPad2d(1, 1.0), nn.ZeroPad2d((-1, 1, 0, 0)), nn.ReplicationPad2d(1)):
        assert pre_pad(in_front) == (0, 0, 0, 0)


def test_padding_that_something_else_reads_stays_in_front():
    class TwoReaders(PaddedBlock):
        def forward(self, x):
            padded = self.pad(x)
            return self.pw(F.relu(self.bn1(self.dw(padded)))), padded.sum()

    model = TwoReaders(4, nn.ZeroPad2d(1)).eval()
    fused = fusedsep.fuse(model)
    (site,) = fused.forward.programs[False].sites.values()
    assert tuple(site.separable.pre_pad) == (0, 0, 0, 0)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(fused(x), model(x))


def test_owner_is_the_innermost_module_that_holds_the_site():
    fused = fusedsep.fuse(MobileNetV2().eval())
    in_eval = [module for module in regenerated(fused) if False in module.forward.programs]
    assert in_eval == [fused, *(fused.features[i].conv for i in (1, 2, 3))]  # the first one has the chains
    others = [module for module in regenerated(fused) if module not in in_eval]
    features = fused.features  # the first convolution, and 1x1 convolutions
    assert others == [features[0], features[2].conv[0], features[3].conv[0], features[4]]


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_by_default_and_modes_are_kept(training):
    model = MobileNetV2().train(training)
    model.features[0].train(not training)
    modes = [module.training for module in model.modules()]
    fused = fusedsep.fuse(model)
    assert fused is not model
    assert [module.training for module in fused.modules()] == modes
    assert [module.training for module in model.modules()] == modes
    assert fusedsep.fuse(model, inplace=True) is model


def test_fusing_twice_is_fusing_once(kernel_calls):
    model = MobileNetV2().eval()
    twice = fusedsep.fuse(fusedsep.fuse(model))
    assert [type(m) for m in twice.modules()] == [type(m) for m in model.modules()]
    twice(torch.randn(1, 3, 16, 16))
    assert len(kernel_calls) == 3


def test_defuse_restores(kernel_calls):
    model = fusedsep.fuse(MobileNetV2().eval())
    assert fusedsep.defuse(model) is model
    assert not regenerated(model)
    model(torch.randn(1, 3, 16, 16))
    assert not kernel_calls


def test_block_class_is_left_as_it_is():
    model = nn.Sequential(fusedsep.DepthwiseSeparableBlock(4, 6), nn.ReLU()).eval()
    assert not regenerated(fusedsep.fuse(model))


@pytest.mark.parametrize("how", WAYS)
def test_copies_run_their_own_modules(how, site_calls):
    model = randomized(MobileNetV2()).eval()
    fused = fusedsep.fuse(model)
    twin = copied(fused, how)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(twin(x), fused(x))
        before = fused(x)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(twin(x), before)
        assert torch.equal(fused(x), before)
    assert len(site_calls) == 15


def test_in_place_change_of_the_input_after_the_site_started():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw, self.pw = depthwise(4), pointwise(4, 4)

        def forward(self, x):
            x = x * 1
            h = self.dw(x)
            x.relu_()
            return self.pw(F.relu(h)) + x

    model = InPlace().eval()
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(fusedsep.fuse(model)(x), model(x))


def test_shared_block_and_shared_activation(kernel_calls):
    block = randomized(ShortBlock(4, 4))
    model = nn.Sequential(block, nn.ReLU(), block).eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(fused(x), model(x))
    assert len(kernel_calls) == 2


def test_gradients_in_eval_mode():
    model = randomized(MobileNetV2()).double().eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    for network in (model, fused):
        network(x).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_parametrized_convolutions_are_fused(kernel_calls):
    model = chain(nn.ReLU()).eval()
    nn.utils.parametrizations.weight_norm(model[3])
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert_as_close_to_float64(fused, model, x)
    assert kernel_calls


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_fused_model_can_be_traced():
    model = randomized(MobileNetV2()).eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), model(x))
        torch.testing.assert_close(torch.jit.trace(fused, x)(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_fused_model_cannot_be_scripted():
    fused = fusedsep.fuse(chain(nn.ReLU()).eval())
    with pytest.raises(AttributeError, match=r"torch\.jit\.script cannot .* script what fusedsep\.defuse returns"):
        torch.jit.script(fused)
    torch.jit.script(fusedsep.defuse(fused))


@pytest.mark.parametrize("function", [fusedsep.fuse, fusedsep.freeze])
@pytest.mark.parametrize(
    "make",
    [
        MobileNetV2,
        lambda: fusedsep.MobileNetV1(5, 0.25),
        lambda: chain(nn.ReLU(), channels=3),  # the model itself gets a forward
    ],
    ids=["MobileNetV2", "MobileNetV1", "flat"],
)
def test_compile_and_export(function, make):
    model = randomized(make()).eval()
    ours = function(model)
    x = torch.randn(1, 3, 16, 16)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x), model(x))
        torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), model(x))


def test_functional_call_uses_the_given_parameters():
    model = randomized(MobileNetV2()).eval()
    fused = fusedsep.fuse(model)
    other = randomized(MobileNetV2(), seed=1).state_dict()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, (x,)), torch.func.functional_call(model, other, (x,))
    )


def test_signature_is_the_original_one():
    model = WithDefaults()
    assert inspect.signature(fusedsep.fuse(model).forward) == inspect.signature(model.forward)


def test_unbatched_map():
    model = randomized(nn.Sequential(depthwise(4), nn.ReLU(), pointwise(4, 6, bias=True))).eval()
    x = torch.randn(4, 8, 8)
    torch.testing.assert_close(fusedsep.fuse(model)(x), model(x))


@pytest.mark.parametrize("function", [fusedsep.fuse, fusedsep.defuse, fusedsep.fusion_report, fusedsep.freeze])
@pytest.mark.parametrize(
    "model, message",
    [(3, "model must be an nn.Module, got int"), (nn.Linear, "model must be an nn.Module, got type")],
)
def test_something_else_than_a_module(function, model, message):
    with pytest.raises(TypeError, match=message):
        function(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("function", [fusedsep.fuse, fusedsep.defuse, fusedsep.fusion_report, fusedsep.freeze])
def test_a_scripted_module(function):
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module with a Python forward"):
        function(scripted)
