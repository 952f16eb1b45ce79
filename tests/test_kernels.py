# SPDX-License-Identifier: BSD-3-Clause
"""The kernels on NumPy arrays, for every ISA, type and memory format: right, exact where promised, and torch-free."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
import tolerance
import torch
import torch.nn.functional as F
from cases import ACTIVATION_CODES, Case, Operands

from fusedsep import _C

DTYPES = [np.float32, np.float64]
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def run(case: Case, operands: Operands, channels_last: bool, isa: str, **split) -> np.ndarray:
    """The kernels' result as (N, O, Ho, Wo), whichever way it lies in memory."""
    x = operands.x.transpose(0, 2, 3, 1) if channels_last else operands.x
    y = _C.separable_conv2d(
        np.ascontiguousarray(x),
        *operands[1:],
        pads=case.pads,
        stride=case.stride,
        dilation=case.dilation,
        activation=ACTIVATION_CODES[case.activation],
        pointwise_activation=ACTIVATION_CODES[case.pointwise_activation],
        channels_last=channels_last,
        isa=isa,
        **split,
    )
    return y.transpose(0, 3, 1, 2) if channels_last else y


def through_torch(case: Case, operands: Operands) -> np.ndarray:
    """The same through unfused torch, in the type of the operands."""
    x, dw_weight, dw_bias, pw_weight, pw_bias = (torch.from_numpy(array.astype(operands.x.dtype)) for array in operands)
    activations = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}
    h = F.conv2d(
        F.pad(x, case.pads), dw_weight[:, None], dw_bias, case.stride, 0, case.dilation, groups=case.in_channels
    )
    y = F.conv2d(activations[case.activation](h), pw_weight[:, :, None, None], pw_bias)
    return activations[case.pointwise_activation](y).numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit: NaN equals NaN, and 0.0 does not equal -0.0."""
    return a.dtype == b.dtype and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@TYPES
@FORMATS
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_error_is_within_its_bound(isa, case, dtype, channels_last):
    operands = cases.operands(case, dtype)
    y = run(case, operands, channels_last, isa)
    assert y.shape == case.out_shape
    tolerance.assert_within_bound(y, case, operands, dtype, cases.reference(case, operands))


@FORMATS
@pytest.mark.parametrize("case", [*cases.LAYERS, *cases.DEPTHS], ids=str)
def test_error_is_that_of_torch(isa, case, channels_last):
    operands = cases.operands(case)
    expected = cases.reference(case, operands)
    ours = np.abs(run(case, operands, channels_last, isa) - expected).max()
    theirs = np.abs(through_torch(case, operands) - expected).max()
    assert ours <= tolerance.FACTOR_TO_TORCH * theirs + tolerance.one_rounding(expected, np.float32)


def test_the_reference_itself_is_that_of_torch():
    for case in (*cases.PADDINGS, *cases.ACTIVATIONS, *cases.MAPS):
        operands = cases.operands(case, np.float64)
        np.testing.assert_allclose(
            cases.reference(case, operands), through_torch(case, operands), rtol=1e-12, atol=1e-12
        )


def test_the_bound_notices_one_wrong_tap():
    case = Case(in_channels=1024, out_channels=5, height=3, width=3)
    operands = cases.operands(case)
    wrong = operands._replace(dw_weight=operands.dw_weight.copy())
    wrong.dw_weight[1000, 2, 2] = 0
    with pytest.raises(AssertionError, match="exceeds its bound"):
        tolerance.assert_within_bound(
            cases.reference(case, wrong).astype(np.float32), case, operands, np.float32, cases.reference(case, operands)
        )


@TYPES
@FORMATS
def test_biases_may_be_left_out(isa, dtype, channels_last):
    case = Case(activation="none")
    operands = cases.operands(case, dtype)
    zeros = operands._replace(dw_bias=np.zeros(case.in_channels), pw_bias=np.zeros(case.out_channels))
    left_out = operands._replace(dw_bias=None, pw_bias=None)
    assert same_bits(run(case, left_out, channels_last, isa), run(case, zeros, channels_last, isa))


@TYPES
@FORMATS
def test_any_offset_in_memory(isa, dtype, channels_last):
    """Operands and result at addresses that are a multiple of nothing but their element size."""
    case = Case(in_channels=17, out_channels=33, height=7, width=19)
    operands = cases.operands(case, dtype)
    expected = run(case, operands, channels_last, isa)
    for offset in (1, 2, 3, 5, 7):

        def moved(array, offset=offset):
            buffer = np.full(array.size + offset, np.nan, array.dtype)
            buffer[offset:] = array.ravel()
            return buffer[offset:].reshape(array.shape)

        x = operands.x.transpose(0, 2, 3, 1) if channels_last else operands.x
        out = moved(np.empty_like(np.ascontiguousarray(expected.transpose(0, 2, 3, 1) if channels_last else expected)))
        y = _C.separable_conv2d(
            moved(x), *map(moved, operands[1:]), channels_last=channels_last, isa=isa, pointwise_activation=0, out=out
        )
        assert y.ctypes.data == out.ctypes.data
        assert same_bits(out.transpose(0, 3, 1, 2) if channels_last else out, expected)


@TYPES
@FORMATS
@pytest.mark.parametrize(
    "case",
    [
        Case(in_channels=33, out_channels=65, height=9, width=11, batch=2),
        Case(in_channels=20, out_channels=17, height=9, width=12, stride=2, batch=3),
        Case(in_channels=600, out_channels=70, height=3, width=5),
        Case(in_channels=3, out_channels=2, height=60, width=61),
        Case(in_channels=1, out_channels=1, height=1, width=1),
    ],
    ids=str,
)
def test_same_bits_however_the_work_is_split(isa, case, dtype, channels_last):
    operands = cases.operands(case, dtype)
    expected = run(case, operands, channels_last, isa)
    pixels = case.out_shape[2] * case.out_shape[3]
    least_tiles = -(-pixels // 2048)
    for threads in (1, 2, 3, 5, 64):
        for tiles in {0, least_tiles, least_tiles + 1, least_tiles + 6, min(pixels, 100)}:
            for share_tiles in (None, False, True):
                y = run(
                    case,
                    operands,
                    channels_last,
                    isa,
                    threads=threads,
                    tiles_per_image=min(tiles, pixels),
                    share_tiles=share_tiles,
                )
                assert same_bits(y, expected), f"{threads=} {tiles=} {share_tiles=}"


@TYPES
@FORMATS
@pytest.mark.parametrize("case", [Case(17, 33, 14, 14, batch=5), Case(130, 170, 1, 1, batch=5)], ids=str)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(isa, case, dtype, channels_last):
    operands = cases.operands(case, dtype)
    operands.x[3] = np.nan  # nor on a neighbour that is broken
    together = run(case, operands, channels_last, isa, threads=3)
    for image in (0, 1, 2, 4):
        alone = run(case._replace(batch=1), operands._replace(x=operands.x[image : image + 1]), channels_last, isa)
        assert same_bits(alone, together[image : image + 1])


@functools.cache
def broken(case: Case, dtype: type, bad: float, row: int, column: int) -> tuple[Operands, np.ndarray]:
    """Operands with one number replaced, and what unfused torch makes of them: found once for all ISAs and formats."""
    operands = cases.operands(case, dtype)
    operands.x[0, case.in_channels // 2, row, column] = bad
    return operands, through_torch(case, operands)


@TYPES
@FORMATS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(height=7, width=37),
        Case(height=7, width=37, stride=2),
        Case(height=9, width=20, dilation=2, pads=(2, 2, 2, 2)),
        Case(in_channels=17, height=7, width=9, activation="relu6", pointwise_activation="hardswish"),
        Case(in_channels=17, height=7, width=9, activation="hardswish", pointwise_activation="relu6"),
        Case(in_channels=3, height=5, width=9, activation="none", pointwise_activation="relu"),
        Case(in_channels=24, height=7, width=9, stride=2),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_what_they_reach_in_torch(isa, case, dtype, channels_last, bad):
    """Exactly these outputs, and no other: not the next row, nor a pixel that a vector tail happened to load."""
    for row, column in ((0, 0), (3, 4), (case.height - 1, case.width - 1)):
        operands, expected = broken(case, dtype, bad, row, column)
        y = run(case, operands, channels_last, isa)
        assert np.array_equal(np.isnan(y), np.isnan(expected))
        assert np.array_equal(np.isposinf(y), np.isposinf(expected))
        assert np.array_equal(np.isneginf(y), np.isneginf(expected))


@TYPES
@FORMATS
def test_denormals_are_not_flushed(isa, dtype, channels_last):
    case = Case(in_channels=3, out_channels=5, height=4, width=19, activation="none")
    tiny = np.finfo(dtype).smallest_subnormal
    ones = np.ones
    operands = Operands(
        np.full((1, 3, 4, 19), tiny, dtype), ones((3, 3, 3), dtype), np.zeros(3), ones((5, 3), dtype), np.zeros(5)
    )
    y = run(case, operands, channels_last, isa)
    assert np.all(y[:, :, 1:-1, 1:-1] == 27 * tiny)
    assert np.all(y[:, :, 0, 0] == 12 * tiny)


@TYPES
@FORMATS
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_negative_zero_is_zero(isa, dtype, channels_last, activation):
    case = Case(activation=activation, pointwise_activation=activation)
    operands = cases.operands(case, dtype)
    results = [run(case, operands._replace(x=np.full_like(operands.x, z)), channels_last, isa) for z in (0.0, -0.0)]
    assert same_bits(*results)


@TYPES
@FORMATS
def test_huge_numbers_overflow_to_infinity(isa, dtype, channels_last):
    case = Case(activation="none")
    operands = cases.operands(case, dtype)
    operands = operands._replace(
        x=np.full_like(operands.x, np.finfo(dtype).max), dw_weight=np.ones_like(operands.dw_weight)
    )
    y = run(case, operands, channels_last, isa)
    assert not np.isfinite(y).any()


@FORMATS
@pytest.mark.parametrize("case", [Case(), *cases.LAYERS], ids=str)
def test_results_agree_between_isas_up_to_rounding(case, channels_last):
    operands = cases.operands(case)
    bound = 2 * tolerance.bound(case, operands, np.float32)
    results = [run(case, operands, channels_last, isa) for isa in _C.supported_isas()]
    assert all(np.all(np.abs(result - results[0]) <= bound) for result in results)


def valid_call():
    return {
        "x": np.ones((1, 3, 5, 6), np.float32),
        "dw_weight": np.ones((3, 3, 3), np.float32),
        "dw_bias": None,
        "pw_weight": np.ones((4, 3), np.float32),
        "pw_bias": None,
        "isa": "portable",
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones((3, 5, 6), np.float32)}, "x must have four dimensions"),
        ({"x": np.ones((1, 2, 5, 6), np.float32)}, "dw_weight must have shape"),
        ({"x": np.ones((1, 3, 0, 6), np.float32)}, "x is too small: height 0"),
        ({"x": np.ones((1, 3, 5, 2), np.float32), "pads": (0, 0, 0, 0)}, "x is too small: width 2 .* dilation 1"),
        ({"dilation": 4}, "x is too small: height 5 with padding 1 and 1 .* dilation 4"),
        ({"dw_weight": np.ones((3, 9), np.float32)}, "dw_weight must have shape"),
        ({"pw_weight": np.ones((4, 2), np.float32)}, "pw_weight must have shape"),
        ({"pw_weight": np.ones((0, 3), np.float32)}, "pw_weight must have shape"),
        ({"dw_bias": np.ones(4)}, "dw_bias must have one element a channel of x"),
        ({"pw_bias": np.ones(3)}, "pw_bias must have one element an output channel"),
        ({"stride": 3}, "stride must be from 1 to 2, got 3"),
        ({"stride": 0}, "stride must be from 1 to 2, got 0"),
        ({"dilation": 0}, "dilation must be from 1 to .*, got 0"),
        ({"pads": (1, -1, 1, 1)}, "pad_right must be from 0 to .*, got -1"),
        ({"pads": (1, 1, 1, 2**62)}, "pad_bottom must be from 0 to .*, got 4611686018427387904"),
        ({"pads": (0, 2**30, 0, 2**30)}, "more elements than memory can address"),
        ({"activation": 4}, "activation must be from 0 to 3, got 4"),
        ({"pointwise_activation": -1}, "pointwise_activation must be from 0 to 3, got -1"),
        ({"threads": 0}, "threads must be from 1 to 65536, got 0"),
        ({"tiles_per_image": 31}, "tiles_per_image must be from 1 to 30, got 31"),
        ({"out": np.ones((1, 4, 5, 5), np.float32)}, "out must have the shape of the result"),
        ({"isa": "sse9"}, "isa must be one of portable, .* got 'sse9'"),
    ],
)
def test_names_what_does_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        _C.separable_conv2d(**{**valid_call(), **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"x": np.ones((1, 3, 5, 6), np.float16)},
        {"x": np.ones((1, 3, 5, 12), np.float32)[..., ::2]},
        {"dw_weight": np.ones((3, 3, 3), np.float64)},
        {"pw_weight": np.ones((3, 4), np.float32).T},
        {"out": np.ones((1, 4, 5, 6), np.float64)},  # a converted copy would be filled instead of it
        {"out": np.ones((1, 4, 5, 12), np.float32)[..., ::2]},
    ],
    ids=["x-type", "x-strides", "dw_weight-type", "pw_weight-strides", "out-type", "out-strides"],
)
def test_no_array_is_converted_silently(changed):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.separable_conv2d(**{**valid_call(), **changed})


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@FORMATS
def test_plans_are_within_the_limits_of_the_kernels(isa, threads, channels_last):
    for batch, channels, pixels in (
        (0, 3, 9),
        (1, 1, 1),
        (1, 1024, 49),
        (8, 32, 112 * 112),
        (1, 3, 10**7),
        (1, 10**6, 4),
    ):
        plan = _C.plan(batch, channels, 64, pixels, channels_last, threads, isa)
        pixels *= batch if channels_last and batch > 0 else 1  # one image follows on the other
        assert -(-pixels // 2048) <= plan["tiles_per_image"] <= pixels
        assert plan["share_tiles"] in ((False, True) if threads > 1 else (False,))


@pytest.mark.parametrize("size", [203, 4096 + 203])
def test_the_fingerprint_sees_every_byte(size):
    buffer = np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8).copy()
    prints = {_C.fingerprint([(buffer.ctypes.data, len(buffer))])}
    for i in range(len(buffer)):
        buffer[i] ^= 1 << (i % 8)
        prints.add(_C.fingerprint([(buffer.ctypes.data, len(buffer))]))
        buffer[i] ^= 1 << (i % 8)
    assert len(prints) == len(buffer) + 1


def test_the_fingerprint_sees_order_and_boundaries():
    buffer = np.arange(64, dtype=np.uint8)
    a = buffer.ctypes.data
    regions = [[(a, 64)], [(a, 32), (a + 32, 32)], [(a + 32, 32), (a, 32)], [(a, 31), (a + 31, 33)], [(a, 63)], []]
    assert len({_C.fingerprint(list(region)) for region in regions}) == len(regions)
