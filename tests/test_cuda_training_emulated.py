# SPDX-License-Identifier: BSD-3-Clause
"""Training by the CUDA kernels' own source under emulation on the host, over the cases of the CPU kernels.

What this cannot show is what the emulation does not model: nvcc's code, warps, the order of memory accesses, speed.
"""

from __future__ import annotations

import itertools

import cases
import numpy as np
import pytest
import torch
from cases import Case
from cuda_emulated import bits_of, numbers_of
from cuda_training_emulated import DEVICE, outcome, run
from host_build import HOST, compile_for_host
from test_cuda_emulated import run_program
from tolerance import FACTOR_TO_TORCH
from training_reference import CASES, LARGE, MODES, arguments, assert_near, outcome_of_torch

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
#: BN of two values has no gradient at all: what float32 leaves of it is rounding. Widths are for vectors of pixels, and
#: there are none here; the largest maps and layers take long. The last case has slots of sums that are merged twice.
SHAPES = [
    *(case for case in CASES if case.batch * case.out_shape[2] * case.out_shape[3] > 2 and case not in cases.WIDTHS),
    *LARGE,
]
SHAPES = [case for case in SHAPES if case.height < 180 and case.out_channels < 1024] + [
    Case(4, 3, 128, 130, activation="none")
]
#: Several tiles of either product, several slots of sums, vectors that fit and that do not.
TILED = [
    Case(20, 150, 13, 11, batch=2),
    Case(33, 66, 12, 12, batch=3, pointwise_activation="hardswish"),
    Case(136, 36, 31, 9, 2, (0, 1, 0, 1), activation="relu6", batch=2),
    Case(5, 3, 2, 2, batch=40),
]
#: Processors and shared memory: the tiles of the weight gradient and the plan of the forward are others on each.
DEVICES = [DEVICE, (1, 227 * 1024), (40, 64 * 1024)]


def assert_formats_near(given, **more):
    assert_near(given, torch.float32, *(outcome(given, channels_last, **more) for channels_last in (False, True)))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_shape(case):
    distance = min(3e-7 if case in LARGE else 1e-4, 1.0 / (40 * torch.Size(case.out_shape).numel()))
    given = arguments(case, distance=distance)
    assert_formats_near(given)


@pytest.mark.parametrize("case", TILED, ids=str)
def test_every_device(case):
    given = arguments(case, distance=1e-6)
    runs = itertools.product((False, True), DEVICES)
    assert_near(given, torch.float32, *(outcome(given, channels_last, device=device) for channels_last, device in runs))


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_mixture_of_batch_norms(modes, bias):
    case = Case(9, 17, 7, 9, 2, batch=2, activation="hardswish", pointwise_activation="relu6")
    given = arguments(case, modes, bias, seed=3)
    assert_formats_near(given)


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_large_mean_does_not_cancel(mean):
    case = Case(12, 20, 30, 31, batch=2, pads=(0, 0, 0, 0), activation="none", pointwise_activation="none")
    given = arguments(case, mean=mean)
    assert_formats_near(given)


@FORMATS
def test_a_constant_channel_has_no_variance(channels_last):
    given = arguments(Case(5, 7, 20, 20, batch=2, pads=(0, 0, 0, 0)), distance=0)
    given.x[:, 1] = 1e3
    given.operands[0][1] = 1 / 16
    outputs, _ = run(given, channels_last)
    assert outputs[3][1] == 0


def of_type(given, type_name):
    """With every number rounded to the type."""

    def rounded(tensor):
        if tensor is None:
            return None
        return torch.from_numpy(np.array(numbers_of(bits_of(tensor.numpy(), type_name), type_name))).double()

    operands = tuple(rounded(tensor) for tensor in given.operands)
    return given._replace(x=rounded(given.x), operands=operands, grad_y=rounded(given.grad_y))


def rms(tensor):
    return tensor.square().mean().sqrt()


@FORMATS
@pytest.mark.parametrize("type_name", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [*TILED, Case(16, 24, 20, 20, batch=2, pointwise_activation="relu")], ids=str)
def test_16_bit_types(case, type_name, channels_last):
    """Where rounding decides about derivatives, errors are compared in the mean."""
    given = of_type(arguments(case, bias=True, distance=0), type_name)
    expected, unfused = outcome_of_torch(given), outcome_of_torch(given, getattr(torch, type_name))
    for ours, theirs, exact in zip(outcome(given, channels_last, type_name), unfused, expected, strict=True):
        one_rounding = torch.finfo(ours.dtype).eps * exact.abs().max()
        assert rms(ours.double() - exact) <= FACTOR_TO_TORCH * rms(theirs.double() - exact) + one_rounding


