# SPDX-License-Identifier: BSD-3-Clause
"""In eval mode the kernels run wherever they may."""

from __future__ import annotations

import pytest
import torch
from twins import assert_close, random, twins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_kernels_run_in_the_plain_case(isa, kernel_calls, dtype, mode):
    block, twin = twins(5, 7, dtype=dtype)
    with mode():
        x = random(2, 5, 6, 9, dtype=dtype)
        assert_close(block(x), twin(x))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), (3, 0, 1, 2), "same"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_kernels_run_for_every_geometry(kernel_calls, stride, padding, dilation):
    block, twin = twins(5, 7, stride, padding=padding, dilation=dilation, activation="hardswish")
    x = random(2, 5, 8, 9)
    with torch.no_grad():
        assert_close(block(x), twin(x))
    assert len(kernel_calls) == 1


def test_kernels_run_without_a_batch_dimension_and_for_no_image(kernel_calls):
    block, twin = twins(5, 7)
    x = random(3, 5, 6, 9)
    with torch.no_grad():
        assert_close(block(x[1]), twin(x)[1])
        assert block(x[:0]).shape == (0, 7, 6, 9)
    assert len(kernel_calls) == 2


def test_inference_mode_then_normal_mode(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()  # with weights that were packed in inference mode
    twin(x).sum().backward()
    assert_close(block.dw.weight.grad, twin.dw.weight.grad)
    assert len(kernel_calls) == 2


def test_weights_are_packed_once(kernel_calls):
    block, _ = twins(5, 7)
    with torch.no_grad():
        for _ in range(3):
            block(random(2, 5, 6, 9))
    assert len({id(call[1]) for call in kernel_calls}) == 1
