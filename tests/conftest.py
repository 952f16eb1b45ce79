# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures and the rule for skips: what a machine lacks is skipped locally, and fails where it is known to be there."""

from __future__ import annotations

import importlib.util
import os
import sys

# Before torch loads OpenMP: threads that wait for work leave their core to the other processes of a run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import emulated_gpu

if emulated_gpu.IS_WANTED:
    emulated_gpu.install()

import pytest
import torch
from build_files import setup_cuda

import fusedsep
from fusedsep import _C, _convolution, _ops

#: Marker -> whether the machine lacks what it needs. ``FAIL_WITHOUT_AVX512=1`` turns the skips of ``needs_avx512`` into
#: failures: for machines that are known to have it, so that a broken detection cannot pass for a missing feature.
_LACKING = {
    "needs_avx2": lambda: "avx2" not in _C.supported_isas(),
    "needs_avx512": lambda: "avx512" not in _C.supported_isas(),
    "needs_cuda": lambda: not torch.cuda.is_available(),
    "needs_gpu": lambda: emulated_gpu.IS_WANTED or not torch.cuda.is_available(),
    "needs_cuda_build": lambda: importlib.util.find_spec("fusedsep._C_cuda") is None,
    "needs_nvcc": lambda: setup_cuda.find_nvcc() is None,
}

#: How the reason of every skip begins that this suite may have. With ``CI`` set, any other skip fails the run.
EXPECTED_SKIPS = [*(f"{marker}: " for marker in _LACKING), "peak memory: "]

COMPILED_ISAS = [
    pytest.param(name, marks=[getattr(pytest.mark, f"needs_{name}")] if f"needs_{name}" in _LACKING else [])
    for name in _C.compiled_isas()
]


def pytest_runtest_setup(item):
    for marker, lacks in _LACKING.items():
        if item.get_closest_marker(marker) is not None and lacks():
            thing = marker.removeprefix("needs_").upper()
            message = f"{marker}: this machine has no {thing}"
            if os.environ.get(f"FAIL_WITHOUT_{thing}") == "1":
                pytest.fail(f"{message}, but FAIL_WITHOUT_{thing}=1 says that it does")
            pytest.skip(message)


_unexpected_skips: list[str] = []


def _note_skip(report):
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(tuple(EXPECTED_SKIPS)):
        _unexpected_skips.append(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = _note_skip
pytest_collectreport = _note_skip


def pytest_sessionfinish(session):
    if _unexpected_skips and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _unexpected_skips:
        terminalreporter.section("skips that tests/conftest.py does not expect")
        for line in _unexpected_skips:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _restore_process_state():
    """Threads, ISA, determinism and the search path belong to the whole process: no test leaves them changed.

    ``--model`` puts the working directory first in the path, where processes that a later test starts would look too.
    """
    path = list(sys.path)
    threads, isa = torch.get_num_threads(), _C.active_isa()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    _C.use_isa(isa)
    sys.path[:] = path


@pytest.fixture(params=COMPILED_ISAS)
def isa(request):
    """Runs the test once for each ISA; its kernels are in use meanwhile."""
    fusedsep.use_isa(request.param)
    return request.param


class _Calls(list):
    """Arguments of calls, too long to be shown."""

    def __repr__(self):
        return f"<{len(self)} calls>"


def _record_calls(monkeypatch, name, calls=None, entries=lambda arguments: [arguments]):
    calls = _Calls() if calls is None else calls
    operator = getattr(_ops, name)

    def record(*arguments):
        calls.extend(entries(arguments))
        return operator(*arguments)

    monkeypatch.setattr(_ops, name, record)
    return calls


@pytest.fixture
def kernel_calls(monkeypatch):
    """The positional arguments of every call of the kernel operator from now on: proof that it ran, or did not."""
    return _record_calls(monkeypatch, "separable_conv2d")


@pytest.fixture
def chain_calls(monkeypatch):
    """The same for the operator that runs consecutive layers."""
    return _record_calls(monkeypatch, "chain")


@pytest.fixture
def site_calls(monkeypatch):
    """The same, with an entry for each site that ran: by itself, or as a layer of a chain."""

    def sites(arguments):
        return [layer for layer in _ops.layers_of(arguments[2]) if layer.rows == _ops.DEPTHWISE]

    return _record_calls(monkeypatch, "chain", _record_calls(monkeypatch, "separable_conv2d"), sites)


@pytest.fixture
def training_calls(monkeypatch):
    """The same for the training operator; computing something again for a backward pass counts too."""
    return _record_calls(monkeypatch, "separable_conv2d_training")


@pytest.fixture
def pointwise_calls(monkeypatch):
    """The same for the training operator of a pointwise convolution by itself."""
    return _record_calls(monkeypatch, "pointwise_conv2d_training")


@pytest.fixture
def depthwise_calls(monkeypatch):
    """The same for that of a depthwise convolution by itself."""
    return _record_calls(monkeypatch, "depthwise_conv2d_training")


@pytest.fixture
def convolution_calls(monkeypatch):
    """The same for that of a 3x3 convolution of images."""
    return _record_calls(monkeypatch, "conv2d_training")


@pytest.fixture
def small_maps(monkeypatch):
    """Maps of any size are worth a call of the training operators of one convolution."""
    monkeypatch.setattr(_convolution, "LEAST_NUMBERS", 0)


@pytest.fixture
def backward_calls(monkeypatch):
    """The same for the operator that computes gradients."""
    return _record_calls(monkeypatch, "separable_conv2d_training_backward")
