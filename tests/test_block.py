# SPDX-License-Identifier: BSD-3-Clause
"""The block is a drop-in for its five modules: structure, keys, outputs, gradients, buffers, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from article import FullBlock, ShortBlock
from randomize import randomized

import fusedsep
from fusedsep import DepthwiseSeparableBlock, reference


def twins(*args, **kwargs):
    """A block with random BNs and its reference with the same numbers, both in float64 and in eval mode."""
    block = randomized(DepthwiseSeparableBlock(*args, dtype=torch.double, **kwargs)).eval()
    plain = reference.DepthwiseSeparableBlock(*args, dtype=torch.double, **kwargs).eval()
    plain.load_state_dict(block.state_dict())
    return block, plain


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def assert_equal_up_to_rounding(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_children_are_real_modules_under_their_names():
    block = DepthwiseSeparableBlock(4, 6, 2)
    assert [(name, type(child)) for name, child in block.named_children()] == [
        ("dw", nn.Conv2d),
        ("bn1", nn.BatchNorm2d),
        ("pw", nn.Conv2d),
        ("bn2", nn.BatchNorm2d),
    ]


@pytest.mark.parametrize("padding", [1, (0, 2), (0, 1, 0, 1), "same"])
def test_keys_and_shapes_are_those_of_the_reference(padding):
    block = DepthwiseSeparableBlock(4, 6, 2, padding=padding)
    plain = reference.DepthwiseSeparableBlock(4, 6, 2, padding=padding)
    assert {key: value.shape for key, value in block.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }


@pytest.mark.parametrize("listing", [ShortBlock, FullBlock])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "inside a model"])
def test_state_dicts_of_the_article_load(listing, nested):
    theirs = randomized(listing(5, 7, 2)).double().eval()
    ours = DepthwiseSeparableBlock(5, 7, 2, dtype=torch.double).eval()
    if nested:
        theirs, ours = nn.ModuleDict({"stage": theirs}), nn.ModuleDict({"stage": ours})
    state_dict = theirs.state_dict()
    keys = list(state_dict)
    ours.load_state_dict(state_dict)
    assert list(state_dict) == keys
    if nested:
        theirs, ours = theirs["stage"], ours["stage"]
    x = images(2, 5, 9, 8)
    assert_equal_up_to_rounding(ours(x), theirs(x))


def test_a_foreign_key_is_still_reported():
    state_dict = FullBlock(5, 7).state_dict()
    state_dict["dw.3.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*dw\.3\.weight"):
        DepthwiseSeparableBlock(5, 7).load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("padding", "stride", "dilation", "size", "left_right_top_bottom"),
    [
        (0, 1, 1, (6, 5), (0, 0, 0, 0)),
        (1, 1, 1, (6, 5), (1, 1, 1, 1)),
        ((2, 1), 1, 1, (6, 5), (1, 1, 2, 2)),
        ((0, 1, 2, 3), 2, 1, (6, 5), (0, 1, 2, 3)),
        (2, 1, 2, (6, 5), (2, 2, 2, 2)),
        ("same", 1, 1, (6, 5), (1, 1, 1, 1)),
        ("same", 2, 1, (6, 5), (1, 1, 0, 1)),
        ("same", 2, 1, (7, 8), (0, 1, 1, 1)),
        ("same", 3, 1, (7, 6), (0, 0, 1, 1)),
        ("same", 2, 2, (6, 5), (2, 2, 1, 2)),
        ("same", 1, 1, (1, 1), (1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("kind", [DepthwiseSeparableBlock, reference.DepthwiseSeparableBlock], ids=["block", "plain"])
def test_every_spelling_of_padding(kind, padding, stride, dilation, size, left_right_top_bottom):
    block = randomized(kind(3, 4, stride, padding=padding, dilation=dilation, dtype=torch.double)).eval()
    x = images(2, 3, *size)
    h = F.conv2d(F.pad(x, left_right_top_bottom), block.dw.weight, None, stride, 0, dilation, groups=3)
    expected = F.relu(block.bn2(block.pw(F.relu(block.bn1(h)))))
    assert_equal_up_to_rounding(block(x), expected)
    if padding == "same":
        assert expected.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "none"])
@pytest.mark.parametrize("pointwise_activation", ["relu", "relu6", "hardswish", "none"])
def test_activations(activation, pointwise_activation):
    block, plain = twins(5, 6, activation=activation, pointwise_activation=pointwise_activation)
    x = 8 * images(2, 5, 6, 7)
    assert (block.activation, block.pointwise_activation) == (activation, pointwise_activation)
    assert_equal_up_to_rounding(block(x), plain(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    block, plain = twins(5, 6)
    x = images(2, 5, 6, 7).contiguous(memory_format=memory_format)
    with torch.no_grad():
        y = block(x)
    assert y.is_contiguous(memory_format=memory_format)
    assert_equal_up_to_rounding(y, plain(x))


def test_unbatched_map():
    block, plain = twins(5, 6, 2, padding="same")
    x = images(5, 6, 7)
    assert block(x).shape == (6, 3, 4)
    assert_equal_up_to_rounding(block(x), plain(x.unsqueeze(0)).squeeze(0))


def test_empty_batch():
    block, _ = twins(5, 6, 2)
    with torch.no_grad():
        assert block(images(0, 5, 6, 7)).shape == (0, 6, 3, 4)


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_steps_equal_the_reference(padding, momentum):
    block, plain = twins(5, 6, 2, padding=padding, momentum=momentum)
    block.train()
    plain.train()
    for step in range(2):
        x = images(3, 5, 8, 7, seed=step).requires_grad_()
        x_plain = x.detach().clone().requires_grad_()
        y, y_plain = block(x), plain(x_plain)
        assert_equal_up_to_rounding(y, y_plain)
        gradient = images(*y.shape, seed=step + 10)
        y.backward(gradient)
        y_plain.backward(gradient)
        assert_equal_up_to_rounding(x.grad, x_plain.grad)
    for (name, parameter), parameter_plain in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, parameter_plain.grad, rtol=1e-9, atol=1e-11, msg=name)
    for (name, buffer), buffer_plain in zip(block.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, buffer_plain, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_in_eval_mode_equal_the_reference():
    block, plain = twins(5, 6)
    x = images(2, 5, 6, 7)
    block(x).square().sum().backward()
    plain(x).square().sum().backward()
    for parameter, parameter_plain in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, parameter_plain.grad, rtol=1e-9, atol=1e-11)


def test_one_value_per_channel_in_training_raises():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        DepthwiseSeparableBlock(4, 6)(torch.randn(1, 4, 1, 1))


def test_from_modules_shares_parameters_and_buffers():
    source = randomized(FullBlock(5, 7, 2)).double().eval()
    block = DepthwiseSeparableBlock.from_modules(source.dw[0], source.dw[1], "relu", source.pw[0], source.pw[1], "relu")
    assert not block.training
    assert {id(tensor) for tensor in block.state_dict(keep_vars=True).values()} == {
        id(tensor) for tensor in source.state_dict(keep_vars=True).values()
    }
    x = images(2, 5, 9, 8)
    assert_equal_up_to_rounding(block(x), source(x))
    with torch.no_grad():
        source.dw[1].running_mean.add_(1)
        source.pw[0].weight.mul_(-1)
    assert_equal_up_to_rounding(block(x), source(x))


def test_from_modules_without_batch_norms_and_with_biases():
    dw = nn.Conv2d(5, 5, 3, groups=5, dtype=torch.double)
    pw = nn.Conv2d(5, 7, 1, dtype=torch.double)
    block = DepthwiseSeparableBlock.from_modules(dw, None, "relu6", pw, padding=(0, 1, 0, 1)).eval()
    x = images(2, 5, 9, 8)
    assert_equal_up_to_rounding(block(x), pw(F.relu6(dw(F.pad(x, (0, 1, 0, 1))))))
    assert sorted(block.state_dict()) == ["dw.bias", "dw.weight", "pw.bias", "pw.weight"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"dw": nn.Linear(5, 5)}, TypeError, r"dw must be nn\.Conv2d, got Linear"),
        ({"dw": nn.Conv2d(5, 5, 5, groups=5)}, ValueError, r"dw .* kernel size \(5, 5\)"),
        ({"dw": nn.Conv2d(5, 5, 3)}, ValueError, r"dw .* groups=1 with 5 input channels is not depthwise"),
        ({"dw": nn.Conv2d(5, 10, 3, groups=5)}, ValueError, "dw .* channel multiplier 2"),
        ({"dw": nn.Conv2d(5, 5, 3, groups=5, padding_mode="reflect")}, ValueError, "dw .* padding mode 'reflect'"),
        ({"pw": nn.Conv2d(5, 7, 3)}, ValueError, r"pw .* kernel size \(3, 3\)"),
        ({"pw": nn.Conv2d(5, 7, 1, stride=2)}, ValueError, r"pw .* stride \(2, 2\)"),
        ({"pw": nn.Conv2d(4, 7, 1)}, ValueError, r"pw must take the 5 channels of dw, got pw\.in_channels=4"),
        ({"bn1": nn.LayerNorm(5)}, TypeError, r"bn1 must be nn\.BatchNorm2d or None, got LayerNorm"),
        ({"bn2": nn.BatchNorm2d(5)}, ValueError, "bn2 must have 7 features, got 5"),
        ({"activation": "gelu"}, ValueError, "activation must be one of .* got 'gelu'"),
        ({"pointwise_activation": None}, ValueError, "pointwise_activation must be one of .* got None"),
        ({"padding": 2, "dw": nn.Conv2d(5, 5, 3, padding=1, groups=5)}, ValueError, "padding=2 was given, but dw pads"),
    ],
)
def test_from_modules_names_what_does_not_fit(changed, error, message):
    arguments = {
        "dw": nn.Conv2d(5, 5, 3, groups=5),
        "bn1": nn.BatchNorm2d(5),
        "activation": "relu",
        "pw": nn.Conv2d(5, 7, 1),
        "bn2": nn.BatchNorm2d(7),
    }
    with pytest.raises(error, match=message):
        DepthwiseSeparableBlock.from_modules(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"in_channels": 4.0}, TypeError, r"in_channels must be an int, got 4\.0"),
        ({"out_channels": -3}, ValueError, "out_channels must be at least 1, got -3"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (1, 1)}, TypeError, r"stride must be an int, got \(1, 1\)"),
        ({"dilation": True}, TypeError, "dilation must be an int, got True"),
        ({"padding": -1}, ValueError, "padding must not be negative, got -1"),
        ({"padding": (1, 2, 3)}, TypeError, r"padding must be an int, .* got \(1, 2, 3\)"),
        ({"padding": 1.5}, TypeError, r"padding must be an int, .* got 1\.5"),
        ({"padding": "valid"}, ValueError, "padding must be .* or 'same', got 'valid'"),
        (
            {"activation": "tanh"},
            ValueError,
            "activation must be one of 'none', 'relu', 'relu6', 'hardswish', got 'tanh'",
        ),
        ({"pointwise_activation": 3}, ValueError, "pointwise_activation must be one of .* got 3"),
    ],
)
def test_constructor_names_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        DepthwiseSeparableBlock(**{"in_channels": 4, "out_channels": 6, **arguments})


def test_device_and_dtype_reach_every_tensor():
    block = DepthwiseSeparableBlock(4, 6, device="meta", dtype=torch.bfloat16)
    floating = [tensor for tensor in block.state_dict().values() if tensor.is_floating_point()]
    assert len(floating) == 10
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in floating)


def test_repr_names_the_activations_and_the_padding_that_no_child_shows():
    text = repr(DepthwiseSeparableBlock(4, 6, padding="same", activation="relu6", pointwise_activation="none"))
    assert "activation='relu6', pointwise_activation='none', padding=same" in text
    assert "padding=(0, 1, 0, 1)" in repr(DepthwiseSeparableBlock(4, 6, padding=(0, 1, 0, 1)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_are_equal_and_independent(duplicate):
    block, plain = twins(5, 6, 2, padding="same", activation="relu6")
    x = images(2, 5, 6, 7)
    with torch.no_grad():
        expected = block(x)
        twin = duplicate(block)
        block.dw.weight.zero_()
        assert torch.equal(twin(x), expected)
    assert_equal_up_to_rounding(expected, plain(x))
    assert [key for key, _ in twin.named_parameters()] == [key for key, _ in block.named_parameters()]


def test_a_copy_still_loads_the_nested_keys():
    twin = copy.deepcopy(DepthwiseSeparableBlock(5, 7))
    source = randomized(FullBlock(5, 7))
    twin.load_state_dict(source.state_dict())
    assert torch.equal(twin.bn1.running_mean, source.dw[1].running_mean)


def test_torch_save_round_trip():
    block, _ = twins(5, 6)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    twin = fusedsep.DepthwiseSeparableBlock(5, 6, dtype=torch.double).eval()
    twin.load_state_dict(torch.load(file))
    x = images(2, 5, 6, 7)
    assert torch.equal(twin(x), block(x))
