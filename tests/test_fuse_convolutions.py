# SPDX-License-Identifier: BSD-3-Clause
"""A depthwise convolution that pads by itself is fused when its forward is proved to do that and nothing else."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from convolutions import (
    NOT_PADDING_ITSELF,
    PADDING_ITSELF,
    CheckedConv,
    PaddedConv,
    RoundedWeightConv,
    SameConv,
)
from models import PaddedBlock
from randomize import randomized
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep._padding import SamePad
from fusedsep.surgery.convolutions import PaddingUnknown, read_padding

#: What the forward of each entry of PADDING_ITSELF adds around a map: left, right, top, bottom.
PADS = {
    "SAME": "same",
    "SAME, stride 1": (1, 1, 1, 1),
    "SAME, dilation 3": "same",
    "SAME, padding=1": "same",
    "SAME of 224": (0, 1, 0, 1),
    "SAME of 225": (1, 1, 1, 1),
    "SAME of 225, padding=1": (2, 2, 2, 2),
    "two sides": (0, 1, 2, 0),
    "two sides, padding='same'": (1, 2, 3, 1),
    "nothing more": (1, 1, 1, 1),
    "none": (0, 0, 0, 0),
}


def block(name):
    torch.manual_seed(0)
    return randomized(PaddedBlock(4, nn.Identity(), PADDING_ITSELF[name](4))).eval()


@pytest.mark.parametrize("name", PADDING_ITSELF)
def test_the_rule_is_found(name):
    assert read_padding(PADDING_ITSELF[name](5)) == PADS[name]


@pytest.mark.parametrize(
    ("kernel", "dilation", "channels", "groups", "gradients"),
    [
        *((3, dilation, (channels, 32), 1, False) for dilation in (1, 2) for channels in (1, 3, 8, 16, 64)),
        *((*kernel, (6, 6), 6, gradients) for kernel in ((3, 2), (5, 1), (5, 2), (7, 1)) for gradients in (0, 1)),
    ],
)
def test_the_rule_of_other_convolutions(kernel, dilation, channels, groups, gradients):
    def made(kind, stride=1, **options):
        conv = kind(*channels, kernel, stride, dilation=dilation, groups=groups, **options)
        return read_padding(conv, gradients)

    total = (kernel - 1) * dilation
    assert made(CheckedConv, 2, padding=kernel // 2) == 4 * (kernel // 2,)
    assert made(PaddedConv) == (0, 1, 2, 0)
    assert made(SameConv) == 2 * (total // 2, total - total // 2)
    assert made(SameConv, 2) == "same"
    with pytest.raises(PaddingUnknown):
        made(RoundedWeightConv)


def test_convolutions_of_many_taps_are_not_tried():
    with pytest.raises(PaddingUnknown, match="too many taps"):
        read_padding(SameConv(128, 8, 3))


@pytest.mark.parametrize("name", PADDING_ITSELF)
@pytest.mark.parametrize("function", [fusedsep.fuse, fusedsep.freeze])
def test_maps_of_every_size(name, function, kernel_calls):
    model = block(name)
    ours = function(model)
    smallest = 1 if PADS[name] == "same" else 3
    with torch.no_grad():
        for height, width in [(smallest, smallest), (3, 8), (8, 3), (4, 4), (5, 6), (7, 7), (15, 12), (56, 57)]:
            x = torch.randn(2, 4, height, width)
            kernel_calls.clear()
            assert_as_close_to_float64(ours, model, x)
            assert kernel_calls
            assert_as_close_to_float64(ours, model, x.contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(ours(x[0]), ours(x)[0])


@pytest.mark.parametrize("name", PADDING_ITSELF)
def test_gradients_in_eval_mode(name, kernel_calls):
    model = block(name).double()
    fused = fusedsep.fuse(model)
    for size in ((9, 9), (8, 11)):
        gradients = []
        for network in (model, fused):
            torch.manual_seed(0)
            x = torch.randn(2, 4, *size, dtype=torch.double, requires_grad=True)
            gradients.append(torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()]))
        for theirs, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("name", PADDING_ITSELF)
def test_modules_that_run_themselves_pad_once(name, kernel_calls):
    """With a hook on the convolution, or for whatever else keeps the kernels from running."""
    model = block(name)
    fused = fusedsep.fuse(model)
    fused.dw.register_forward_hook(lambda *_: None)
    x = torch.randn(1, 4, 9, 10)
    assert torch.equal(fused(x), model(x))
    fused = fusedsep.fuse(model)
    site = next(iter(fused.forward.programs[False].sites.values()))
    torch.testing.assert_close(site.separable.composite(x, fused.dw, fused.bn1, fused.pw, fused.bn2), model(x))
    assert not kernel_calls


def test_report_and_defuse():
    model = block("SAME")
    (site,) = fusedsep.fusion_report(model).fused
    assert (site.name, site.reason) == ("dw", "pad + depthwise + BN, relu6, pointwise + BN, relu6")
    fused = fusedsep.fuse(model)
    assert "forward" not in vars(fusedsep.defuse(fused))
    x = torch.randn(1, 4, 9, 10)
    assert torch.equal(fused(x), model(x))


def test_same_padding_takes_in_no_padding_in_front():
    def pads(pad, name):
        fused = fusedsep.fuse(PaddedBlock(4, pad, PADDING_ITSELF[name](4)).eval())
        (site,) = fused.forward.programs[False].sites.values()
        return site.separable.pre_pad

    assert pads(nn.ZeroPad2d((1, 0, 0, 2)), "two sides") == (1, 1, 2, 2)
    assert pads(nn.ZeroPad2d((1, 0, 0, 2)), "SAME") == "same"
    assert pads(SamePad(2), "none") == "same"
    assert pads(SamePad(2), "two sides") == (0, 1, 2, 0)


def test_hooks_inside_the_convolution_fire():
    model = block("SAME of 224")
    fused = fusedsep.fuse(model)
    for network in (model, fused):
        network.dw.static_padding.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(1, 4, 9, 10)
    torch.testing.assert_close(fused(x), model(x))


class Changeable(nn.Conv2d):
    """Pads as an attribute says, and does something else in training."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, 2, padding=1, groups=channels)
        self.sides = (0, 1, 2, 0)

    def forward(self, x):
        y = super().forward(F.pad(x, self.sides))
        return 3 * y if self.training else y


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "sides", (1, 1, 1, 1)),
        lambda conv: setattr(conv, "padding", (2, 2)),
        lambda conv: setattr(conv, "stride", (1, 1)),
        lambda conv: setattr(conv, "forward", lambda x, original=conv.forward: -2 * original(x)),
        lambda conv: conv.weight.data.mul_(-2),
        lambda conv: conv.train(),
    ],
    ids=["attribute", "padding", "stride", "forward", "weight", "training"],
)
def test_changes_of_the_convolution_are_noticed(change, kernel_calls):
    model = randomized(PaddedBlock(4, nn.Identity(), Changeable(4))).eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 9, 10)
    before = model(x)
    torch.testing.assert_close(fused(x), before)
    assert len(kernel_calls) == 1
    change(fused.dw)
    expected = fusedsep.defuse(copy.deepcopy(fused))(x)
    assert expected.shape != before.shape or not torch.allclose(expected, before)
    torch.testing.assert_close(fused(x), expected)


