# SPDX-License-Identifier: BSD-3-Clause
"""Run by test_guard_pages.py in a process of its own: every operand lies between pages that must not be touched.

A read or write out of bounds ends the process with a segmentation fault; the last line printed says where.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys

import numpy as np
import torch
import training_reference
from cases import ACTIVATION_CODES, Case, operands
from chain_layers import (
    DEPTHWISE,
    PATCHES,
    PATCHES_OF_NCHW,
    Layer,
    arguments,
    branching_network,
    depthwise_map,
    excited_network,
    expand,
    joined_network,
    multiplied_network,
    network,
    upsample,
    whole_network,
)
from training_pairs import in_format

import fusedsep
from fusedsep import _C, _ops

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

CASES = [
    *(
        Case(channels, out_channels, 3, width, stride)
        for channels, out_channels in ((1, 1), (3, 5), (7, 15), (8, 16), (9, 17), (15, 31), (16, 32), (17, 33))
        for width, stride in itertools.product((1, 2, 3, 7, 8, 9, 15, 16, 17, 33), (1, 2))
    ),
    *(Case(5, 6, 1, width, pads=(0, 0, 1, 1)) for width in (3, 4, 9, 10, 17, 18, 19, 34)),
    *(Case(5, 6, 9, width, stride, (0, 0, 0, 0)) for width, stride in itertools.product((3, 10, 17, 18, 33), (1, 2))),
    *(Case(5, 6, 4, 20, stride, (5, 7, 6, 8), dilation) for stride, dilation in itertools.product((1, 2), (1, 2, 3))),
    Case(130, 40, 3, 3),
    Case(600, 7, 2, 3),
    Case(3, 4, 47, 46, batch=2),
]


def guarded(array: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy of ``array`` that ends at an inaccessible page, or begins right behind one; both sides are guarded."""
    size = -(-max(array.nbytes, 1) // _PAGE) * _PAGE
    memory = mmap.mmap(-1, size + 2 * _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + _PAGE + size):
        if _libc.mprotect(guard, _PAGE, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE + (size - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def check(case: Case, dtype: type, channels_last: bool, isa: str) -> None:
    x, *weights = operands(case, dtype)
    shape = case.out_shape
    if channels_last:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        shape = (shape[0], *shape[2:], shape[1])
    options = {
        "pads": case.pads,
        "stride": case.stride,
        "dilation": case.dilation,
        "pointwise_activation": ACTIVATION_CODES[case.pointwise_activation],
        "channels_last": channels_last,
    }
    expected = _C.separable_conv2d(x, *weights, **options, isa=isa)
    for at_end in (True, False):
        operands_there = [guarded(array, at_end) for array in (x, *weights)]
        out = guarded(np.full(shape, np.nan, dtype), at_end)
        _C.separable_conv2d(*operands_there, **options, isa=isa, out=out)
        assert np.array_equal(out, expected)

        # The operators read weights that they packed themselves: those too.
        dw_weight, dw_bias, pw_weight, pw_bias = map(torch.from_numpy, operands_there[1:])
        packed = _ops.pack(dw_weight[:, None], None, dw_bias, pw_weight[:, :, None, None], None, pw_bias, channels_last)
        packed = torch.from_numpy(guarded(packed.numpy(), at_end))
        image = torch.from_numpy(operands_there[0])
        y = _ops.separable_conv2d(
            image.permute(0, 3, 1, 2) if channels_last else image,
            packed,
            case.out_channels,
            case.stride,
            case.dilation,
            *case.pads,
            ACTIVATION_CODES[case.activation],
            ACTIVATION_CODES[case.pointwise_activation],
            channels_last,
        )
        assert np.array_equal(y.permute(0, 2, 3, 1) if channels_last else y, expected)


def check_training(
    case: Case, dtype: torch.dtype, channels_last: bool, modes: tuple, level: int = training_reference.POINTWISE
) -> None:
    given = training_reference.arguments(case, modes, bias=True, distance=0, level=level)
    settings = training_reference.settings(given, channels_last)
    forward, backward = training_reference.operators(given)

    def there(tensor: torch.Tensor | None, at_end: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        if not tensor.is_contiguous():  # channels_last
            return torch.from_numpy(guarded(tensor.permute(0, 2, 3, 1).numpy(), at_end)).permute(0, 3, 1, 2)
        return torch.from_numpy(guarded(tensor.numpy(), at_end))

    expected = [*itertools.chain(*training_reference.run(given, dtype, channels_last))]
    maps = [in_format(tensor, channels_last) for tensor in (given.x, given.grad_y)]
    for at_end in (True, False):
        x, grad_y, *operands = (
            there(None if tensor is None else tensor.to(dtype), at_end) for tensor in (*maps, *given.operands)
        )
        *outputs, _ = forward(x, *operands, *settings)
        p, *statistics = (there(output, at_end) for output in outputs[1:])
        operands = training_reference.with_statistics(given, operands, statistics)
        wanted = training_reference.all_wanted(given)
        inputs = (x,) if given.reads_an_image else (x, None)
        gradients = backward(grad_y, *inputs, p, *operands, *settings, wanted)
        for ours, exact in zip((*outputs, *gradients), expected, strict=True):
            assert torch.equal(ours, exact)
        if given.reads_an_image:
            continue
        # The same numbers as the product of a block before, and what that block makes of it.
        normalization = there(torch.cat([torch.randn(3, x.shape[1]), torch.ones(1, x.shape[1])]).to(dtype), at_end)
        y = _ops.normalize(x, normalization[:3].double(), 1, channels_last)
        of_input = backward(grad_y, y, None, p, *operands, *settings, wanted)
        of_product = backward(grad_y, x, normalization, p, *operands, *settings, wanted)
        for ours, exact in zip(of_product, of_input, strict=True):
            assert torch.equal(ours, exact)


def check_chain(channels: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [network(first, channels) for first in (PATCHES, PATCHES_OF_NCHW)]
    # A convolution, all, and what begins in the middle.
    parts = [part[begin:end] for part in layers for begin, end in ((0, 1), (0, 5), (1, 5), (4, 5))]
    pair = [expand(channels, 97), Layer(DEPTHWISE, 97, channels, residual=0)]
    alone = [
        [depthwise_map(count, kernel, stride, residual=0 if stride == 1 else -1)]
        for count in (channels, channels + 16)
        for kernel in (3, 5, 7, 11)
        for stride in (1, 2)
    ]
    alone += [[upsample(channels)], [upsample(channels + 16)]]
    alone += [
        [depthwise_map(channels + 16, kernel, dilation=dilation)] for kernel, dilation in ((3, 2), (5, 3), (3, 18))
    ]
    joined = [joined_network(5)[:length] for length in (2, 6, 8, 12, 15)]
    joined += [multiplied_network(5)[:length] for length in (2, 5, 7, 8, 12)]
    branching = [branching_network(width)[:length] for width in (5, 8, 12) for length in (6, 7, 9, 11, 15)]
    for part in (*parts, pair[:1], pair, *alone, excited_network(5), whole_network(5), *joined, *branching):
        x, packed, text = arguments(part, torch.randn(2, part[0].channels, size, size + 1).to(dtype))
        expected = _ops.chain(x, packed, text)
        for at_end in (True, False):
            if part[0].numbers.rows == PATCHES_OF_NCHW:
                image = torch.from_numpy(guarded(x.numpy(), at_end))
            else:
                image = torch.from_numpy(guarded(x.permute(0, 2, 3, 1).numpy(), at_end)).permute(0, 3, 1, 2)
            packed_there = torch.from_numpy(guarded(packed.numpy(), at_end))
            assert torch.equal(_ops.chain(image, packed_there, text), expected)
            nchw = torch.from_numpy(guarded(x.contiguous().numpy(), at_end))
            assert torch.equal(_ops.chain(nchw, packed_there, text, False), expected)


def main() -> None:
    if sys.argv[1] == "prove-the-guard":
        array = guarded(np.ones(3, np.float32), at_end=True)
        print("reading behind the end", flush=True)
        ctypes.string_at(array.ctypes.data, array.nbytes + 1)
        print("got away with it")
        return
    torch.set_num_threads(1)
    fusedsep.use_isa(sys.argv[1])
    for case, dtype, channels_last in itertools.product(CASES, (np.float32, np.float64), (False, True)):
        print(case, dtype.__name__, "channels_last" if channels_last else "nchw", flush=True)
        check(case, dtype, channels_last, sys.argv[1])
        precision = torch.float32 if dtype is np.float32 else torch.float64
        if case.batch * case.out_shape[2] * case.out_shape[3] > 1:
            check_training(case, precision, channels_last, (2, 2))
            if case.in_channels <= 8:
                check_training(case, precision, channels_last, (2,), training_reference.WHOLE)
        if case.batch * case.height * case.width > 1:
            check_training(case, precision, channels_last, (2,))
            for kernel in (3, 5, 7):
                alone = case._replace(
                    out_channels=case.in_channels, dilation=1, kernel=kernel, pads=(kernel // 2, 3, kernel // 2, 3)
                )
                check_training(alone, precision, channels_last, (2,), training_reference.DEPTHWISE)
    for channels, size, dtype in itertools.product((1, 3, 5), (5, 8, 17, 33), (torch.float32, torch.float64)):
        print("chain", channels, size, dtype, flush=True)
        check_chain(channels, size, dtype)
    print("done")


if __name__ == "__main__":
    main()
