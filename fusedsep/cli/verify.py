# SPDX-License-Identifier: BSD-3-Clause
"""Check this installation against float64 references: every instruction set, memory format and data type."""

from __future__ import annotations

import argparse
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn as nn

import fusedsep

from .. import reference
from .._padding import PaddingArgument
from ._measure import Accuracy, compare
from ._output import machine, machine_line, print_table

HELP = "check this machine's build against float64"

_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
_FACTOR = 2.0  # a different order of summation makes less than this a coin toss on a single output
#: Units in the last place of the largest output. In float64 the reference is torch's own result, whose error reads 0.
_ULPS = {torch.float32: 4.0, torch.float64: 64.0}


class _Case(NamedTuple):
    shape: tuple[int, int, int, int]
    out_channels: int
    stride: int = 1
    padding: PaddingArgument = 1
    dilation: int = 1
    activation: str = "relu"
    pointwise_activation: str = "relu"


# Channels and widths around the vector lengths 4, 8 and 16, maps of one pixel and of odd sizes, every kind of padding.
_CASES = (
    _Case((1, 1, 1, 1), 1),
    _Case((1, 3, 7, 6), 5, stride=2, padding="same", activation="relu6", pointwise_activation="none"),
    _Case((1, 8, 14, 14), 16),
    _Case((2, 17, 15, 9), 9, stride=2, padding=(0, 1, 0, 1), activation="relu6", pointwise_activation="relu6"),
    _Case((1, 32, 14, 15), 64, stride=2, padding="same", activation="hardswish", pointwise_activation="hardswish"),
    _Case((1, 31, 5, 4), 33, padding=0, activation="none", pointwise_activation="none"),
    _Case((1, 16, 11, 10), 40, padding=2, dilation=2),
    _Case((3, 24, 9, 10), 24, padding=(0, 1)),
    _Case((1, 64, 56, 17), 128, stride=2),
    _Case((1, 256, 7, 7), 136, activation="relu6", pointwise_activation="relu6"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    rows, failed, notes = [], [], []
    dtypes = (torch.float32, torch.float64)
    for isa, (format_name, memory_format), dtype in itertools.product(
        fusedsep.supported_isas(), _FORMATS.items(), dtypes
    ):
        worst, same_bits = Accuracy(0.0, 0.0, 0.0), True
        with fusedsep.use_isa(isa):
            for case in _CASES:
                accuracy, reproducible = _check(case, memory_format, dtype)
                worst = worst.worse_of(accuracy)
                same_bits &= reproducible
                if not (accuracy.ok and reproducible):
                    notes.append(f"{isa}, {format_name}, {dtype}: {case}")
        ok = worst.ok and same_bits
        failed.append(not ok)
        rows.append(
            (
                isa,
                format_name,
                str(dtype).removeprefix("torch."),
                f"{worst.error:.1e}",
                f"{worst.torch_error:.1e}",
                f"{worst.allowed:.1e}",
                "yes" if same_bits else "NO",
                "pass" if ok else "FAIL",
            )
        )
    print(machine_line(machine()))
    columns = ("ISA", "format", "dtype", "error", "torch's", "allowed", "same bits", "result")
    print_table(f"{len(_CASES)} blocks, fused and frozen, against float64", columns, rows, text_columns=3, failed=failed)
    print(
        "error: the largest of the worst block; torch's: the unfused modules' on the same input; "
        "same bits: at 1 and 3 threads."
    )
    for note in notes:
        print(f"failed: {note}")
    return 1 if any(failed) else 0


def _check(case: _Case, memory_format: torch.memory_format, dtype: torch.dtype) -> tuple[Accuracy, bool]:
    """The accuracy of one block, and whether it gives the same bits at 1 and 3 threads."""
    generator = torch.Generator().manual_seed(0)
    arguments = case._asdict()
    shape = arguments.pop("shape")
    unfused = _randomised(reference.DepthwiseSeparableBlock(shape[1], **arguments), generator).to(dtype)
    fused = fusedsep.DepthwiseSeparableBlock(shape[1], **arguments).to(dtype).eval()
    fused.load_state_dict(unfused.state_dict())
    x = torch.randn(shape, generator=generator).to(dtype=dtype, memory_format=memory_format)
    with torch.no_grad():
        torchs = unfused(x)
        exact = unfused.double()(x.double())
        accuracy, same_bits = Accuracy(0.0, 0.0, 0.0), True
        for module in (fused, fusedsep.freeze(fused)):
            ours = _at_threads(1, module, x)
            same_bits &= torch.equal(ours, _at_threads(3, module, x))
            accuracy = accuracy.worse_of(compare(ours, torchs, exact, _FACTOR, _ULPS[dtype]))
    return accuracy, same_bits


def _randomised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Weights and statistics as trained networks have them: negative gammas, dead channels, large variances."""

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for bn in (child for child in module.modules() if isinstance(child, nn.BatchNorm2d)):
            uniform(bn.weight, -1.5, 1.5)
            uniform(bn.bias, -0.5, 0.5)
            uniform(bn.running_mean, -1.0, 1.0)
            uniform(bn.running_var, -6.0, 3.0)
            bn.running_var.exp_()
    return module.eval()


def _at_threads(threads: int, module: nn.Module, x: torch.Tensor) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return module(x)
    finally:
        torch.set_num_threads(before)
