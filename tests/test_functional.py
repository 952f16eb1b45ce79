# SPDX-License-Identifier: BSD-3-Clause
"""``depthwise_separable_conv2d`` equals the PyTorch code in its docstring, and names what does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from randomize import randomized

from fusedsep import DepthwiseSeparableBlock, depthwise_separable_conv2d
from fusedsep.functional import BatchNorm


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def batch_norm_numbers(channels, seed):
    return BatchNorm(
        weight=random(channels, seed=seed),
        bias=random(channels, seed=seed + 1),
        running_mean=random(channels, seed=seed + 2),
        running_var=random(channels, seed=seed + 3).abs() + 0.5,
        eps=1e-3,
        momentum=0.3,
    )


def expected(x, dw_weight, bn1, pw_weight, bn2, dw_bias, pw_bias, training):
    def batch_norm(x, bn):
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, bn.momentum, bn.eps)

    h = F.conv2d(x, dw_weight, dw_bias, 2, 1, 1, groups=x.shape[1])
    h = F.relu6(batch_norm(h, bn1) if bn1 else h)
    y = F.conv2d(h, pw_weight, pw_bias)
    return F.hardswish(batch_norm(y, bn2) if bn2 else y)


def copy_of(bn):
    return bn and BatchNorm(*(value.clone() if isinstance(value, torch.Tensor) else value for value in bn))


@pytest.mark.parametrize("with_bn1", [True, False])
@pytest.mark.parametrize("with_bn2", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_equals_its_docstring(with_bn1, with_bn2, biases, training):
    x, dw_weight, pw_weight = random(2, 5, 8, 7), random(5, 1, 3, 3), random(6, 5, 1, 1)
    bn1 = batch_norm_numbers(5, 10) if with_bn1 else None
    bn2 = batch_norm_numbers(6, 20) if with_bn2 else None
    dw_bias, pw_bias = (random(5), random(6)) if biases else (None, None)
    bn1_expected, bn2_expected = copy_of(bn1), copy_of(bn2)
    y_expected = expected(x, dw_weight, bn1_expected, pw_weight, bn2_expected, dw_bias, pw_bias, training)
    y = depthwise_separable_conv2d(
        x,
        dw_weight,
        bn1,
        pw_weight,
        bn2,
        dw_bias=dw_bias,
        pw_bias=pw_bias,
        stride=2,
        activation="relu6",
        pointwise_activation="hardswish",
        training=training,
    )
    torch.testing.assert_close(y, y_expected, rtol=1e-10, atol=1e-12)
    for bn, bn_expected in ((bn1, bn1_expected), (bn2, bn2_expected)):
        if bn is not None:
            torch.testing.assert_close(bn.running_mean, bn_expected.running_mean)
            torch.testing.assert_close(bn.running_var, bn_expected.running_var)


@pytest.mark.parametrize("padding", [0, 1, (2, 1), (0, 1, 0, 1), "same"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 1)])
def test_equals_the_block(padding, stride, dilation):
    block = randomized(DepthwiseSeparableBlock(5, 6, stride, padding=padding, dilation=dilation)).double().eval()
    x = random(2, 5, 8, 7)
    with torch.no_grad():
        y = depthwise_separable_conv2d(
            x,
            block.dw.weight,
            block.bn1,
            block.pw.weight,
            block.bn2,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        torch.testing.assert_close(y, block(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_modules_train_as_in_the_block(momentum):
    block = randomized(DepthwiseSeparableBlock(5, 6, momentum=momentum, dtype=torch.double)).train()
    bn1, bn2 = nn.BatchNorm2d(5, momentum=momentum).double(), nn.BatchNorm2d(6, momentum=momentum).double()
    bn1.load_state_dict(block.bn1.state_dict())
    bn2.load_state_dict(block.bn2.state_dict())
    for step in range(2):
        x = random(2, 5, 8, 7, seed=step)
        y = depthwise_separable_conv2d(x, block.dw.weight, bn1, block.pw.weight, bn2, training=True)
        torch.testing.assert_close(y, block(x), rtol=1e-10, atol=1e-12)
    for ours, theirs in ((bn1, block.bn1), (bn2, block.bn2)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_without_running_statistics_those_of_the_batch_are_used():
    x, dw_weight, pw_weight = random(2, 5, 8, 7), random(5, 1, 3, 3), random(6, 5, 1, 1)
    y = depthwise_separable_conv2d(x, dw_weight, BatchNorm(None, None, None, None), pw_weight)
    h = F.relu(F.batch_norm(F.conv2d(x, dw_weight, padding=1, groups=5), None, None, training=True))
    torch.testing.assert_close(y, F.relu(F.conv2d(h, pw_weight)), rtol=1e-10, atol=1e-12)


def test_unbatched_map_and_empty_batch():
    dw_weight, pw_weight = random(5, 1, 3, 3), random(6, 5, 1, 1)
    x = random(2, 5, 8, 7)
    batched = depthwise_separable_conv2d(x, dw_weight, None, pw_weight)
    torch.testing.assert_close(depthwise_separable_conv2d(x[1], dw_weight, None, pw_weight), batched[1])
    assert depthwise_separable_conv2d(x[:0], dw_weight, None, pw_weight).shape == (0, 6, 8, 7)


def test_memory_format_is_kept():
    x = random(2, 5, 8, 7).contiguous(memory_format=torch.channels_last)
    y = depthwise_separable_conv2d(x, random(5, 1, 3, 3), None, random(6, 5, 1, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 5, 8, 7), (5, 8, 7), (0, 5, 8, 7)], ids=str)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_equals_that_of_the_modules(shape, momentum, training):
    """A module stands for its numbers alone: whether it tracks or trains is not asked."""
    block = randomized(DepthwiseSeparableBlock(5, 6, padding="same", momentum=momentum, dtype=torch.double))
    parts = copy.deepcopy(block).train(not training)
    parts.bn1.track_running_stats = False

    def function(x):
        weights = parts.dw.weight, parts.bn1, parts.pw.weight, parts.bn2
        return depthwise_separable_conv2d(x, *weights, padding="same", training=training)

    results = []
    for model, call in ((parts, function), (block, block.train(training))):
        x = random(*shape).requires_grad_()
        y = call(x)
        y.backward(random(*y.shape, seed=50))
        results.append([y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    # Without activations nothing has a kink, and the numerical derivative is right everywhere.
    bn1, bn2 = batch_norm_numbers(3, 10), batch_norm_numbers(2, 20)

    def function(x, dw_weight, gamma, pw_weight, pw_bias):
        fresh = BatchNorm(gamma, *copy_of(bn1)[1:])
        return depthwise_separable_conv2d(
            x,
            dw_weight,
            fresh,
            pw_weight,
            copy_of(bn2),
            pw_bias=pw_bias,
            padding="same",
            stride=2,
            activation="none",
            pointwise_activation="none",
            training=training,
        )

    inputs = (random(2, 3, 4, 3), random(3, 1, 3, 3), random(3), random(2, 3, 1, 1), random(2))
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_which_kernels_run(kernel_calls, training_calls):
    x, dw_weight, pw_weight = random(2, 5, 8, 7), random(5, 1, 3, 3), random(6, 5, 1, 1)
    bn1 = batch_norm_numbers(5, 10)

    def calls(x, bn1, pw_weight, **options):
        for recorded in (kernel_calls, training_calls):
            recorded.clear()
        depthwise_separable_conv2d(x, dw_weight, bn1, pw_weight, **options)
        return len(kernel_calls), len(training_calls)

    assert calls(x, bn1, pw_weight) == (1, 0)
    assert calls(x, bn1, pw_weight, stride=3) == (0, 0)
    assert calls(x, bn1, pw_weight, training=True) == (0, 1)
    assert calls(x, BatchNorm(None, None, None, None), pw_weight) == (0, 1)
    assert calls(x, bn1, pw_weight.requires_grad_()) == (0, 1)
    with torch.no_grad():
        assert calls(x, bn1, pw_weight) == (1, 0)


def test_runs_under_vmap_of_gradients():
    dw_weight, pw_weight = random(3, 1, 3, 3), random(2, 3, 1, 1)

    def loss(pw_weight, x):
        return depthwise_separable_conv2d(x, dw_weight, None, pw_weight).square().sum()

    x = random(4, 3, 5, 5)
    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(pw_weight, x)
    for image, gradient in zip(x, per_image, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(pw_weight, image))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
        ({"x": torch.zeros(5, 8)}, ValueError, r"x must have shape \[N, C, H, W\] or \[C, H, W\], got \[5, 8\]"),
        (
            {"x": torch.zeros(1, 5, 8, 7, dtype=torch.int32)},
            TypeError,
            r"x must be a floating-point tensor, got .*int32",
        ),
        ({"x": torch.zeros(1, 4, 8, 7)}, ValueError, r"dw_weight must have shape \[4, 1, 3, 3\] .* got \[5, 1, 3, 3\]"),
        ({"x": torch.zeros(1, 5, 0, 7)}, ValueError, "x must hold the 3x3 kernel .* 0 x 7"),
        (
            {"padding": 0, "x": torch.zeros(1, 5, 8, 2)},
            ValueError,
            r"x must hold the 3x3 kernel .* 8 x 2 with padding \(0, 0, 0, 0\)",
        ),
        ({"dw_weight": None}, TypeError, r"dw_weight must be a torch\.Tensor, got NoneType"),
        ({"dw_weight": torch.zeros(5, 5, 3, 3)}, ValueError, r"dw_weight must have shape .* got \[5, 5, 3, 3\]"),
        ({"dw_weight": torch.zeros(5, 1, 3, 3).double()}, TypeError, "dw_weight must have the dtype of x, .*float64"),
        ({"pw_weight": torch.zeros(6, 5)}, ValueError, r"pw_weight must have shape \[O, 5, 1, 1\], got \[6, 5\]"),
        (
            {"pw_weight": torch.zeros(6, 5, 1, 1, device="meta")},
            ValueError,
            "pw_weight must be on the device of x, cpu",
        ),
        ({"dw_bias": torch.zeros(6)}, ValueError, r"dw_bias must have shape \[5\], got \[6\]"),
        ({"pw_bias": 0.0}, TypeError, r"pw_bias must be a torch\.Tensor or None, got float"),
        (
            {"bn1": nn.Identity()},
            TypeError,
            r"bn1 must be functional\.BatchNorm, nn\.BatchNorm2d or None, got Identity",
        ),
        ({"bn1": nn.BatchNorm2d(6)}, ValueError, r"bn1\.weight must have shape \[5\], got \[6\]"),
        ({"bn2": BatchNorm(None, None, torch.zeros(6), None)}, ValueError, "bn2 must have both running_mean and"),
        (
            {"bn2": BatchNorm(None, None, torch.zeros(6), torch.ones(6), momentum=None), "training": True},
            ValueError,
            r"bn2\.momentum must be a number",
        ),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"dilation": 1.0}, TypeError, r"dilation must be an int, got 1\.0"),
        ({"padding": (0, -1)}, ValueError, r"padding must not be negative, got \(0, -1\)"),
        ({"activation": "elu"}, ValueError, "activation must be one of .* got 'elu'"),
        ({"pointwise_activation": "elu"}, ValueError, "pointwise_activation must be one of .* got 'elu'"),
        (
            {"x": torch.zeros(1, 5, 1, 1), "bn1": nn.BatchNorm2d(5), "training": True},
            ValueError,
            "more than 1 value per channel",
        ),
    ],
)
def test_names_what_does_not_fit(changed, error, message):
    arguments = {
        "x": torch.zeros(1, 5, 8, 7),
        "dw_weight": torch.zeros(5, 1, 3, 3),
        "bn1": None,
        "pw_weight": torch.zeros(6, 5, 1, 1),
    }
    with pytest.raises(error, match=message):
        depthwise_separable_conv2d(**{**arguments, **changed})
