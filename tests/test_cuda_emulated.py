# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels' own source under emulation on the host, over the cases of the CPU kernels.

What this cannot show is what the emulation does not model: nvcc's code, warps, the order of memory accesses, speed.
"""

from __future__ import annotations

import ctypes
import subprocess

import cases
import cuda_emulated
import numpy as np
import pytest
import tolerance
from cases import ACTIVATION_CODES, Case
from cuda_emulated import (
    PLANS,
    TYPES,
    chosen_plan,
    library,
    packed_size,
    rounded,
    separable_conv2d,
    within_bound,
)
from host_build import HOST, compile_for_host, without_preload

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
#: Partial tiles of pixels and of channels in every plan; several images in a tile; vectors that do not fit.
TILED = [
    Case(20, 150, 13, 11, batch=2),
    Case(33, 66, 12, 12, batch=3, pointwise_activation="hardswish"),
    Case(16, 32, 31, 9, 2, (0, 1, 0, 1), activation="relu6"),
    Case(5, 3, 2, 2, batch=40),
]


@FORMATS
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_error_is_within_its_bound(case, channels_last):
    operands = cases.operands(case)
    y = separable_conv2d(case, operands, channels_last)
    tolerance.assert_within_bound(y, case, operands, np.float32, cases.reference(case, operands))


@FORMATS
@pytest.mark.parametrize("type_name", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [*cases.CHANNELS, *cases.PADDINGS, *cases.ACTIVATIONS, *TILED], ids=str)
def test_16_bit_types(case, type_name, channels_last):
    operands = rounded(cases.operands(case), type_name)
    y = separable_conv2d(case, operands, channels_last, type_name)
    within_bound(y, case, operands, type_name, cases.reference(case, operands))


@FORMATS
@pytest.mark.parametrize("case", [*cases.CHANNELS, *cases.ACTIVATIONS, *TILED], ids=str)
def test_tf32(case, channels_last):
    operands = cases.operands(case)
    y = separable_conv2d(case, operands, channels_last, allow_tf32=True)
    within_bound(y, case, operands, "float32", cases.reference(case, operands), allow_tf32=True)


@FORMATS
@pytest.mark.parametrize("type_name", [*TYPES, "tf32"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_same_bits_by_every_plan_and_in_every_order_of_threads(case, type_name, channels_last):
    allow_tf32 = type_name == "tf32"
    type_name = "float32" if allow_tf32 else type_name
    operands = rounded(cases.operands(case), type_name)
    expected = separable_conv2d(case, operands, channels_last, type_name, allow_tf32=allow_tf32)
    within_bound(expected, case, operands, type_name, cases.reference(case, operands), allow_tf32)
    for plan in PLANS:
        for thread_order in (0, 1, 7):
            y = separable_conv2d(case, operands, channels_last, type_name, plan, allow_tf32, thread_order)
            assert y.tobytes() == expected.tobytes(), f"{plan} {thread_order=}"


@FORMATS
def test_an_image_does_not_depend_on_the_rest_of_its_batch(channels_last):
    case = Case(in_channels=17, out_channels=33, height=7, width=7, batch=5)
    operands = cases.operands(case)
    operands.x[3] = np.nan
    together = separable_conv2d(case, operands, channels_last)
    for image in (0, 1, 2, 4):
        alone = operands._replace(x=operands.x[image : image + 1])
        y = separable_conv2d(case._replace(batch=1), alone, channels_last)
        assert y.tobytes() == together[image : image + 1].tobytes()


@FORMATS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_nan_and_infinity_reach_what_they_reach_in_float64(channels_last, bad, activation):
    case = Case(17, 9, 7, 9, activation=activation, pointwise_activation=activation)
    for row, column in ((0, 0), (3, 4), (6, 8)):
        operands = cases.operands(case)
        operands.x[0, 8, row, column] = bad
        expected, y = cases.reference(case, operands), separable_conv2d(case, operands, channels_last)
        for kind in (np.isnan, np.isposinf, np.isneginf):
            assert np.array_equal(kind(y), kind(expected))


@FORMATS
@pytest.mark.parametrize("type_name", TYPES)
def test_any_offset_in_memory(type_name, channels_last):
    """Maps at addresses that are a multiple of nothing but their element size."""
    case = Case(16, 32, 8, 8)
    operands = rounded(cases.operands(case), type_name)
    expected = separable_conv2d(case, operands, channels_last, type_name)
    for offset in (1, 2, 3):

        def moved(array, offset=offset):
            buffer = np.empty(array.size + offset, array.dtype)
            buffer[offset:] = array.ravel()
            return buffer[offset:].reshape(array.shape)

        y = separable_conv2d(case, operands, channels_last, type_name, place=moved)
        assert y.tobytes() == expected.tobytes()


def test_scales_of_batch_norm():
    case = Case(10, 11)
    operands = cases.operands(case)
    random = np.random.default_rng(1)
    scales = random.standard_normal(10), random.standard_normal(11)
    folded = operands._replace(
        dw_weight=operands.dw_weight * scales[0][:, None, None], pw_weight=operands.pw_weight * scales[1][:, None]
    )
    y = separable_conv2d(case, operands, True, scales=scales)
    tolerance.assert_within_bound(y, case, folded, np.float32, cases.reference(case, folded))


@pytest.mark.parametrize("absent", [(), (0,), (1, 2), (1, 2, 3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_pack_folds_the_tensors_of_modules(absent):
    """As scale and shift computed in float64 are packed; ``absent`` are tensors of NormTensors, in their order."""
    c, o, eps = 10, 11, np.array([1e-5, 1e-3])
    random = np.random.default_rng(2)
    dw_weight, pw_weight = (random.standard_normal(shape).astype(np.float32) for shape in ((c, 3, 3), (o, c)))
    norms, affines = [], []
    for channels, epsilon in zip((c, o), eps, strict=True):
        tensors = [random.uniform(0.5, 2, channels).astype(np.float32) for _ in range(5)]
        wide = [tensor.astype(np.float64) for tensor in tensors]
        bias, weight, shift, mean, var = (
            default if i in absent else tensor
            for i, (tensor, default) in enumerate(zip(wide, (0, 1, 0, 0, 1 - epsilon), strict=True))
        )
        scale = weight / np.sqrt(var + epsilon) * np.ones(channels)
        affines += [scale, shift + (bias - mean) * scale]
        norms += [None if i in absent else tensor for i, tensor in enumerate(tensors)]
    expected, packed = (np.full(packed_size(c, o), np.nan, np.float32) for _ in range(2))
    scales = dw_weight, affines[0], affines[1], pw_weight, affines[2], affines[3]
    cuda_emulated._call("pack", 0, *scales, c, o, expected)
    addresses = (ctypes.c_void_p * 10)(*(None if tensor is None else tensor.ctypes.data for tensor in norms))
    cuda_emulated._call("pack_modules", 0, dw_weight, pw_weight, addresses, eps, c, o, packed)
    assert packed.tobytes() == expected.tobytes()


def test_packed_weights_are_written_whole():
    """What lies behind the last channel is zero: products add it up."""
    c, o = 5, 7
    size = packed_size(c, o)
    assert size == 2 * 32 + 2 * 32 + 9 * 32 + 32 * o
    assert packed_size(c, o, "float16") == 4 * 32 + (9 * 32 + 32 * o) // 2
    packed = np.full(size, np.nan, np.float32)
    dw_weight, pw_weight = np.ones((c, 3, 3), np.float32), np.ones((o, c), np.float32)
    cuda_emulated._call("pack", 0, dw_weight, None, None, pw_weight, None, None, c, o, packed)
    # Taps, products, and scales of one for either affine map.
    assert np.sort(packed).tolist() == [0.0] * (size - 9 * c - c * o - c - o) + [1.0] * (9 * c + c * o + c + o)


@pytest.mark.parametrize("type_name", ["float16", "bfloat16"])
def test_16_bit_types_round_to_nearest_even(type_name):
    """The emulation's float16 is the compiler's; bfloat16 is the kernels' own."""
    values = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    ties = ((np.arange(2000, dtype=np.uint32) * 32771) << 13 | 0x8000).view(np.float32)
    values = np.concatenate([values, ties, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65520, 1e-8], np.float32)])
    actual = np.empty_like(values)
    library().round_to(
        TYPES[type_name][0], cuda_emulated._address(values), cuda_emulated._address(actual), ctypes.c_int64(len(values))
    )
    finite = ~np.isnan(values)
    with np.errstate(over="ignore"):
        expected = cuda_emulated.numbers_of(cuda_emulated.bits_of(values[finite], type_name), type_name)
    assert actual[finite].tobytes() == expected.tobytes()
    assert np.isnan(actual[~finite]).all()


