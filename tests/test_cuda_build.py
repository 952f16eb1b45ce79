# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels compile for every target within their budget, and the extension loads where there is no GPU."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from build_files import setup_cuda
from subprocesses import run_code

import fusedsep
from fusedsep import _cuda, _kept_input, _kernel_path, _ops, _training

ROOT = Path(__file__).resolve().parent.parent

#: A multiprocessor has 65,536 registers. Bytes that a kernel may spill: a few on some targets (none on sm_90, where it
#: was measured); and of its stack, where a product that a target has no tensor cores for keeps its sums.
REGISTERS, SPILLS, STACK = 65_536, 128, 272
#: Threads of a block: no kernel has more (csrc/cuda/tiles.h).
THREADS = 256
#: Passes of training that are compiled once for each way of reading a map.
MAP_PASSES = (
    *("depthwise_statistics", "hidden", "activation_backward", "depthwise_backward", "input_gradient"),
    *("normalize", "normalize_backward_reduce", "product_gradient"),
)


def usage(report: str) -> tuple[list[tuple[str, str]], list[tuple[int, ...]], list[int]]:
    """Kernels with their targets; bytes of stack, of spills stored and of spills loaded; registers a thread.

    One of each for every kernel and target, but targets are compiled side by side, and their lines mix.
    """
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", report)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.findall(r"Used (\d+) registers", report)
    return kernels, [tuple(map(int, numbers)) for numbers in stacks], [int(number) for number in registers]


@pytest.mark.needs_nvcc
def test_kernels_stay_within_their_budget_on_every_target(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("FUSEDSEP_CUDA", "1")
    build = setup_cuda.CudaBuild.from_environment()
    build.compile(ROOT)  # does nothing where the extension was built from these sources
    reports = {path.stem: path.with_suffix(".ptxas.txt").read_text() for path in build.objects(ROOT)}
    kernels, stacks, registers = usage("".join(reports.values()))
    targets = {target for target in setup_cuda.TARGETS if target.startswith("sm_")}
    # Products: three shapes; fused in two ways of reading, or not; three types, and TF32; and those that leave
    # statistics, of three types. The depthwise stage alone: two ways of reading, three types. Packing: two sources of
    # scales, three types.
    # Training: the gradient of the weights of three shapes and types; passes over maps, of float32 in three ways of
    # reading and of two types in two; what merges sums.
    counts = {"product": 45, "depthwise": 6, "pack": 6, "weight_gradient": 9}
    counts |= dict.fromkeys(MAP_PASSES, 7)
    counts |= dict.fromkeys(("norm", "norm_backward", "pack_transposed", "depthwise_weight", "add_splits"), 3)
    counts |= dict.fromkeys(("merge_sums", "merge_moments"), 1)
    for kind, count in counts.items():
        found = Counter(target for name, target in kernels if re.search(rf"\d{kind}_kernel", name))
        assert found == dict.fromkeys(targets, count), kind
    assert len(kernels) == len(stacks) == len(registers) == sum(counts.values()) * len(targets)
    assert max(stack for stack, _, _ in stacks) <= STACK
    assert max(stores + loads for _, stores, loads in stacks) <= SPILLS
    assert max(registers) * THREADS <= REGISTERS
    _, stacks_of_training, _ = usage(reports["training"])
    assert not any(stores + loads for _, stores, loads in stacks_of_training)


def test_the_report_of_ptxas_is_understood():
    report = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_75'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
"""
    assert usage(report) == ([("_Z1av", "sm_90"), ("_Z1bv", "sm_75")], [(8, 4, 2), (0, 0, 0)], [32, 7])


@pytest.mark.needs_cuda_build
def test_the_extension_loads_and_reports_its_kernels():
    """Under whatever torch runs here: with CUDA or without."""
    state = fusedsep.backend_info()["cuda"]
    assert state.startswith("kernels for inference, float32, float16, bfloat16; sm_75, sm_80, ")
    assert "compute_120; nvcc 1" in state
    assert "; kernels for training not in use without FUSEDSEP_CUDA_TRAINING=1" in state
    if torch.version.cuda is None:
        assert state.endswith(f"not in use: torch {torch.__version__} has no CUDA")
    for operator in _cuda._kernels.build_info["operators"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedsep::{operator}", "CUDA")


@pytest.mark.needs_cuda_build
def test_an_operator_of_the_extension_raises():
    """Its C++ exceptions become Python's; a process has died of one on a machine with a GPU (README.md)."""
    operators = torch.ops.fusedsep
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    x, weight, packed = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3), torch.zeros(64)
    for operator, arguments, message in (
        (operators.separable_conv2d, (x, packed, 4, 1, 1, 1, 1, 1, 1, 0, 0, True), "must be a CUDA tensor"),
        (operators.pack, (weight, None, None, torch.randn(4, 4, 1, 1), None, None, True), "contiguous CUDA tensor"),
    ):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=message):
                operator.default.redispatch(key, *arguments)


