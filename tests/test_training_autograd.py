# SPDX-License-Identifier: BSD-3-Clause
"""Training takes part in the whole of autograd: derivatives of both orders, transforms, hooks, checkpoints."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from training_pairs import NORMS, assert_same, in_format, pair, step
from twins import random

NORM_PAIRS = list(itertools.product(["none", "frozen", "training"], repeat=2))


def as_function(block, x):
    """``block`` as a function of ``x`` and its parameters, and values for them."""
    names = [name for name, _ in block.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    return function, [tensor.detach().requires_grad_() for tensor in (x, *block.parameters())]


# --------------------------------------------------------------------------------------------- numerical derivatives


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("norms", NORM_PAIRS)
def test_first_and_second_numerical_derivatives(training_calls, backward_calls, norms, channels_last):
    block, _ = pair(*norms, channels=(2, 3), bias=True, activation="hardswish", pointwise_activation="hardswish")
    x = in_format(random(2, 2, 3, 2), channels_last)
    function, inputs = as_function(block, x)
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0)
    assert training_calls
    assert backward_calls


@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
@pytest.mark.parametrize("stride", [1, 2])
def test_numerical_derivatives_of_other_activations(activation, stride):
    block, _ = pair(channels=(2, 3), stride=stride, activation=activation, pointwise_activation=activation)
    function, inputs = as_function(block, random(2, 2, 4, 3))
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0)


def test_numerical_derivatives_of_larger_maps():
    block, _ = pair(channels=(9, 17), activation="hardswish", pointwise_activation="none")
    function, inputs = as_function(block, random(3, 9, 7, 8))
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "frozen")])
def test_a_gradient_penalty(norms):
    """Second derivatives as users ask for them, also where a weight is computed from the map."""
    results = []
    for model in pair(*norms, bias=True, activation="hardswish", pointwise_activation="none"):
        x = random(2, 5, 6, 9).requires_grad_()
        parameters = dict(model.named_parameters())
        name = next(name for name, parameter in parameters.items() if parameter.shape == (7, 5, 1, 1))
        y = torch.func.functional_call(model, {name: parameters[name] * x.square().mean()}, (x,))
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.sum() + grad.square().sum()).backward()
        results.append([grad.detach(), x.grad, *(parameter.grad for parameter in parameters.values())])
    assert_same(*results)


def test_one_tensor_in_two_places():
    """Each place has its share of the gradient, also when a gradient of the gradient is asked for."""
    results = []
    for model in pair(channels=(5, 5), bias=True):
        for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            bn.weight = bn.bias
        x = random(2, 5, 6, 9).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append([grad.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    assert_same(*results)


# --------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "training"), ("untracked", "none")])
def test_forward_mode_derivative(training_calls, norms):
    x, tangent = random(2, 5, 6, 9), random(2, 5, 6, 9, seed=1)
    results = []
    for model in pair(*norms):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
            results.append([dual.primal, dual.tangent, *model.buffers()])
    assert_same(*results)
    assert not training_calls


def test_transforms_of_functions(training_calls):
    """Gradient, both Jacobians and a product with one; and a mapped function, whose running statistics cannot move."""
    x = random(2, 5, 6, 9)
    results = []
    for model in pair("untracked", "untracked", activation="hardswish"):
        parameters = dict(model.named_parameters())

        def function(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

        grads = torch.func.grad(function)(parameters, x)
        per_sample = torch.func.vmap(torch.func.grad(function), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x]))
        hessian = torch.func.hessian(function, argnums=1)(parameters, x[:, :, :2, :2])
        product = torch.func.jvp(model, (x,), (2 * x,))
        results.append([*grads.values(), *per_sample.values(), hessian, *product])
    assert_same(*results)
    assert not training_calls


def test_moving_statistics_under_vmap_are_an_error():
    for model in pair():
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(model)(random(3, 2, 5, 6, 9))


def test_many_gradients_at_once():
    results = []
    for model in pair():
        x = random(2, 5, 4, 3).requires_grad_()
        y = model(x)
        grad_y = random(3, *y.shape, seed=1)
        results.append(torch.autograd.grad(y, [x, *model.parameters()], grad_y, is_grads_batched=True))
    assert_same(*results)


# ----------------------------------------------------------------------------------------------- modes, hooks, memory


@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection", "ignore:Error detected in SeparableConv2DTrainingFunctionBackward"
)
def test_anomaly_mode_finds_the_operation():
    block, twin = pair()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same(step(block, random(2, 5, 6, 9)), step(twin, random(2, 5, 6, 9)))
        y = block(random(2, 5, 6, 9))
        with pytest.raises(RuntimeError, match=r"SeparableConv2DTrainingFunctionBackward.* returned nan"):
            y.backward(torch.full_like(y, torch.nan))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "frozen"), ("frozen", "training")])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(norms, use_reentrant):
    block, twin = pair(*norms)
    results = []
    for model in (block, twin):

        class Checkpointed(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return checkpoint(self.model, x, use_reentrant=use_reentrant)

        results.append(step(Checkpointed(model), random(2, 5, 6, 9)))
    gradients = 2 + len(list(block.parameters()))
    assert_same(*(result[:gradients] for result in results))
    if use_reentrant:
        assert_same(*results)


def test_a_checkpoint_that_ends_with_the_block_counts_the_batch_once():
    """It stops as soon as what was saved is there again, before the running statistics follow a second time."""
    block, twin = pair()
    checkpoint(block, random(2, 5, 6, 9), use_reentrant=False).sum().backward()
    twin(random(2, 5, 6, 9))
    torch.testing.assert_close(list(block.buffers()), list(twin.buffers()))


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("norms", list(itertools.product(NORMS, NORMS)))
def test_saved_bytes(norms, channels_last):
    """The input and the raw pointwise product, and in eval mode the input alone, besides some values a channel."""
    block, _ = pair(*norms, channels=(5, 7))
    x = in_format(random(2, 5, 16, 18), channels_last)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        y = block(x)
    maps = [tensor for tensor in saved.values() if tensor.dim() == 4 and tensor.shape[2:] == x.shape[2:]]
    trains = not {*norms} <= {"none", "frozen"}
    assert nbytes(maps) == x.nbytes + (y.nbytes if trains else 0)
    statistics = sum(2 * 8 * size for norm, size in zip(norms, (5, 7), strict=True) if norm != "none")
    normalization = 4 * 8 * 5 if trains else 0  # how the input is kept
    assert nbytes(saved.values()) - nbytes(maps) == nbytes(block.parameters()) + statistics + normalization


def test_saved_tensors_may_live_elsewhere():
    block, twin = pair()
    x = random(2, 5, 6, 9)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        ours = step(block, x)
    assert_same(ours, step(twin, x))


@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "frozen"), ("frozen", "training")])
@pytest.mark.parametrize("changed", ["x", "dw.weight", "bn1.weight", "pw.weight", "bn2.bias"])
def test_what_was_saved_must_not_change(norms, changed):
    block, _ = pair(*norms)
    x = random(2, 5, 6, 9)
    y = block(x).sum()
    with torch.no_grad():
        (x if changed == "x" else block.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_statistics_may_change_between_forward_and_backward():
    """As they do when a block is called twice."""
    results = []
    for model in pair():
        x = random(2, 5, 6, 9).requires_grad_()
        (model(x) + model(2 * x)).sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    assert_same(*results)


def test_a_graph_is_gone_after_backward():
    block, _ = pair()
    y = block(random(2, 5, 6, 9)).sum()
    y.backward(retain_graph=True)
    first = block.pw.weight.grad.clone()
    y.backward()
    assert torch.equal(block.pw.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_an_output_may_be_changed_in_place():
    results = []
    for model in pair(pointwise_activation="none"):
        x = random(2, 5, 6, 9).requires_grad_()
        y = model(x)
        y.mul_(2)
        y.relu_().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    assert_same(*results)
