# SPDX-License-Identifier: BSD-3-Clause
"""The training operators by themselves: what torch expects of an operator, and derivatives or an error."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from training_pairs import assert_same, in_format
from twins import random

from fusedsep import _ops
from fusedsep._activations import ACTIVATION_CODES
from fusedsep._ops import Operands, Settings

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
MODES = list(itertools.product((_ops.NO_NORM, _ops.FIXED_STATISTICS, _ops.BATCH_STATISTICS), repeat=2))


def arguments(
    mode1=2,
    mode2=2,
    *,
    channels=(5, 7),
    size=(6, 9),
    batch=2,
    stride=2,
    activation="hardswish",
    dtype=torch.double,
    channels_last=False,
    requires_grad=False,
):
    """The arguments of `separable_conv2d_training`."""
    in_channels, out_channels = channels
    seeds = itertools.count(1)

    def vector(count):
        return random(count, seed=next(seeds), dtype=dtype)

    def norm(mode, count):
        if mode == _ops.NO_NORM:
            return None, None, None, None
        fixed = mode == _ops.FIXED_STATISTICS
        return vector(count), vector(count), *((vector(count), vector(count).square() + 0.5) if fixed else (None, None))

    x = in_format(random(batch, in_channels, *size, dtype=dtype), channels_last)
    dw_weight = random(in_channels, 1, 3, 3, seed=100, dtype=dtype)
    pw_weight = random(out_channels, in_channels, 1, 1, seed=101, dtype=dtype)
    operands = Operands(
        dw_weight, vector(in_channels), *norm(mode1, in_channels), pw_weight, None, *norm(mode2, out_channels)
    )
    for name, tensor in (("x", x), *operands._asdict().items()):
        if tensor is not None and not name.endswith(("_mean", "_var")):
            tensor.requires_grad_(requires_grad)
    code = ACTIVATION_CODES[activation]
    settings = Settings(mode1, 1e-5, mode2, 1e-3, stride, 1, 0, 1, 1, 2, code, code, channels_last)
    return x, *operands, *settings


def backward_arguments(wanted, *forward, dense=True):
    """The arguments of `separable_conv2d_training_backward` for those of the forward operator."""
    y, p, mean1, var1, mean2, var2, _ = _ops.separable_conv2d_training(*forward)
    operands, settings = Operands(*forward[1:13]), Settings(*forward[13:])
    if settings.bn1_mode == _ops.BATCH_STATISTICS:
        operands = operands._replace(bn1_mean=mean1, bn1_var=var1)
    if settings.bn2_mode == _ops.BATCH_STATISTICS:
        operands = operands._replace(bn2_mean=mean2, bn2_var=var2)
    grad_y = random(*y.shape, seed=7, dtype=y.dtype) if dense else torch.ones((), dtype=y.dtype).expand_as(y)
    return grad_y, forward[0], None, p, *operands, *settings, wanted


def pass_arguments(channels_last, dtype=torch.double):
    """Operator -> arguments, for the passes that the training operator consists of."""
    x, *rest = arguments(dtype=dtype, channels_last=channels_last, stride=1)
    operands, settings = Operands(*rest[:12]), Settings(*rest[12:])
    geometry, code = settings[4:10], settings.activation
    affine1, affine2 = random(3, 5, seed=1), random(3, 7, seed=2)
    dw_weight, pw_weight = operands.dw_weight, operands.pw_weight
    p, _ = _ops.separable_products(x, dw_weight, pw_weight, affine1, *geometry, code, channels_last)
    g1 = in_format(random(p.shape[0], 5, *p.shape[2:], dtype=dtype), channels_last)
    grad_y = in_format(random(*p.shape, seed=3, dtype=dtype), channels_last)
    pointwise = (grad_y, x, p, dw_weight, pw_weight, affine1, affine2, random(2, 7), *geometry, code, code)
    depthwise = (g1, x, dw_weight, affine1, random(2, 5), *geometry, channels_last)
    return [
        (_ops.depthwise_statistics, (x, dw_weight, *geometry, channels_last)),
        (_ops.separable_products, (x, dw_weight, pw_weight, affine1, *geometry, code, channels_last)),
        (_ops.normalize, (p, affine2, code, channels_last)),
        (_ops.normalize_backward_reduce, (grad_y, p, affine2, code, channels_last)),
        (_ops.pointwise_backward, (*pointwise, channels_last, True, False)),
        (_ops.pointwise_backward, (*pointwise, channels_last, False, True)),
        (_ops.depthwise_backward, (*depthwise, True, False)),
        (_ops.depthwise_backward, (*depthwise, False, True)),
    ]


# ------------------------------------------------------------------------------------------------ what torch expects


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@FORMATS
@pytest.mark.parametrize("modes", [(2, 2), (1, 1), (0, 2)], ids=["training", "eval", "mixed"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, channels_last, modes, requires_grad):
    call = arguments(*modes, dtype=dtype, channels_last=channels_last, requires_grad=requires_grad)
    torch.library.opcheck(_ops.separable_conv2d_training, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@FORMATS
@pytest.mark.parametrize("wanted", [0, 0b111111111, 0b000100001])
def test_opcheck_of_backward(dtype, channels_last, wanted):
    call = backward_arguments(wanted, *arguments(dtype=dtype, channels_last=channels_last))
    torch.library.opcheck(_ops.separable_conv2d_training_backward, call)


@FORMATS
def test_opcheck_of_the_passes(channels_last):
    for operator, call in pass_arguments(channels_last):
        torch.library.opcheck(operator, call)


def assert_fakes_are_alike(operator, call):
    """Shapes and strides, also where a dimension is 1 and its stride means nothing: compiled code allocates by them."""
    with torch._subclasses.FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in call))
    real = operator(*call)
    for ours, theirs in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (fake, real)), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@FORMATS
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("channels", [(1, 1), (5, 1), (1, 7)])
@pytest.mark.parametrize("size", [(1, 2), (1, 6), (6, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_fake_outputs_are_those_of_the_operator(channels_last, modes, channels, size, batch):
    call = arguments(*modes, channels=channels, size=size, batch=batch, channels_last=channels_last)
    assert_fakes_are_alike(_ops.separable_conv2d_training, call)
    for wanted in (0b111111111, 0b010101010):
        assert_fakes_are_alike(_ops.separable_conv2d_training_backward, backward_arguments(wanted, *call))


@FORMATS
def test_fake_outputs_of_the_passes(channels_last):
    for operator, call in pass_arguments(channels_last):
        assert_fakes_are_alike(operator, call)


# ---------------------------------------------------------------------------------------------------------- meaning


@FORMATS
@pytest.mark.parametrize("modes", MODES)
def test_all_outputs_equal_the_composite(channels_last, modes):
    """The composite is what runs under transforms: what the operator returns must not depend on that."""
    call = arguments(*modes, channels_last=channels_last)
    with forward_ad.dual_level():
        expected = _ops.separable_conv2d_training(*call)
    assert_same(_ops.separable_conv2d_training(*call), expected)


@FORMATS
@pytest.mark.parametrize("modes", MODES)
def test_a_direct_call_is_differentiable(channels_last, modes):
    call = arguments(*modes, channels_last=channels_last, requires_grad=True)
    leaves = [a for a in call if isinstance(a, torch.Tensor) and a.requires_grad]
    y, p, *statistics = _ops.separable_conv2d_training(*call)
    assert not any(output.requires_grad for output in (p, *statistics))
    with forward_ad.dual_level():
        expected, *_ = _ops.separable_conv2d_training(*call)
    grad_y = random(*y.shape, seed=9)
    assert_same(torch.autograd.grad(y, leaves, grad_y), torch.autograd.grad(expected, leaves, grad_y))


def assert_transforms(operator, x, *rest):
    """``torch.func`` finds what autograd finds."""

    def function(x):
        return operator(x, *rest)[0].square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    assert_same([torch.func.grad(function)(x)], [expected])
    assert_same([torch.func.jvp(function, (x,), (x,))[1]], [(expected * x).sum()])
    batch = torch.stack([x, 2 * x])
    assert_same([torch.func.vmap(function)(batch)], [torch.stack([function(x), function(2 * x)])])


def test_transforms_of_a_direct_call():
    assert_transforms(_ops.separable_conv2d_training, *arguments())


# ----------------------------------------------------------------------------------------------------------- refusals


def without_derivative():
    """Operator -> arguments, for every operator that autograd cannot differentiate."""
    x, *rest = arguments()
    operands = Operands(*rest[:12])
    pack = (operands.dw_weight, None, None, operands.pw_weight, None, None, False)
    separable = (x, _ops.pack(*pack), 7, 1, 1, 1, 1, 1, 1, 0, 0, False)
    backward = backward_arguments(1, x, *rest)
    calls = {"pack": (_ops.pack, pack), "separable_conv2d": (_ops.separable_conv2d, separable)}
    calls["separable_conv2d_training_backward"] = (_ops.separable_conv2d_training_backward, backward)
    settings = Settings(*rest[12:]).pointwise()
    pointwise = (random(*backward[0].shape[:1], 5, *backward[0].shape[2:]), *operands.pointwise(), *settings)
    _, p, mean, var, _ = _ops.pointwise_conv2d_training(*pointwise)
    pointwise = (backward[0], pointwise[0], None, p, *operands.pointwise()[:4], mean, var, *settings, 1)
    calls["pointwise_conv2d_training_backward"] = (_ops.pointwise_conv2d_training_backward, pointwise)
    return calls | {operator.name().split("::")[1]: (operator, call) for operator, call in pass_arguments(False)}


@pytest.mark.parametrize("name", without_derivative())
def test_an_operator_without_derivative_refuses(name):
    operator, (first, *rest) = without_derivative()[name]
    expected = operator(first, *rest)
    message = rf"fusedsep\.{name}\S* has no derivative, but got a tensor that requires grad or has a tangent: call it"
    with pytest.raises(RuntimeError, match=message):
        operator(first.clone().requires_grad_(), *rest)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        operator(forward_ad.make_dual(first, first), *rest)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda first: operator(first, *rest)[0].sum())(first)
    with torch.no_grad():
        again = operator(first.clone().requires_grad_(), *rest)
    for ours, theirs in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (again, expected)), strict=True):
        assert torch.equal(ours, theirs)