@pytest.mark.needs_cuda_build
def test_packed_weights_have_the_size_that_the_kernels_read():
    assert _cuda.packed_size(5, 7, 4) == 2 * 32 + 2 * 32 + (9 + 7) * 32
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False):
        dw_weight, pw_weight = torch.empty(5, 1, 3, 3, device="cuda"), torch.empty(7, 5, 1, 1, device="cuda")
        packed = torch.ops.fusedsep.pack(dw_weight, None, None, pw_weight, None, None, False)
        assert packed.shape == (_cuda.packed_size(5, 7, 4),)
        x = torch.empty(2, 5, 9, 8, device="cuda", dtype=torch.float16)
        y = torch.ops.fusedsep.separable_conv2d(x, packed, 7, 2, 1, 1, 1, 1, 1, 0, 0, True)
        assert (y.shape, y.dtype) == ((2, 7, 5, 4), torch.float16)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shapes_of_training_on_a_gpu(dtype):
    """As torch.compile asks for them: maps in the format of x, statistics in float32."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False):
        x = torch.empty(2, 5, 9, 8, device="cuda", dtype=dtype)
        weights = [torch.empty(shape, device="cuda", dtype=dtype) for shape in ((5, 1, 3, 3), (7, 5, 1, 1))]
        operands = [weights[0], *5 * [None], weights[1], *5 * [None]]
        settings = (2, 1e-5, 2, 1e-5, 2, 1, 1, 1, 1, 1, 1, 1, False)
        y, p, *statistics, normalization = torch.ops.fusedsep.separable_conv2d_training(x, *operands, *settings)
        for product in (y, p):
            assert (product.shape, product.dtype) == ((2, 7, 5, 4), dtype)
            assert product.is_contiguous()
        assert [(s.shape[0], s.dtype) for s in statistics] == [(c, torch.float32) for c in (5, 5, 7, 7)]
        assert (normalization.shape, normalization.dtype) == ((4, 7), torch.float32)


@pytest.mark.needs_cuda_build
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_training_in_python(dtype, channels_last):
    """What goes on around the operators, with tensors that are on a GPU and have no numbers."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        x = torch.empty(2, 5, 9, 8, device="cuda", dtype=dtype, memory_format=fmt)
        shapes = ((5, 1, 3, 3), None, (5,), (5,), None, None, (7, 5, 1, 1), None, (7,), (7,), None, None)
        tensors = [None if shape is None else torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
        operands, settings = (
            _ops.Operands(*tensors),
            _ops.Settings(2, 1e-5, 2, 1e-5, 1, 1, 1, 1, 1, 1, 1, 1, channels_last),
        )
        norms = [nn.BatchNorm2d(c, momentum=m, device="cuda", dtype=dtype) for c, m in ((5, 0.1), (7, None))]
        followers = norms if dtype == torch.float32 else (None, None)  # converting them takes a torch with CUDA
        assert _kernel_path.run_training(x, operands, settings, *followers).shape == (2, 7, 9, 8)
        y, p, mean1, var1, mean2, var2, normalization = _ops.separable_conv2d_training(x, *operands, *settings)
        product = _kept_input.remember(y, p, normalization)
        assert _kept_input.kept_for_backward(y) == (p, normalization)
        assert product().makes(y)
        operands = operands._replace(bn1_mean=mean1, bn1_var=var1, bn2_mean=mean2, bn2_var=var2)
        needed = [True] * (1 + len(operands))
        rows = torch.empty(4, 5, device="cuda")
        gradients = _training.gradients(torch.ones_like(y), x, p, operands, settings, needed, rows)
        for gradient, tensor in zip(gradients, (x, *operands), strict=True):
            if gradient is not None and tensor is not None:
                assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, dtype, x.device)


def test_training_on_a_gpu_is_for_those_who_ask():
    for value, trains in (("1", True), ("0", False), ("", False)):
        code = "import sys, types; from fusedsep import _cuda; print(_cuda.trains(), _cuda._kernels is not None)"
        result = run_code(code, FUSEDSEP_CUDA_TRAINING=value)
        built = _cuda._kernels is not None
        assert result.stdout.split() == [str(trains and built), str(built)], result.stderr


def test_a_package_without_the_extension_says_so():
    """As it is where nvcc was not found: everything else is there."""
    result = run_code(
        """
        import sys
        sys.modules["fusedsep._C_cuda"] = None  # importing it raises ImportError
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "fusedsep._C_cuda" else find_spec(name, *rest)
        import torch, fusedsep
        print(fusedsep.backend_info()["cuda"])
        print(tuple(fusedsep.DepthwiseSeparableBlock(3, 4).eval()(torch.ones(1, 3, 5, 5)).shape))
        """
    )
    assert result.stdout.splitlines() == ["no CUDA kernels in this build", "(1, 4, 5, 5)"], result.stderr


def test_an_extension_that_does_not_load_is_no_failure():
    """As under a torch older than the one that the binding was built with."""
    result = run_code(
        """
        import importlib.machinery, importlib.util, sys
        sys.modules["fusedsep._C_cuda"] = None
        find_spec = importlib.util.find_spec
        spec = importlib.machinery.ModuleSpec("fusedsep._C_cuda", None)
        importlib.util.find_spec = lambda name, *rest: spec if name == "fusedsep._C_cuda" else find_spec(name, *rest)
        import fusedsep
        print(fusedsep.backend_info()["cuda"])
        """
    )
    assert result.stdout.startswith("the CUDA kernels of this build cannot be loaded ("), result.stderr
