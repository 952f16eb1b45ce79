# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV1: the paper's table, any width, any image size, and the article's two listings through fuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from article import FullBlock, MobileNet, ShortBlock
from randomize import randomized

import fusedsep
from fusedsep import MobileNetV1, reference

KINDS = pytest.mark.parametrize("kind", [MobileNetV1, reference.MobileNetV1], ids=["fused", "reference"])


def images(*shape, dtype=torch.double):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double).to(dtype)


def assert_equal_up_to_rounding(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


@KINDS
def test_children_and_the_paper_table(kind):
    model = kind(device="meta")
    assert [name for name, _ in model.named_children()] == ["first_conv", "stage_layers", "linear"]
    assert [(block.dw.in_channels, block.pw.out_channels, block.dw.stride[0]) for block in model.stage_layers] == [
        (32, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
        (512, 512, 1),
        (512, 512, 1),
        (512, 512, 1),
        (512, 512, 1),
        (512, 1024, 2),
        (1024, 1024, 1),
    ]
    assert (model.linear.in_features, model.linear.out_features) == (1024, 1000)


@KINDS
@pytest.mark.parametrize("padding", [1, "same"])
def test_keys_do_not_depend_on_the_kind_or_the_padding(kind, padding):
    keys = list(MobileNetV1(device="meta").state_dict())
    assert keys[:2] == ["first_conv.0.weight", "first_conv.1.weight"]
    assert list(kind(padding=padding, device="meta").state_dict()) == keys


@pytest.mark.parametrize(
    ("width_multiplier", "first", "last"),
    [(1, 32, 1024), (0.75, 24, 768), (0.5, 16, 512), (0.25, 8, 256), (1.4, 44, 1433), (0.35, 11, 358), (0.01, 1, 10)],
)
def test_width_multiplier(width_multiplier, first, last):
    model = MobileNetV1(10, width_multiplier).eval()
    assert (model.first_conv[0].out_channels, model.linear.in_features) == (first, last)
    assert model(images(1, 3, 32, 32, dtype=torch.float)).shape == (1, 10)


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1)])
def test_any_image_size_equals_the_reference(padding, size):
    arguments = {"padding": padding, "activation": "relu6", "eps": 1e-3, "in_channels": 2, "dtype": torch.double}
    model = randomized(MobileNetV1(7, 0.25, **arguments)).eval()
    plain = reference.MobileNetV1(7, 0.25, **arguments).eval()
    plain.load_state_dict(model.state_dict())
    x = images(2, 2, *size)
    with torch.no_grad():
        assert_equal_up_to_rounding(model(x), plain(x))


def test_same_padding_of_the_first_convolution_is_tensorflows():
    model = reference.MobileNetV1(7, 0.25, padding="same", dtype=torch.double).eval()
    x = images(1, 3, 32, 33)
    seen = []
    model.first_conv[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(x)
    assert torch.equal(seen[0], nn.functional.pad(x, (1, 1, 0, 1)))


def test_training_step_equals_the_reference():
    model = randomized(MobileNetV1(7, 0.25, dtype=torch.double)).train()
    plain = reference.MobileNetV1(7, 0.25, dtype=torch.double).train()
    plain.load_state_dict(model.state_dict())
    x = images(4, 3, 64, 64)
    for network in (model, plain):
        network(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-7 * scale, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_empty_batch():
    with torch.no_grad():
        assert MobileNetV1(7, 0.25).eval()(torch.zeros(0, 3, 32, 32)).shape == (0, 7)


@pytest.mark.parametrize("block", [ShortBlock, FullBlock])
def test_the_article_network_loads_into_ours(block):
    theirs = randomized(MobileNet(block)).eval()
    ours = MobileNetV1().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        y = ours(x.float())
        assert y.shape == torch.Size([1, 1000])
        assert_equal_up_to_rounding(ours.double()(x), theirs.double()(x))


@pytest.mark.parametrize("block", [ShortBlock, FullBlock])
def test_the_article_network_fuses_at_13_of_13_sites(block):
    model = randomized(MobileNet(block)).eval()
    keys = list(model.state_dict())
    fused = fusedsep.fuse(model)
    report = fusedsep.fusion_report(model)
    assert (len(report.fused), len(report.skipped)) == (13, 0)
    assert list(fused.state_dict()) == keys
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        assert fused(x.float()).shape == torch.Size([1, 1000])
        assert_equal_up_to_rounding(fused.double()(x), model.double()(x))


@pytest.mark.parametrize("padding", [1, (1, 2), (2, 0, 0, 2), "same"])
def test_the_reference_fuses_at_13_of_13_sites(padding):
    model = randomized(reference.MobileNetV1(7, 0.25, padding=padding, dtype=torch.double)).eval()
    assert len(fusedsep.fusion_report(model).fused) == 13
    fused = fusedsep.fuse(model)
    for size in ((64, 64), (49, 50)):
        x = images(1, 3, *size)
        with torch.no_grad():
            assert_equal_up_to_rounding(fused(x), model(x))


def test_fx_traces_the_reference():
    model = randomized(reference.MobileNetV1(7, 0.25, padding="same", dtype=torch.double)).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in ((32, 32), (33, 47)):
        x = images(1, 3, *size)
        with torch.no_grad():
            assert_equal_up_to_rounding(traced(x), model(x))


def test_deepcopy_keeps_the_padding():
    model = randomized(MobileNetV1(7, 0.25, padding="same")).eval()
    x = images(1, 3, 32, 32, dtype=torch.float)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@KINDS
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"in_channels": 3.0}, TypeError, r"in_channels must be an int, got 3\.0"),
        ({"width_multiplier": 0}, ValueError, "width_multiplier must be greater than 0 and finite, got 0"),
        ({"width_multiplier": float("nan")}, ValueError, "width_multiplier must be .* got nan"),
        ({"width_multiplier": float("inf")}, ValueError, "width_multiplier must be .* got inf"),
        ({"width_multiplier": "1"}, TypeError, "width_multiplier must be a number, got '1'"),
        ({"activation": "swish"}, ValueError, "activation must be one of .* got 'swish'"),
        ({"padding": "full"}, ValueError, "padding must be .* got 'full'"),
    ],
)
def test_constructor_names_what_does_not_fit(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@KINDS
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"x must be images of shape \[N, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"x must be .* got \[1, 4, 32, 32\]"),
        (torch.zeros(1, 3, 0, 32), ValueError, r"x must be .* got \[1, 3, 0, 32\]"),
        ([1.0], TypeError, r"x must be a torch\.Tensor, got list"),
    ],
)
def test_forward_names_what_does_not_fit(kind, x, error, message):
    model = kind(7, 0.25).eval()
    with pytest.raises(error, match=message):
        model(x)
