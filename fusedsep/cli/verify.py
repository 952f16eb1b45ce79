# SPDX-License-Identifier: BSD-3-Clause
"""Check this installation against float64 references: every instruction set, memory format and data type."""

from __future__ import annotations

import argparse
import itertools
from typing import NamedTuple

import torch
import torch.nn as nn

import fusedsep

from .. import _kernel_path, reference
from .._frozen import FrozenSeparable
from .._padding import PaddingArgument
from ._measure import Accuracy, compare
from ._output import machine, machine_line, print_table

HELP = "check this machine's build against float64"

_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
_DTYPES = (torch.float32, torch.float64)


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
    combinations = itertools.product(fusedsep.supported_isas(), _FORMATS.items(), _DTYPES)
    for isa, (format_name, memory_format), dtype in combinations:
        with fusedsep.use_isa(isa):
            checks = {case: _check(case, memory_format, dtype) for case in _CASES}
        worst = max((check.accuracy for check in checks.values()), key=lambda accuracy: accuracy.used)
        same_bits = all(check.same_bits for check in checks.values())
        wrong = [case for case, check in checks.items() if not check.ok]
        for case in wrong:
            reason = "" if checks[case].kernels_ran else " (torch ran it, not the kernels)"
            notes.append(f"{isa}, {format_name}, {dtype}: {case}{reason}")
        failed.append(bool(wrong))
        rows.append(
            (
                isa,
                format_name,
                str(dtype).removeprefix("torch."),
                f"{worst.error:.1e}",
                f"{worst.torch_error:.1e}",
                f"{worst.allowed:.1e}",
                "yes" if same_bits else "NO",
                "FAIL" if failed[-1] else "pass",
            )
        )
    print(machine_line(machine()))
    columns = ("ISA", "format", "dtype", "error", "torch's", "allowed", "same bits", "result")
    title = f"{len(_CASES)} blocks, fused and frozen, against float64; the worst of them in each row"
    print_table(title, columns, rows, text_columns=3, failed=failed)
    print("error: the largest of an output; torch's: that of the unfused modules; same bits: at 1 and 3 threads")
    for note in notes:
        print(f"failed: {note}")
    return 1 if notes else 0


class _Check(NamedTuple):
    accuracy: Accuracy  # the worse of fused and frozen
    same_bits: bool  # at 1 and 3 threads
    kernels_ran: bool

    @property
    def ok(self) -> bool:
        return self.accuracy.ok and self.same_bits and self.kernels_ran


def _check(case: _Case, memory_format: torch.memory_format, dtype: torch.dtype) -> _Check:
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
        modules = (fused, fusedsep.freeze(fused))
        ours = [_at_threads(1, module, x) for module in modules]
        same_bits = all(torch.equal(y, _at_threads(3, module, x)) for y, module in zip(ours, modules, strict=True))
        accuracies = [compare(y, torchs, exact) for y in ours]
        kernels_ran = all(_runs_kernels(module, x) for module in modules)
    return _Check(max(accuracies, key=lambda accuracy: accuracy.used), same_bits, kernels_ran)


def _runs_kernels(module: fusedsep.DepthwiseSeparableBlock | FrozenSeparable, x: torch.Tensor) -> bool:
    if isinstance(module, FrozenSeparable):
        return _kernel_path.applies_to_tensors(x, *module.buffers())
    return _kernel_path.covered_tensors(module._separable, x, module.dw, module.bn1, module.pw, module.bn2) is not None


def _randomised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Weights and statistics as trained networks have them: negative gammas, variances of many magnitudes."""

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                bound = child.weight[0].numel() ** -0.5
                uniform(child.weight, -bound, bound)
            elif isinstance(child, nn.BatchNorm2d):
                uniform(child.weight, -1.5, 1.5)
                uniform(child.bias, -0.5, 0.5)
                uniform(child.running_mean, -1.0, 1.0)
                uniform(child.running_var, -6.0, 3.0)
                child.running_var.exp_()
    return module.eval()


def _at_threads(threads: int, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return module(x)
    finally:
        torch.set_num_threads(before)
