# SPDX-License-Identifier: BSD-3-Clause
"""The operators that train one convolution with its BN and its activation: pointwise, depthwise, or 3x3 of images."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from cases import Case
from fused_pairs import assert_same
from test_training_kernels import assert_bits_equal
from test_training_ops import assert_fakes_are_alike, assert_transforms
from torch.autograd import forward_ad
from training_pairs import in_format
from training_reference import (
    DEPTHWISE,
    POINTWISE,
    WHOLE,
    all_wanted,
    arguments,
    assert_near,
    operators,
    outcome,
    outcome_of_torch,
    run,
    settings,
    shared_arguments,
    with_statistics,
)
from twins import random

from fusedsep import _ops

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MODES = pytest.mark.parametrize("mode", [_ops.NO_NORM, _ops.FIXED_STATISTICS, _ops.BATCH_STATISTICS])
NAMES = {DEPTHWISE: "depthwise", POINTWISE: "pointwise", WHOLE: "3x3"}
KINDS = pytest.mark.parametrize("level", NAMES, ids=NAMES.values())
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")

#: Channels around lanes and register tiles, then maps around them, then several tiles and groups of tiles; weights that
#: are added up in parts, and larger ones.
POINTWISE_CASES = [
    *(Case(n, 9, 5, 7, batch=2) for n in (1, 3, 4, 5, 8, 15, 16, 17, 33)),
    *(Case(6, n, 5, 7, batch=2, pointwise_activation="relu6") for n in (1, 4, 6, 7, 8, 13, 14, 15, 16, 17, 32, 33)),
    *(Case(3, 5, 1, n, batch=b) for n, b in ((1, 3), (2, 2), (3, 1), (7, 1), (31, 2), (32, 1), (33, 2), (65, 1))),
    Case(24, 40, 33, 31, batch=3, pointwise_activation="relu6"),
    Case(40, 24, 35, 37, batch=2, pointwise_activation="hardswish"),
]
LARGE_POINTWISE_CASES = [
    Case(130, 70, 15, 17, batch=3, pointwise_activation="relu"),
    Case(136, 140, 13, 33, batch=2, pointwise_activation="relu6"),
    Case(16, 32, 190, 180, batch=2),  # maps that are stored past the caches
]
#: Channels of images and outputs around lanes and register tiles; strides, dilations and pads; maps smaller than the
#: kernel, and pads larger than the map; several tiles that end within rows and images.
WHOLE_CASES = [
    *(Case(n, 5, 6, 7, 2, batch=2, pointwise_activation="relu") for n in (1, 2, 3, 4, 5, 8)),
    *(Case(3, n, 6, 9, batch=2, pointwise_activation="relu6") for n in (2, 4, 7, 8, 9, 15, 16, 17, 24, 33, 65)),
    Case(3, 1, 7, 8, batch=2),
    *(Case(3, 6, 1, n, batch=b) for n, b in ((1, 3), (2, 2), (3, 1), (16, 1), (33, 1))),
    *(Case(2, 6, 9, 8, stride, pads, 1, batch=2) for stride in (1, 2) for pads in ((0, 0, 0, 0), (0, 1, 0, 1))),
    *(Case(2, 6, 9, 8, stride, (4, 3, 2, 5), dilation, batch=2) for stride in (1, 2) for dilation in (1, 2, 3)),
]
LARGE_WHOLE_CASES = [
    Case(3, 32, 65, 63, 2, batch=3, pointwise_activation="relu6"),
    Case(3, 20, 37, 41, batch=3, pointwise_activation="hardswish"),
    Case(1, 16, 190, 180, 1, batch=2),  # maps that are stored past the caches
]
#: Channels around lanes and groups of them; taps, strides and pads of every kind; maps smaller than the kernel; rows
#: that are longer than a chain of sums.
DEPTHWISE_CASES = [
    *(Case(n, n, 6, 7, batch=2, pointwise_activation="relu", kernel=5) for n in (1, 2, 7, 8, 9, 15, 16, 17, 33, 65)),
    *(
        Case(5, 5, 9, 8, stride, pads, batch=2, pointwise_activation="relu6", kernel=kernel)
        for kernel in (3, 5, 7)
        for stride in (1, 2)
        for pads in ((0, 0, 0, 0), (kernel // 2,) * 4, (0, 1, 0, 1), (9, 8, 7, 10))
        if kernel < 7 or pads != (0, 1, 0, 1)
    ),
    *(
        Case(3, 3, 1, n, stride, (k // 2,) * 4, batch=b, kernel=k)
        for n, b in ((1, 3), (2, 2), (33, 1))
        for stride in (1, 2)
        for k in (3, 5, 7)
    ),
]
LARGE_DEPTHWISE_CASES = [
    Case(70, 70, 33, 31, 1, (2,) * 4, batch=3, pointwise_activation="silu", kernel=5),
    Case(20, 20, 37, 69, 2, (1,) * 4, batch=5, pointwise_activation="hardswish"),
    Case(16, 16, 190, 180, 1, (3,) * 4, batch=2, kernel=7),  # maps that are stored past the caches
]
ALL = {
    DEPTHWISE: (DEPTHWISE_CASES, LARGE_DEPTHWISE_CASES),
    POINTWISE: (POINTWISE_CASES, LARGE_POINTWISE_CASES),
    WHOLE: (WHOLE_CASES, LARGE_WHOLE_CASES),
}
LARGE = [(level, case) for level, (_, large) in ALL.items() for case in large]
CASES = [(level, case) for level, (small, _) in ALL.items() for case in small] + LARGE


def name_of(value):
    return str(value) if isinstance(value, Case) else NAMES[value]


class Call(NamedTuple):
    """A call of an operator, and of its backward with what it returned."""

    forward: object
    arguments: tuple
    backward: object
    backward_arguments: tuple  # without ``wanted``
    wanted: int  # everything


def small_case(level, height, width):
    channels = {DEPTHWISE: (17, 17), POINTWISE: (9, 17), WHOLE: (3, 17)}[level]
    return Case(*channels, height, width, batch=2)


def call_of(
    level, mode=2, *, channels=(3, 7), size=(6, 9), batch=2, dtype=torch.double, channels_last=False, grad=False
):
    """With ``grad`` everything that has a gradient wants one."""
    if level == DEPTHWISE:
        channels = (channels[1], channels[1])
    case = Case(*channels, *size, 2, batch=batch, pointwise_activation="hardswish")
    given = arguments(case, (mode,), bias=True, level=level)
    tensors = [in_format(given.x, channels_last), *given.operands]
    tensors = [
        None if t is None else t.to(dtype).requires_grad_(grad and (level == WHOLE) <= i < 5)
        for i, t in enumerate(tensors)
    ]
    rest = settings(given, channels_last)
    forward, backward = operators(given)
    with torch.no_grad():
        y, p, *statistics, _ = forward(*tensors, *rest)
    x, *operands = (None if t is None else t.detach() for t in tensors)
    inputs = (x,) if level == WHOLE else (x, None)
    operands = with_statistics(given, operands, statistics)
    backward_arguments = (random(*y.shape, seed=7, dtype=y.dtype), *inputs, p, *operands, *rest)
    return Call(forward, (*tensors, *rest), backward, backward_arguments, all_wanted(given))


def leaves_of(call):
    return [a for a in call.arguments if isinstance(a, torch.Tensor) and a.requires_grad]


# ------------------------------------------------------------------------------------------------------------- kernels


@DTYPES
@pytest.mark.parametrize(("level", "case"), CASES, ids=name_of)
def test_every_shape(isa, level, case, dtype):
    values = case.batch * (case.height * case.width if level == POINTWISE else case.out_shape[2] * case.out_shape[3])
    if dtype == torch.float32 and values <= 2:
        dtype = torch.float64  # BN of two values has no gradient at all: what float32 leaves of it is rounding
    large = (level, case) in LARGE
    distance = 1e-9 if dtype == torch.float64 else min(3e-7 if large else 1e-4, 1 / (40 * values))
    given = shared_arguments(case, (2,), distance=distance, level=level)
    assert_near(given, dtype, *(outcome(given, dtype, channels_last) for channels_last in (False, True)))


@KINDS
@FORMATS
@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_mode(isa, level, mode, activation, bias, channels_last):
    case = small_case(level, 7, 39)._replace(pointwise_activation=activation)
    given = shared_arguments(case, (mode,), bias, seed=3, level=level)
    expected = outcome_of_torch(given)
    for ours, exact in zip(outcome(given, torch.double, channels_last), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@FORMATS
@pytest.mark.parametrize(("level", "case"), LARGE, ids=name_of)
def test_bits_do_not_depend_on_threads_or_run(isa, level, case, channels_last):
    given = shared_arguments(case, (2,), distance=0, level=level)
    torch.set_num_threads(1)
    expected = list(itertools.chain(*run(given, torch.float32, channels_last)))
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_bits_equal(itertools.chain(*run(given, torch.float32, channels_last)), expected)


@KINDS
@FORMATS
def test_only_what_is_wanted(isa, level, channels_last):
    given = shared_arguments(small_case(level, 7, 35), (1,), bias=True, level=level)
    _, everything = run(given, channels_last=channels_last)
    for wanted in [*(1 << bit for bit in range(len(everything))), 0, 0b00011, 0b01100]:
        _, some = run(given, channels_last=channels_last, wanted=wanted)
        for bit, (ours, expected) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(ours, expected if wanted >> bit & 1 else expected.new_empty(0))


@KINDS
@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is_read(isa, level, value, channels_last):
    given = arguments(small_case(level, 9, 35), (1,), level=level)
    finite, gradients = run(given, channels_last=channels_last)
    given.x[1, 2, 4, 20] = value
    outputs, changed = run(given, channels_last=channels_last)
    reach = (slice(4, 5), slice(20, 21)) if level == POINTWISE else (slice(3, 6), slice(19, 22))
    channels = slice(2, 3) if level == DEPTHWISE else slice(None)
    patch = outputs[0][(1, channels, *reach)]
    assert not patch.isfinite().any() if value != value else not patch.isfinite().all()
    patch.copy_(finite[0][(1, channels, *reach)])
    assert torch.equal(outputs[0], finite[0])
    if level != WHOLE:
        assert torch.equal(changed[0][0], gradients[0][0])


@KINDS
def test_no_image(isa, level):
    """Maps without elements, and gradients of zero."""
    call = call_of(level, _ops.FIXED_STATISTICS, batch=0)
    for output in call.forward(*call.arguments)[:2]:
        assert output.shape[0] == 0
    for grad in call.backward(*call.backward_arguments, call.wanted):
        assert torch.equal(grad, torch.zeros_like(grad))


# ------------------------------------------------------------------------------------------------------------ operator


@KINDS
@DTYPES
@FORMATS
@MODES
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(level, dtype, channels_last, mode, grad):
    call = call_of(level, mode, dtype=dtype, channels_last=channels_last, grad=grad)
    torch.library.opcheck(call.forward, call.arguments)
    if not grad:
        for wanted in (0, call.wanted, 0b00101):
            torch.library.opcheck(call.backward, (*call.backward_arguments, wanted))


@KINDS
@FORMATS
@pytest.mark.parametrize("channels", [(1, 1), (3, 1), (1, 7)])
@pytest.mark.parametrize("size", [(1, 2), (1, 40), (6, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_fake_outputs_are_those_of_the_operator(level, channels_last, channels, size, batch):
    mode = _ops.FIXED_STATISTICS
    call = call_of(level, mode, channels=channels, size=size, batch=batch, channels_last=channels_last)
    assert_fakes_are_alike(call.forward, call.arguments)
    assert_fakes_are_alike(call.backward, (*call.backward_arguments, call.wanted))


@KINDS
@FORMATS
@MODES
def test_all_outputs_and_gradients_equal_the_composite(level, channels_last, mode):
    """The composite is what runs under transforms: what the operator returns must not depend on that."""
    call = call_of(level, mode, channels_last=channels_last, grad=True)
    with forward_ad.dual_level():
        expected = call.forward(*call.arguments)
    ours = call.forward(*call.arguments)
    assert_same([t.detach() for t in ours], [t.detach() for t in expected])
    assert not any(output.requires_grad for output in ours[1:])
    grad_y = random(*ours[0].shape, seed=9)
    leaves = leaves_of(call)
    assert_same(torch.autograd.grad(ours[0], leaves, grad_y), torch.autograd.grad(expected[0], leaves, grad_y))


@FORMATS
@MODES
@pytest.mark.parametrize(
    ("level", "of_the_input"),
    [(DEPTHWISE, True), (POINTWISE, True), (WHOLE, False), (WHOLE, True)],
    ids=["depthwise", "pointwise", "3x3", "3x3 and image"],
)
def test_second_derivatives(level, of_the_input, channels_last, mode):
    """An image that a gradient is wanted of goes through ATen."""
    call = call_of(level, mode, channels_last=channels_last, grad=True)
    x, *rest = call.arguments
    leaves = [x.requires_grad_(of_the_input), *(a for a in rest if isinstance(a, torch.Tensor) and a.requires_grad)]

    def function(*leaves):
        values = iter(leaves[1:])
        operands = [next(values) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in rest]
        return call.forward(leaves[0], *operands)[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@KINDS
def test_transforms(level):
    call = call_of(level)
    assert_transforms(call.forward, *call.arguments)


OF_ALL = [
    (0, random(3, 6, 9), r"x must be a CPU tensor of shape \[N, C, H, W\]"),
    (0, random(2, 3, 6, 9).half(), "x must be float32 or float64"),
    (0, random(2, 3, 9, 6).mT, "x must be contiguous in NCHW"),
    (1, random(7, 4, 3, 3), "weight must be a contiguous CPU tensor of shape"),
    (2, random(6), "bias must be a contiguous CPU tensor of 7 elements"),
    (3, random(7).float(), "bn_weight must be .* the dtype of x"),
    (7, 3, "bn_mode must be"),
]


@pytest.mark.parametrize(
    ("level", "index", "wrong", "message"),
    [
        *((level, *arguments) for level in NAMES for arguments in OF_ALL),
        (DEPTHWISE, 1, random(7, 1, 3, 3).float(), "weight must be .* the dtype of x"),
        (DEPTHWISE, 1, random(7, 1, 9, 9), "weight must be .* k = 3, 5 or 7"),
        (DEPTHWISE, 1, random(7, 1, 3, 5), "weight must be .* k = 3, 5 or 7"),
        (DEPTHWISE, 1, random(7, 1, 4, 4), "weight must be .* k = 3, 5 or 7"),
        (DEPTHWISE, 10, 2, "dilation must be from 1 to 1"),
        (POINTWISE, 1, random(7, 3, 1, 1).float(), "weight must be .* the dtype of x"),
        (POINTWISE, 9, 5, "activation must be from 0 to 4"),
        (WHOLE, 1, random(7, 3, 3, 3).float(), "weight must be .* the dtype of x"),
        *(
            (level, *arguments)
            for level, channels in ((DEPTHWISE, 7), (WHOLE, 3))
            for arguments in (
                (0, random(2, channels, 0, 9), "x is too small: height 0"),
                (9, 3, "stride must be from 1 to 2"),
                (10, 0, "dilation must be"),
                (11, -1, "pad_left must be"),
                (15, 5, "activation must be from 0 to 4"),
            )
        ),
    ],
)
def test_wrong_arguments(level, index, wrong, message):
    call = call_of(level)
    given = list(call.arguments)
    given[index] = wrong
    with pytest.raises((RuntimeError, ValueError), match=message):
        call.forward(*given)
