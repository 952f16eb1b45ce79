# SPDX-License-Identifier: BSD-3-Clause
"""Gradients in eval mode (fine-tuning with frozen BN): packed weights forward, the rest computed again backward."""

from __future__ import annotations

import pytest
import torch
from twins import assert_close, random, twins


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_equal_the_reference(kernel_calls, backward_calls, activation, memory_format):
    block, twin = twins(5, 7, 2, padding="same", activation=activation, pointwise_activation=activation)
    grads = []
    for model in (block, twin):
        x = (3 * random(2, 5, 8, 7)).contiguous(memory_format=memory_format).requires_grad_()
        y = model(x)
        y.backward(random(*y.shape, seed=1))
        grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert len(kernel_calls) == len(backward_calls) == 1


@pytest.mark.parametrize("wanted", ["x", "dw.weight", "bn1.bias", "pw.weight", "bn2.weight"])
def test_only_the_wanted_gradient(kernel_calls, backward_calls, wanted):
    block, twin = twins(5, 7)
    results = []
    for model in (block, twin):
        model.requires_grad_(False)
        x = random(2, 5, 6, 9)
        target = x if wanted == "x" else model.get_parameter(wanted)
        target.requires_grad_()
        model(x).square().sum().backward()
        results.append(target.grad)
        assert [p.grad is None for p in model.parameters()].count(False) == (wanted != "x")
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert len(kernel_calls) == len(backward_calls) == 1


def test_no_graph_without_a_wanted_gradient(kernel_calls):
    block, _ = twins(5, 7)
    block.requires_grad_(False)
    assert block(random(2, 5, 6, 9)).grad_fn is None
    assert len(kernel_calls) == 1


def test_expanded_gradient(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    for model in (block, twin):
        model(x).sum().backward()  # hands a gradient of stride 0 to the block
    assert_close(block.pw.weight.grad, twin.pw.weight.grad)
    assert kernel_calls


def test_numerical_derivatives(kernel_calls):
    """First and second ones, with hardswish in the middle, which has curvature; inputs stay away from its kinks."""
    block, _ = twins(2, 2, activation="hardswish", pointwise_activation="none")
    x = 0.1 * random(1, 2, 3, 2)
    parameters = dict(block.named_parameters())

    def function(x, *tensors):
        return torch.func.functional_call(block, dict(zip(parameters, tensors, strict=True)), (x,))

    inputs = [tensor.detach().requires_grad_() for tensor in (x, *parameters.values())]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert kernel_calls


def test_a_parameter_changed_before_backward_is_an_error(kernel_calls):
    block, _ = twins(5, 7)
    y = block(random(2, 5, 6, 9)).sum()
    with torch.no_grad():
        block.pw.weight[3, 2] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    assert kernel_calls