def test_the_trial_leaves_no_trace():
    for make in [*PADDING_ITSELF.values(), *(make for make, _ in NOT_PADDING_ITSELF.values())]:
        conv = make(4).train()
        model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 6, 1))
        attributes = dict(vars(conv))
        state = {key: value.clone() for key, value in conv.state_dict().items()}
        random_state = torch.get_rng_state()
        fusedsep.fusion_report(model)
        assert dict(vars(conv)) == attributes
        assert all(torch.equal(value, state[key]) for key, value in conv.state_dict().items())
        assert all(parameter.grad is None for parameter in conv.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double], ids=str)
def test_modes_and_dtypes_make_no_difference(mode, dtype):
    with mode():
        assert read_padding(PADDING_ITSELF["SAME"](4).to(dtype)) == "same"


def test_weights_without_memory_are_not_tried():
    with torch.device("meta"):
        conv = PADDING_ITSELF["SAME"](4)
    with pytest.raises(PaddingUnknown, match="cannot be tried on the meta device"):
        read_padding(conv)


def test_a_convolution_that_cannot_be_copied_is_skipped():
    model = block("SAME")
    model.dw.lock = threading.Lock()
    (skipped,) = fusedsep.fusion_report(model).skipped
    assert "SameConv has a forward of its own: cannot be tried: cannot pickle" in skipped.reason


def test_frozen_copies_hold_nothing_of_the_convolution():
    frozen = fusedsep.freeze(block("SAME of 224"))
    assert b"StaticSameConv" not in pickle.dumps(frozen)
    twin = pickle.loads(pickle.dumps(frozen))
    x = torch.randn(1, 4, 9, 10)
    assert torch.equal(twin(x), frozen(x))
