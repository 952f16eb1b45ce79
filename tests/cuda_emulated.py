# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels' own source, compiled for the host and run there (tests/cuda_host), on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import host_build
import numpy as np
import tolerance
from cases import ACTIVATION_CODES, Case, Operands
from host_build import HOST

#: Name of an element type -> its number in tests/cuda_host/kernels.cpp, and bits of its significand.
TYPES = {"float32": (0, 24), "float16": (1, 11), "bfloat16": (2, 8)}
#: Number of significant bits of TF32.
TF32_BITS = 11


class Plan(NamedTuple):
    """As csrc/cuda/tiles.h has it."""

    shape: int
    fused: bool = False
    slices: int = 1


CHOSEN = Plan(-1)
PLANS = [*(Plan(shape) for shape in range(3)), *(Plan(shape, True, slices) for shape in range(3) for slices in (1, 2))]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, and the functions of tests/cuda_host that call them."""
    sources = [HOST / "training.cpp", HOST / "kernels.cpp"]
    loaded = ctypes.CDLL(str(host_build.library("calls.so", sources, host_build.optimized(), host_build.kernels())))
    loaded.packed_size.restype = ctypes.c_int64
    loaded.error_message.restype = ctypes.c_char_p
    return loaded


def _address(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def _call(name: str, *arguments: object) -> None:
    def as_c(argument: object) -> object:
        if argument is None or isinstance(argument, np.ndarray):
            return _address(argument)
        return ctypes.c_int64(argument) if name.startswith("pack") and isinstance(argument, int) else argument

    kernels = library()
    type_number, *others = arguments
    if getattr(kernels, name)(type_number, *map(as_c, others)) != 0:
        raise RuntimeError(kernels.error_message().decode())


def bits_of(array: np.ndarray, type_name: str) -> np.ndarray:
    """Numbers as elements of the type, rounded."""
    array = np.ascontiguousarray(array, np.float32)
    if type_name == "float32":
        return array
    if type_name == "float16":
        return array.astype(np.float16)
    bits = array.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def numbers_of(bits: np.ndarray, type_name: str) -> np.ndarray:
    """The inverse, as float32."""
    if type_name == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def rounded(operands: Operands, type_name: str) -> Operands:
    """With maps and weights of the type, as numbers."""

    def of_type(array: np.ndarray) -> np.ndarray:
        return numbers_of(bits_of(array, type_name), type_name)

    return operands._replace(
        x=of_type(operands.x), dw_weight=of_type(operands.dw_weight), pw_weight=of_type(operands.pw_weight)
    )


def packed_size(in_channels: int, out_channels: int, type_name: str = "float32") -> int:
    return library().packed_size(TYPES[type_name][0], ctypes.c_int64(in_channels), ctypes.c_int64(out_channels))


def _forward(case, type_name, x, y, packed, channels_last, allow_tf32, plan, multiprocessors=80) -> Plan:
    n, c, o = case.batch, case.in_channels, case.out_channels
    _, _, out_height, out_width = case.out_shape
    left, _, top, _ = case.pads
    sizes = (n, c, case.height, case.width, o, out_height, out_width, case.stride, case.dilation, top, left)
    chosen = np.empty(3, np.int64)
    _call(
        "separable_forward",
        TYPES[type_name][0],
        x,
        y,
        packed,
        np.array(sizes, np.int64),
        channels_last,
        ACTIVATION_CODES[case.activation],
        ACTIVATION_CODES[case.pointwise_activation],
        allow_tf32,
        np.array(plan, np.int64),
        ctypes.c_int64(multiprocessors),
        chosen,
    )
    return Plan(int(chosen[0]), bool(chosen[1]), int(chosen[2]))


def chosen_plan(
    case: Case, channels_last: bool, type_name: str = "float32", allow_tf32: bool = False, multiprocessors: int = 80
) -> Plan:
    """What the cost rule takes for maps that are aligned."""
    return _forward(case, type_name, None, None, None, channels_last, allow_tf32, CHOSEN, multiprocessors)


def separable_conv2d(
    case: Case,
    operands: Operands,
    channels_last: bool,
    type_name: str = "float32",
    plan: Plan = CHOSEN,
    allow_tf32: bool = False,
    thread_order: int = 0,
    scales: tuple[np.ndarray, np.ndarray] | None = None,
    place=np.copy,
) -> np.ndarray:
    """``pack`` and ``separable_forward``: (N, O, Ho, Wo) as float32.

    Args:
        scales: of the depthwise and of the pointwise result, float64, in front of the biases.
        place: where every operand and result is put: a copy of the given array.
    """
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    x, dw_weight, pw_weight = (
        place(bits_of(array, type_name))
        for array in (operands.x.transpose(order), operands.dw_weight, operands.pw_weight)
    )
    c, o = case.in_channels, case.out_channels
    packed = aligned(packed_size(c, o, type_name))
    library().set_thread_order(thread_order)
    dw_scale, pw_scale = (None, None) if scales is None else map(place, scales)
    biases = operands.dw_bias, operands.pw_bias
    _call("pack", TYPES[type_name][0], dw_weight, dw_scale, biases[0], pw_weight, pw_scale, biases[1], c, o, packed)
    shape_in_memory = tuple(case.out_shape[i] for i in order)
    y = place(bits_of(np.full(shape_in_memory, np.nan, np.float32), type_name))
    _forward(case, type_name, x, y, packed, channels_last, allow_tf32, plan)
    y = numbers_of(y, type_name)
    return y.transpose(0, 3, 1, 2) if channels_last else y


def aligned(size: int) -> np.ndarray:
    """Floats at a multiple of 16 bytes, as a GPU's allocator gives them, all NaN."""
    memory = np.full(size + 4, np.nan, np.float32)
    first = -memory.ctypes.data % 16 // 4
    return memory[first : first + size]


def within_bound(
    y: np.ndarray, case: Case, operands: Operands, type_name: str, expected: np.ndarray, allow_tf32: bool = False
) -> None:
    """Sums are float32 in every type; h is rounded to the type, as y is, and to TF32 both operands of the product are.

    An activation makes the error of h larger by at most 1.5 (see tests/tolerance.py).
    """
    assert y.shape == expected.shape
    limit = tolerance.bound(case, operands, np.float32)
    magnitude = tolerance.magnitude(case, operands)
    if type_name != "float32":
        unit = 2.0 ** -TYPES[type_name][1]
        limit = limit + 1.5 * unit * magnitude + unit * np.abs(expected)
    elif allow_tf32:
        limit = limit + 1.5 * 2 * 2.0**-TF32_BITS * magnitude
    if type_name == "float16":  # half of the smallest subnormal number, for each h and for y
        limit = limit + 2.0**-25 * (1 + 1.5 * np.abs(operands.pw_weight).sum())
    excess = np.abs(y - expected) - 1.01 * limit
    assert np.all(excess <= 0), f"{case}: error exceeds its bound by {np.max(excess):.3g}"
