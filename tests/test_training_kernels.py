# SPDX-License-Identifier: BSD-3-Clause
"""The training operators: every instruction set against float64, bits, threads, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import Case
from training_reference import (
    CASES,
    LARGE,
    MODES,
    all_wanted,
    arguments,
    assert_near,
    outcome,
    outcome_of_passes,
    outcome_of_torch,
    run,
    settings,
    shared_arguments,
)

from fusedsep import _ops

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])

#: BN of two values has no gradient at all: what float32 leaves of it is rounding.
SHAPES = [
    pytest.param(case, dtype, id=f"{case}-{dtype}".replace("torch.", ""))
    for case, dtype in itertools.product(CASES + LARGE, (torch.float32, torch.float64))
    if dtype == torch.float64 or case.batch * case.out_shape[2] * case.out_shape[3] > 2
]


def assert_formats_near(given, dtype, formats):
    # Narrow maps run in channels_last inside the operators, whatever their own format is; the passes leave it alone.
    runs = [*((outcome, fmt) for fmt in formats), (outcome_of_passes, False)]
    assert_near(given, dtype, *(run_them(given, dtype, channels_last) for run_them, channels_last in runs))


@pytest.mark.parametrize(("case", "dtype"), SHAPES)
def test_every_shape(isa, case, dtype):
    distance = 1e-4 if dtype == torch.float32 else 1e-9
    if case in LARGE:
        distance = min(distance, 3e-7)
    # Fewer numbers near a kink are found where there are more numbers.
    given = shared_arguments(case, distance=min(distance, 1.0 / (40 * torch.Size(case.out_shape).numel())))
    assert_formats_near(given, dtype, formats=(False, True))


@FORMATS
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_mixture_of_batch_norms(isa, modes, bias, channels_last):
    case = Case(9, 17, 7, 9, 2, batch=2, activation="hardswish", pointwise_activation="relu6")
    given = shared_arguments(case, modes, bias, seed=3)
    expected = outcome_of_torch(given)
    for run_them in (outcome, outcome_of_passes):
        for ours, exact in zip(run_them(given, torch.double, channels_last), expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@FORMATS
@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_large_mean_does_not_cancel(isa, mean, channels_last):
    case = Case(12, 20, 30, 31, batch=2, pads=(0, 0, 0, 0), activation="none", pointwise_activation="none")
    given = shared_arguments(case, mean=mean)
    assert_formats_near(given, torch.float32, [channels_last])


@FORMATS
def test_a_constant_channel_has_no_variance(isa, channels_last):
    case = Case(5, 7, 20, 20, batch=2, pads=(0, 0, 0, 0))
    given = arguments(case, distance=0)
    given.x[:, 1] = 1e3
    given.operands[0][1] = 1 / 16
    outputs, _ = run(given, torch.float32, channels_last)
    assert outputs[3][1] == 0


# ---------------------------------------------------------------------------------------------------------------- bits


def bits(tensors):
    return [tensor.contiguous().view(torch.uint8) for tensor in tensors if tensor.numel()]


def assert_bits_equal(ours, theirs):
    for one, other in zip(bits(ours), bits(theirs), strict=True):
        assert torch.equal(one, other)


@FORMATS
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_do_not_depend_on_threads_or_run(isa, case, channels_last):
    given = shared_arguments(case, distance=0)
    torch.set_num_threads(1)
    expected = list(itertools.chain(*run(given, torch.float32, channels_last)))
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_bits_equal(itertools.chain(*run(given, torch.float32, channels_last)), expected)


@FORMATS
def test_only_what_is_wanted(isa, channels_last):
    given = arguments(Case(9, 17, 7, 9, batch=2), (1, 1), bias=True)
    _, everything = run(given, channels_last=channels_last)
    for wanted in [*(1 << bit for bit in range(9)), 0, 0b000100001, 0b111000000]:
        _, gradients = run(given, channels_last=channels_last, wanted=wanted)
        for bit, (gradient, full) in enumerate(zip(gradients, everything, strict=True)):
            if wanted >> bit & 1:
                assert torch.equal(gradient, full)
            else:
                assert gradient.shape == (0,)


@FORMATS
def test_a_gradient_of_any_strides(isa, channels_last):
    given = arguments(Case(9, 17, 7, 9, batch=2))
    y = given.grad_y
    expanded = torch.tensor(0.5).double().expand(y.shape)
    wide = torch.zeros(2, 17, 14, 18, dtype=torch.double)
    wide[:, :, ::2, ::2] = y
    for same in (
        [y, y.contiguous(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)],
        [expanded, expanded.contiguous()],
        [wide[:, :, ::2, ::2], y],
    ):
        first, *others = (run(given, channels_last=channels_last, grad_y=grad_y) for grad_y in same)
        for other in others:
            assert_bits_equal(other[1], first[1])


@FORMATS
def test_gradients_have_the_memory_format_of_their_tensor(channels_last):
    given = arguments(Case(9, 17, 7, 9, batch=2), (1, 1), bias=True)
    outputs, gradients = run(given, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for image in (outputs[0], gradients[0]):
        assert image.is_contiguous(memory_format=memory_format)
    for gradient in gradients[1:]:
        assert gradient.is_contiguous()


# ------------------------------------------------------------------------------------------------------------ specials


@FORMATS
def test_every_element_is_written(isa, channels_last):
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    for case in (*LARGE, Case(3, 5, 7, 6, 2, (0, 0, 0, 0), batch=2), Case(5, 6, 9, 9, dilation=3, batch=2)):
        outputs, gradients = run(arguments(case, distance=0), torch.float32, channels_last)
        assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *gradients))


@FORMATS
@pytest.mark.parametrize("stride", [1, 2])
def test_pixels_that_no_output_sees_stay_out_of_every_sum(isa, stride, channels_last):
    # Without padding, the last row and column of an even map are beyond the taps at stride 2; at stride 1 all are seen.
    case = Case(5, 7, 8, 22, stride, (0, 0, 0, 0), batch=2)
    given = arguments(case, (1, 2))
    clean = run(given, channels_last=channels_last)
    given.x[:, :, -1] = float("inf")
    given.x[:, :, :, -1] = float("nan")
    outputs, gradients = run(given, channels_last=channels_last)
    finite = all(torch.isfinite(tensor).all() for tensor in (*outputs, *gradients))
    assert finite == (stride == 2)
    if stride == 2:
        assert_bits_equal(itertools.chain(outputs, gradients), itertools.chain(*clean))


@FORMATS
def test_nan_propagates_as_in_torch(isa, channels_last):
    given = arguments(Case(5, 7, 6, 9, batch=2, pointwise_activation="relu"), (1, 1))
    given.x[1, 2, 3, 4] = float("nan")
    for ours, theirs in zip(outcome(given, channels_last=channels_last), outcome_of_torch(given), strict=True):
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs))


@FORMATS
def test_an_empty_batch(isa, channels_last):
    given = arguments(Case(5, 7, 6, 9, batch=0), (2, 1))
    outputs, gradients = run(given, channels_last=channels_last)
    assert outputs[0].shape == (0, 7, 6, 9)
    assert gradients[0].shape == (0, 5, 6, 9)
    assert all((gradient == 0).all() for gradient in gradients)


# -------------------------------------------------------------------------------------------------------------- errors


def forward(given, changes, channels_last=False):
    positions = ["x", "dw_weight", "dw_bias", "bn1_weight", "bn1_bias", "bn1_mean", "bn1_var"]
    positions += ["pw_weight", "pw_bias", "bn2_weight", "bn2_bias", "bn2_mean", "bn2_var"]
    positions += ["bn1_mode", "bn1_eps", "bn2_mode", "bn2_eps", "stride", "dilation", "pad_left"]
    values = [given.x, *given.operands, *settings(given, channels_last)]
    for name, value in changes.items():
        values[positions.index(name)] = value
    return _ops.separable_conv2d_training(*values)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.zeros(2, 9, 7)}, RuntimeError, r"x must be a CPU tensor of shape \[N, C, H, W\]"),
        ({"x": torch.zeros(2, 9, 7, 9, dtype=torch.half)}, RuntimeError, "x must be float32 or float64"),
        ({"x": torch.zeros(2, 9, 7, 18).double()[..., ::2]}, RuntimeError, "x must be contiguous in NCHW"),
        ({"x": torch.zeros(2, 8, 7, 9).double()}, RuntimeError, r"dw_weight must be .* \[8, 1, 3, 3\]"),
        ({"dw_weight": torch.zeros(9, 1, 3, 3)}, RuntimeError, "dw_weight must be .* the dtype of x"),
        ({"pw_weight": torch.zeros(17, 8, 1, 1).double()}, RuntimeError, r"pw_weight must be .* \[N, 9, 1, 1\]"),
        ({"bn1_weight": torch.zeros(8).double()}, RuntimeError, "bn1_weight must be .* 9 elements"),
        ({"pw_bias": torch.zeros(17)}, RuntimeError, "pw_bias must be .* the dtype of x"),
        ({"bn2_mode": 1}, RuntimeError, "bn2_mean and bn2_var must be given in bn2_mode 1"),
        ({"bn1_mode": 3}, ValueError, "bn1_mode must be from 0 to 2, got 3"),
        ({"stride": 3}, ValueError, "stride must be from 1 to 2, got 3"),
        ({"dilation": 9}, ValueError, "x is too small: height 7"),
        ({"pad_left": -1}, ValueError, "pad_left must be from 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        forward(arguments(Case(9, 17, 7, 9, batch=2)), changes)


@pytest.mark.parametrize(
    ("grad_y", "match"),
    [
        (torch.zeros(2, 17, 7, 8).double(), r"grad_y must be a CPU tensor of shape \[2, 17, 7, 9\]"),
        (torch.zeros(2, 17, 7, 9), "grad_y must be .* the dtype of x"),
    ],
)
def test_a_gradient_of_the_wrong_shape_or_type_is_named(grad_y, match):
    given = arguments(Case(9, 17, 7, 9, batch=2))
    with pytest.raises(RuntimeError, match=match):
        run(given, grad_y=grad_y)


def test_the_backward_wants_the_statistics_of_the_batch():
    given = arguments(Case(9, 17, 7, 9, batch=2))
    p = given.grad_y.clone()
    rest = (*settings(given, False), all_wanted(given))
    with pytest.raises(RuntimeError, match="bn1_mean and bn1_var must be given in bn1_mode 2"):
        _ops.separable_conv2d_training_backward(given.grad_y, given.x, None, p, *given.operands, *rest)