def test_the_cheapest_plan():
    """Few pixels are spread over the multiprocessors by channels; many are multiplied in large tiles.

    h goes through memory where its stage costs a block more than a second kernel does.
    """
    wide = chosen_plan(Case(1024, 1024, 7, 7), True)
    assert (wide.shape, wide.fused) == (0, False)
    batch = chosen_plan(Case(128, 128, 56, 56, batch=32), True, "float16")
    assert (batch.shape, batch.fused) == (2, False)
    assert chosen_plan(Case(32, 64, 56, 56), True).fused
    assert (
        chosen_plan(Case(16, 32, 14, 14), True, multiprocessors=1).shape
        >= chosen_plan(Case(16, 32, 14, 14), True).shape
    )


def test_h_of_many_channels_is_not_kept_in_shared_memory():
    assert not any(chosen_plan(Case(8192, 8, 4, 4), fmt, name).fused for fmt in (True, False) for name in TYPES)


@pytest.mark.parametrize("type_name", TYPES)
def test_products_of_a_warp(type_name):
    """32 rows by 16 columns of one step of k."""
    k = 8 if type_name == "float32" else 16
    a, b = np.random.default_rng(0).standard_normal((2, 32, k)).astype(np.float32)
    a, b = (cuda_emulated.bits_of(array, type_name) for array in (a, b[:16]))
    sums = np.empty((32, 16), np.float32)
    cuda_emulated._call("multiply_step", TYPES[type_name][0], a, b, sums)
    a, b = (tf32(array) if type_name == "float32" else cuda_emulated.numbers_of(array, type_name) for array in (a, b))
    np.testing.assert_allclose(sums, a.astype(np.float64) @ b.T, rtol=0, atol=1e-5)


