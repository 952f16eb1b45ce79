# SPDX-License-Identifier: BSD-3-Clause
"""Bad input is a Python exception that names the argument, what was wanted and what came."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from twins import random, twins


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, r"x must be a torch\.Tensor, got NoneType"),
        ([[1.0]], TypeError, r"x must be a torch\.Tensor, got list"),
        (torch.zeros(2, 6, 6, 9), ValueError, r"x must have 5 channels, got 6 in shape \[2, 6, 6, 9\]"),
        (torch.zeros(6, 6, 9), ValueError, r"x must have 5 channels, got 6 in shape \[6, 6, 9\]"),
        (torch.zeros(2, 0, 6, 9), ValueError, "x must have 5 channels, got 0"),
        (torch.zeros(5, 9), ValueError, r"x must have shape \[N, C, H, W\] or \[C, H, W\], got \[5, 9\]"),
        (torch.zeros(1, 2, 5, 6, 9), ValueError, r"x must have shape .* got \[1, 2, 5, 6, 9\]"),
        (torch.tensor(1.0), ValueError, r"x must have shape .* got \[\]"),
        (
            torch.zeros(2, 5, 6, 9).double(),
            TypeError,
            r"x must have the dtype of the weights, .*32, got torch\.float64",
        ),
        (torch.zeros(2, 5, 6, 9).half(), TypeError, r"x must have the dtype of the weights, .*32, got torch\.float16"),
        (torch.zeros(2, 5, 6, 9).int(), TypeError, r"x must be a floating-point tensor, got torch\.int32"),
        (torch.zeros(2, 5, 6, 9).cfloat(), TypeError, r"x must be a floating-point tensor, got torch\.complex64"),
        (torch.zeros(2, 5, 6, 9, device="meta"), ValueError, "x must be on the device of the weights, cpu, got meta"),
        (torch.zeros(2, 5, 0, 9), ValueError, "x must hold the 3x3 kernel .* 0 x 9"),
        (torch.zeros(2, 5, 6, 0), ValueError, "x must hold the 3x3 kernel .* 6 x 0"),
    ],
    ids=lambda value: None if isinstance(value, (str, type)) else getattr(value, "shape", type(value).__name__),
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_bad_input_is_named(x, error, message, mode):
    block, _ = twins(5, 7, dtype=torch.float32)
    with mode(), pytest.raises(error, match=message):
        block(x)


def test_a_map_smaller_than_the_kernel_is_named():
    block, _ = twins(5, 7, padding=(0, 1, 0, 0), dilation=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dilation 2: a map of 4 x 9 with padding \(0, 1, 0, 0\)"):
        block(torch.zeros(2, 5, 4, 9))


@pytest.mark.parametrize("name", ["dw.weight", "pw.weight", "bn1.weight", "bn1.running_mean", "bn2.running_var"])
def test_a_parameter_without_memory_is_not_read(name):
    """What comes is an error or what unfused torch gives; the process goes on."""
    block, twin = twins(5, 7)
    for model in (block, twin):
        child, attribute = name.split(".")
        meta = getattr(model.get_submodule(child), attribute).detach().to("meta")
        setattr(model.get_submodule(child), attribute, nn.Parameter(meta) if "running" not in name else meta)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        try:
            y = block(x)
        except (ValueError, RuntimeError) as error:
            assert "meta" in str(error) or "device" in str(error)
        else:
            assert y.device == twin(x).device


@pytest.mark.parametrize("name", ["bn1.weight", "bn2.running_mean", "pw.weight"])
def test_a_parameter_of_another_type_is_the_error_of_torch(name):
    block, twin = twins(5, 7)
    for model in (block, twin):
        child, attribute = name.split(".")
        tensor = getattr(model.get_submodule(child), attribute).detach().float()
        setattr(model.get_submodule(child), attribute, nn.Parameter(tensor) if "running" not in name else tensor)
    for model in (block, twin):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"type"):
            model(random(2, 5, 6, 9))
