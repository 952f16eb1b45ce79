# SPDX-License-Identifier: BSD-3-Clause
"""Run by test_memory.py in a process of its own: how far the peak of resident memory rises during one call."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

import fusedsep
from fusedsep import _C

#: Exit status where the system does not reset the peak: some sandboxes.
CANNOT_MEASURE = 77


def resident_bytes(field: str) -> int:
    """``VmRSS``: resident now; ``VmHWM``: the peak since it was last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def touched(*shape: int) -> np.ndarray:
    """An array whose pages are there already."""
    return np.ones(shape, np.float32)


def images(channels: int, size: int, channels_last: bool) -> np.ndarray:
    return touched(1, size, size, channels) if channels_last else touched(1, channels, size, size)


def growth(call: Callable[[], object]) -> int:
    """How far the peak during ``call`` is above what is resident before."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak (proc(5))
    except OSError:
        sys.exit(CANNOT_MEASURE)
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def of_kernels(channels_last: bool, isa: str, threads: int, channels: int, size: int) -> int:
    dw_weight, pw_weight = touched(channels, 3, 3), touched(2, channels)

    def call(x: np.ndarray, out: np.ndarray) -> None:
        _C.separable_conv2d(
            x, dw_weight, None, pw_weight, None, channels_last=channels_last, isa=isa, threads=threads, out=out
        )

    call(images(channels, 3, channels_last), images(2, 3, channels_last))  # code and weights are in memory from here on
    x, out = images(channels, size, channels_last), images(2, size, channels_last)
    return growth(lambda: call(x, out))


def of_model(model: torch.nn.Module, channels_last: bool, isa: str, threads: int, channels: int, size: int) -> int:
    """With the output."""
    torch.set_num_threads(threads)
    fusedsep.use_isa(isa)

    def tensor(size: int) -> torch.Tensor:
        x = torch.from_numpy(images(channels, size, channels_last))
        return x.permute(0, 3, 1, 2) if channels_last else x

    with torch.inference_mode():
        model(tensor(64))  # threads and packed weights are there from here on
        x = tensor(size)
        return growth(lambda: model(x))


def main(what: str, channels_last: str, isa: str, threads: str, channels: str, size: str) -> None:
    numbers = (channels_last == "channels_last", isa, int(threads), int(channels), int(size))
    if what == "kernels":
        print(of_kernels(*numbers))
    elif what == "network":
        print(of_model(fusedsep.freeze(fusedsep.MobileNetV1(width_multiplier=0.25).eval()), *numbers))
    else:
        kind = fusedsep.DepthwiseSeparableBlock if what == "block" else fusedsep.reference.DepthwiseSeparableBlock
        output_bytes = 2 * int(size) ** 2 * 4
        print(of_model(kind(int(channels), 2).eval(), *numbers) - output_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
