# SPDX-License-Identifier: BSD-3-Clause
"""Blocks of MobileNetV1 on a GPU in inference, batch 32: fused beside cuDNN, torch.compile and CUDA graphs of either.

``gbps`` and ``share_of_bandwidth`` count x, the weights and y once each, ``share_of_flops`` is of ``torch.mm``'s.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import shapes
import torch

import fusedsep
from fusedsep import reference

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs_cuda: this machine has no CUDA")
@pytest.mark.parametrize(
    ("engine", "format_name", "dtype_name"), itertools.product(ENGINES, FORMATS, DTYPES), ids=lambda value: value
)
@pytest.mark.parametrize("shape", shapes.mobilenet_v1(1.0, 224), ids=lambda shape: shape.test_id)
def test_cuda_block(benchmark, monkeypatch, shape, engine, format_name, dtype_name):
    torch.manual_seed(0)
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):  # float32 is float32 for everyone
        monkeypatch.setattr(backend, "allow_tf32", False)
    dtype = DTYPES[dtype_name]
    block = reference.DepthwiseSeparableBlock(shape.in_channels, shape.out_channels, shape.stride).eval()
    x = torch.randn(BATCH, shape.in_channels, shape.size, shape.size)
    x = x.to("cuda", dtype).contiguous(memory_format=FORMATS[format_name])
    with torch.inference_mode():
        expected = block.to("cuda", dtype).double()(x.double())
        block.to(dtype)
        call = ENGINES[engine](block, x)
        y = call()
        assert (y - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()
        benchmark.group = f"{shape.test_id}, {dtype_name}"

        def synchronized():
            call()
            torch.cuda.synchronize()

        benchmark(synchronized)
        seconds = _seconds(call)
    weights = 9 * shape.in_channels + shape.in_channels * shape.out_channels
    pixels = BATCH * y.shape[2] * y.shape[3]
    gflops = 2 * pixels * weights / seconds / 1e9
    gbps = (x.nbytes + y.nbytes + weights * x.element_size()) / seconds / 1e9
    peak_gflops, peak_gbps = _peaks(dtype)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name(),
        fusedsep=fusedsep.backend_info()["cuda"],
        device_ms=seconds * 1e3,
        gflops=gflops,
        gbps=gbps,
        share_of_flops=gflops / peak_gflops,
        share_of_bandwidth=gbps / peak_gbps,
    )
