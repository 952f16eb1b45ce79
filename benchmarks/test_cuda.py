# SPDX-License-Identifier: BSD-3-Clause
"""Blocks of MobileNetV1 on a GPU, batch 32: fused beside cuDNN, torch.compile and CUDA graphs of either.

``gbps`` and ``share_of_bandwidth`` count x, the weights and y once each, ``share_of_flops`` is of ``torch.mm``'s. In
training, which is a forward and a backward, x and y count three times: forward, backward, and their gradients.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import shapes
import torch

import fusedsep
from fusedsep import _cuda, reference

BATCH, CALLS = 32, 20
DTYPES = {"float32": torch.float32, "float16": torch.float16}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def _graphed(module, x):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)

    def replay():
        graph.replay()
        return y

    return replay


def _called(module, x):
    return lambda: module(x)


def _compiled(module, x):
    torch.compiler.reset()
    module.compile(fullgraph=True)
    return _called(module, x)


#: How a call is made from the unfused block in eval and its input.
ENGINES = {
    "eager": _called,
    "eager graph": _graphed,
    "compiled": _compiled,
    "fused": lambda module, x: _called(fusedsep.fuse(module), x),
    "fused graph": lambda module, x: _graphed(fusedsep.fuse(module), x),
}


def _seconds(call) -> float:
    """Of one call, by the device's clock, when it is warm."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


@functools.cache
def _peaks(dtype: torch.dtype) -> tuple[float, float]:
    """GFLOP/s of a product and GB/s of a copy here."""
    a = torch.randn(8192, 8192, device="cuda").to(dtype)
    out = torch.empty_like(a)
    gflops = 2 * 8192**3 / _seconds(lambda: torch.mm(a, a, out=out)) / 1e9
    big = torch.empty(2**28, device="cuda")
    copy = torch.empty_like(big)
    return gflops, 2 * big.nbytes / _seconds(lambda: copy.copy_(big)) / 1e9


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs_cuda: this machine has no CUDA")
each_variant = pytest.mark.parametrize(
    ("engine", "format_name", "dtype_name"), list(itertools.product(ENGINES, FORMATS, DTYPES)), ids=lambda value: value
)
each_block = pytest.mark.parametrize("shape", shapes.mobilenet_v1(1.0, 224), ids=lambda shape: shape.test_id)


def _block_and_input(monkeypatch, shape, format_name, dtype):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 is float32 for everyone
    block = reference.DepthwiseSeparableBlock(shape.in_channels, shape.out_channels, shape.stride)
    x = torch.randn(BATCH, shape.in_channels, shape.size, shape.size)
    return block.to("cuda", dtype), x.to("cuda", dtype).contiguous(memory_format=FORMATS[format_name])


def _measure(benchmark, call, shape, x, y, passes: int, maps: int) -> None:
    """``passes`` of the products and ``maps`` of x and of y are what a call needs."""

    def synchronized():
        call()
        torch.cuda.synchronize()

    benchmark(synchronized)
    seconds = _seconds(call)
    weights = 9 * shape.in_channels + shape.in_channels * shape.out_channels
    pixels = BATCH * y.shape[2] * y.shape[3]
    gflops = passes * 2 * pixels * weights / seconds / 1e9
    gbps = (maps * (x.nbytes + y.nbytes) + passes * weights * x.element_size()) / seconds / 1e9
    peak_gflops, peak_gbps = _peaks(x.dtype)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name(),
        fusedsep=fusedsep.backend_info()["cuda"],
        device_ms=seconds * 1e3,
        gflops=gflops,
        gbps=gbps,
        share_of_flops=gflops / peak_gflops,
        share_of_bandwidth=gbps / peak_gbps,
    )


@needs_cuda
@each_variant
@each_block
def test_cuda_block(benchmark, monkeypatch, shape, engine, format_name, dtype_name):
    dtype = DTYPES[dtype_name]
    block, x = _block_and_input(monkeypatch, shape, format_name, dtype)
    block.eval()
    with torch.inference_mode():
        expected = block.double()(x.double())
        call = ENGINES[engine](block.to(dtype), x)
        y = call()
        assert (y - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()
        benchmark.group = f"{shape.test_id}, {dtype_name}"
        _measure(benchmark, call, shape, x, y, 1, 1)


class _Step(torch.nn.Module):
    """A block as a function of its input that returns the output, and the gradients of input and parameters."""

    def __init__(self, block, grad_y):
        super().__init__()
        self.block, self.grad_y = block, grad_y

    def forward(self, x):
        x = x.detach().requires_grad_()
        y = self.block(x)
        return y, *torch.autograd.grad(y, [x, *self.block.parameters()], self.grad_y)


#: How a training step is made from the unfused block and its input.
TRAINING_ENGINES = {
    "eager": _called,
    "eager graph": _graphed,
    "compiled": lambda step, x: _called(_with(step, torch.compile(step.block, fullgraph=True)), x),
    "fused": lambda step, x: _called(_with(step, fusedsep.fuse(step.block)), x),
    "fused graph": lambda step, x: _graphed(_with(step, fusedsep.fuse(step.block)), x),
}


def _with(step, block):
    return _Step(block, step.grad_y)


@needs_cuda
@each_variant
@each_block
def test_cuda_training_block(benchmark, monkeypatch, shape, engine, format_name, dtype_name):
    monkeypatch.setattr(_cuda, "_trains", True)
    dtype = DTYPES[dtype_name]
    block, x = _block_and_input(monkeypatch, shape, format_name, dtype)
    with torch.no_grad():
        grad_y = torch.randn_like(block(x))
    expected = _Step(block.double(), grad_y.double())(x.double())
    torch.compiler.reset()
    call = TRAINING_ENGINES[engine](_Step(block.to(dtype), grad_y), x)
    for actual, exact in zip(call(), expected, strict=True):
        # In the mean: where a number is next to a kink, rounding decides about its derivative.
        error = (actual.double() - exact).square().mean().sqrt()
        assert error <= 64 * torch.finfo(dtype).eps * exact.abs().max()
    benchmark.group = f"training {shape.test_id}, {dtype_name}"
    _measure(benchmark, call, shape, x, grad_y, 3, 3)