# ---------------------------------------------------------------------------------------------------------------- bits


def assert_same_bits(ours, theirs):
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.numpy().tobytes() == other.numpy().tobytes()


@FORMATS
@pytest.mark.parametrize("type_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_same_bits_in_every_order_of_threads(case, type_name, channels_last):
    given = of_type(arguments(case, distance=0), type_name)
    expected = run(given, channels_last, type_name)
    for thread_order in (0, 1, 7):
        assert_same_bits(run(given, channels_last, type_name, thread_order=thread_order), expected)


@FORMATS
def test_only_what_is_wanted(channels_last):
    given = arguments(Case(9, 17, 7, 9, batch=2), (1, 1), bias=True)
    _, everything = run(given, channels_last)
    for wanted in [*(1 << bit for bit in range(9)), 0, 0b000100001, 0b111000000]:
        _, gradients = run(given, channels_last, wanted=wanted)
        for bit, (gradient, full) in enumerate(zip(gradients, everything, strict=True)):
            assert (gradient is not None) == bool(wanted >> bit & 1)
            assert gradient is None or torch.equal(gradient, full)


@FORMATS
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
def test_a_product_in_the_place_of_the_input(activation, channels_last):
    """The block before it, in the same format, kept it and what made the input of it: the same bits."""
    before = arguments(Case(6, 9, 7, 9, batch=2, pointwise_activation=activation), distance=0)
    (x, product, *_, normalization), _ = run(before, channels_last)
    given = arguments(Case(9, 17, 7, 9, 2, batch=2), distance=0)._replace(x=x.double())
    expected = run(given, channels_last)
    assert_same_bits(run(given, channels_last, kept=(product, normalization)), expected)
    # A negative code says that it is the input itself.
    assert_same_bits(run(given, channels_last, kept=(x, torch.full((4, 9), -1.0))), expected)


def test_any_offset_in_memory():
    """Maps at addresses that are a multiple of nothing but their element size; they are read one by one then."""
    case = Case(16, 32, 8, 8, batch=2)
    given = arguments(case)

    def moved(array):
        buffer = np.empty(array.size + 1, array.dtype)
        buffer[1:] = array.ravel()
        return buffer[1:].reshape(array.shape)

    assert_formats_near(given, place=moved)


# ------------------------------------------------------------------------------------------------------------ specials


@FORMATS
@pytest.mark.parametrize("stride", [1, 2])
def test_pixels_that_no_output_sees_stay_out_of_every_sum(stride, channels_last):
    # Without padding, the last row and column of an even map are beyond the taps at stride 2; at stride 1 all are seen.
    given = arguments(Case(5, 7, 8, 22, stride, (0, 0, 0, 0), batch=2), (1, 2))
    clean = run(given, channels_last)
    given.x[:, :, -1] = float("inf")
    given.x[:, :, :, -1] = float("nan")
    ours = run(given, channels_last)
    results = [tensor for tensor in itertools.chain(*ours) if tensor is not None]
    assert all(torch.isfinite(tensor).all() for tensor in results) == (stride == 2)
    if stride == 2:
        assert_same_bits(ours, clean)


@FORMATS
def test_nan_propagates_as_in_torch(channels_last):
    given = arguments(Case(5, 7, 6, 9, batch=2, pointwise_activation="relu"), (1, 1))
    given.x[1, 2, 3, 4] = float("nan")
    for ours, theirs in zip(outcome(given, channels_last), outcome_of_torch(given), strict=True):
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs))


@FORMATS
def test_an_empty_batch(channels_last):
    given = arguments(Case(5, 7, 6, 9, batch=0), (2, 1))
    _, gradients = run(given, channels_last)
    assert all((gradient == 0).all() for gradient in gradients if gradient is not None)


def test_no_data_race_in_threads(tmp_path):
    """The threads of a block as real threads, under ThreadSanitizer."""
    flags = ("-O1", "-g", "-fsanitize=thread", "-DEMULATE_WITH_THREADS")
    compile_for_host(HOST / "training_races.cpp", tmp_path / "races", *flags)
    finished = run_program(tmp_path / "races")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "no races\n"