def tf32(values):
    rounded_values = np.empty_like(values)
    address = cuda_emulated._address
    library().round_to_tf32(address(values), address(rounded_values), ctypes.c_int64(values.size))
    return rounded_values


def test_tf32_rounds_to_nearest():
    values = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    scale = 2.0 ** (np.floor(np.log2(np.abs(values.astype(np.float64)))) - 10)  # a unit of the last of 11 bits
    expected = np.sign(values) * np.floor(np.abs(values) / scale + 0.5) * scale
    assert np.array_equal(tf32(values), expected.astype(np.float32))
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    assert tf32(special).tobytes() == special.tobytes()


def run_program(path):
    return subprocess.run([path], capture_output=True, text=True, timeout=300, check=False, env=without_preload())


def test_the_emulation_finds_what_is_wrong(tmp_path):
    """A barrier missing or not reached by all; shared memory not written; an asynchronous copy not waited for."""
    compile_for_host(HOST / "faults.cpp", tmp_path / "faults", "-O1")
    finished = run_program(tmp_path / "faults")
    assert finished.stdout.split() == ["right", "barrier:found", "divergence:found", "unwritten:found", "wait:found"]


def test_no_data_race_in_threads(tmp_path):
    """The threads of a block as real threads, under ThreadSanitizer."""
    compile_for_host(HOST / "races.cpp", tmp_path / "races", "-O1", "-g", "-fsanitize=thread", "-DEMULATE_WITH_THREADS")
    finished = run_program(tmp_path / "races")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "no races\n"
