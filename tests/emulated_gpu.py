# SPDX-License-Identifier: BSD-3-Clause
"""Two GPUs for torch in the memory of the host (tests/cuda_host/gpu.cpp), and this package's CUDA extension for them.

The extension is the binding as it is built for a GPU, with the kernels under emulation. ``FUSEDSEP_EMULATED_GPU=1``
makes tests/conftest.py call :func:`install`, so that tests for a GPU run without one:

    FUSEDSEP_EMULATED_GPU=1 pytest tests/test_cuda.py tests/test_cuda_training.py
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import time

from host_build import BINDINGS, HOST, ROOT, kernels, library, optimized, torch_flags

#: Compiled in no time.
_FLAGS = [*optimized(), "-O0"]

IS_WANTED = os.environ.get("FUSEDSEP_EMULATED_GPU") == "1"


def install() -> None:
    """Before anything imports torch, which asks but once whether there is a GPU."""
    assert "torch" not in sys.modules
    compiler, linker = torch_flags()
    # Under this name the binding looks for the current stream.
    name = "libtorch_cuda.so"
    link = [*linker, "-ltorch_cpu", "-lc10", f"-Wl,-soname,{name}"]
    gpu = ctypes.CDLL(str(library(name, [HOST / "gpu.cpp"], [*_FLAGS, *compiler], link)))

    import torch

    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: gpu.device_count()
    torch.cuda.get_device_name = lambda device=None: "emulated"
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda device: gpu.exchange_device(device)
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream, torch.cuda.stream = lambda device=None: _Stream(), contextlib.nullcontext
    torch.cuda.synchronize = torch.cuda._sleep = lambda _=None: None
    torch.UntypedStorage.clone = _clone
    _import_extension(compiler, linker)


class _Stream:
    """What is launched has run."""

    def wait_stream(self, other: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event(_Stream):
    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds."""
        return 1e3 * (end._seconds - self._seconds)


def _clone(storage):
    """A torch without CUDA makes no storage on a GPU but that of a tensor."""
    import torch

    def bytes_of(storage):
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return empty.set_(storage, 0, (storage.nbytes(),), (1,))

    return bytes_of(storage).clone().untyped_storage()


def _import_extension(compiler: list[str], linker: list[str]) -> None:
    facts = ROOT / "build" / "emulated" / "facts"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "fusedsep_cuda_build_info.h").write_text(
        '#define FUSEDSEP_NVCC_VERSION "none"\n#define FUSEDSEP_CUDA_TARGETS_JSON "[\\"emulated\\"]"\n'
    )
    sources = [*sorted((BINDINGS / "cuda").glob("*.cpp")), HOST / "device.cpp"]
    flags = [*_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{facts}", *compiler]
    path = library("_C_cuda.so", sources, flags, [*kernels(), *linker, "-ltorch_cpu", "-ltorch_python"])
    spec = importlib.util.spec_from_file_location("fusedsep._C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fusedsep._C_cuda"] = module


def each_case(cases):
    """The test for each of them. An emulated GPU takes the small ones: the rest is for the kernels, not the binding."""
    import pytest

    def param(case):
        is_small = case.batch * case.height * case.width * case.in_channels * case.out_channels < 2**19
        is_one_of_many = (case.height, case.width, case.pads) in ((5, 6, (1, 1, 1, 1)), (3, 3, (1, 1, 1, 1)))
        return pytest.param(case, marks=() if is_small and not is_one_of_many else pytest.mark.needs_gpu)

    return pytest.mark.parametrize("case", list(map(param, cases)), ids=str)
