# SPDX-License-Identifier: BSD-3-Clause
"""Training by the CUDA kernels' own source on the host, for the arguments of tests/training_reference.py."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from cases import ACTIVATION_CODES
from cuda_emulated import TYPES, _address, bits_of, library, numbers_of
from training_reference import EPS, Arguments, all_wanted

#: Processors of the device, and bytes of shared memory of a block: those of an H100.
DEVICE = (132, 227 * 1024)


def _in_memory(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1) if channels_last and tensor.dim() == 4 else tensor


class _Map:
    """A map in the kernels' type and memory format."""

    def __init__(self, shape, type_name, channels_last, values=None, place=np.copy):
        self.type_name, self.channels_last = type_name, channels_last
        if values is None:
            values = torch.full(shape, float("nan"))
        self.bits = place(bits_of(_in_memory(values, channels_last).numpy(), type_name))

    def tensor(self):
        values = torch.from_numpy(np.array(numbers_of(self.bits, self.type_name)))
        return values.permute(0, 3, 1, 2) if self.channels_last else values


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(None if array is None else array.ctypes.data for array in arrays))


def _call(name, *arguments):
    function = getattr(library(), name)
    if function(*arguments) != 0:
        raise RuntimeError(library().error_message().decode())


def run(
    given: Arguments,
    channels_last=False,
    type_name="float32",
    wanted=None,
    thread_order=0,
    device=DEVICE,
    kept=None,
    place=np.copy,
):
    """y, p, the statistics and the normalization; then the nine gradients, ``None`` for what is not wanted.

    Args:
        wanted: bits of the gradients, as the backward operator takes them.
        device: processors, and bytes of shared memory of a block.
        kept: what the backward gets in the place of x: a product, and its normalization.
        place: where every map and operand is put: a copy of the given array.
    """
    case = given.case
    library().set_thread_order(thread_order)
    left, _, top, _ = case.pads
    n, o, out_height, out_width = case.out_shape
    sizes = np.array(
        [n, case.in_channels, case.height, case.width, o, out_height, out_width, case.stride, case.dilation, top, left],
        np.int64,
    )
    activations = ACTIVATION_CODES[case.activation], ACTIVATION_CODES[case.pointwise_activation]
    codes = np.array([channels_last, *activations, *given.modes, *device], np.int64)
    eps = np.array(EPS)
    constants = _address(sizes), _address(codes), _address(eps)
    operands = [None if t is None else place(bits_of(t.numpy(), type_name)) for t in given.operands]
    statistics = [
        np.full(channels, np.nan, np.float32) if mode == 2 else None
        for mode, channels in zip(given.modes, (case.in_channels, o), strict=True)
        for _ in range(2)
    ]
    x = _Map(None, type_name, channels_last, given.x.float(), place)
    kept_x, x_normalization = x, None
    if kept is not None:
        kept_x, x_normalization = _Map(None, type_name, channels_last, kept[0], place), kept[1].numpy()
    p, y = (_Map(case.out_shape, type_name, channels_last, place=place) for _ in range(2))
    grad_y = _Map(None, type_name, channels_last, given.grad_y.float(), place)
    normalization = np.full((4, o), np.nan, np.float32)
    number = TYPES[type_name][0]
    shared = _pointers(operands), _pointers(statistics)
    _call("training_forward", number, _pointers([x.bits, p.bits, y.bits]), *shared, _address(normalization), *constants)

    wanted = all_wanted(given) if wanted is None else wanted
    c = case.in_channels
    shapes = [given.x.shape, (c, 1, 3, 3), *3 * [(c,)], (o, c, 1, 1), *3 * [(o,)]]
    gradients = [
        _Map(shape, type_name, channels_last and bit == 0, place=place) if wanted >> bit & 1 else None
        for bit, shape in enumerate(shapes)
    ]
    _call(
        "training_backward",
        number,
        _pointers([kept_x.bits, p.bits, grad_y.bits]),
        *shared,
        _address(x_normalization),
        _pointers([None if gradient is None else gradient.bits for gradient in gradients]),
        *constants,
    )
    statistics = [None if s is None else torch.from_numpy(s) for s in statistics]
    gradients = [None if gradient is None else gradient.tensor() for gradient in gradients]
    return [y.tensor(), p.tensor(), *statistics, torch.from_numpy(normalization)], gradients


def outcome(given: Arguments, channels_last=False, type_name="float32", **more) -> list[torch.Tensor]:
    """In the order of ``training_reference.outcome``."""
    outputs, gradients = run(given, channels_last, type_name, **more)
    dtype = getattr(torch, type_name)
    results = [outputs[0], *outputs[2:6], *gradients]
    return [result.to(dtype) for result in results if result is not None]
