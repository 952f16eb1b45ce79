# SPDX-License-Identifier: BSD-3-Clause
"""What cannot be built says why in one sentence: setup.py of the source tree, run with a stand-in for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from build_files import setup_cuda

_ROOT = Path(__file__).resolve().parent.parent


def message_of_setup(tmp_path, torch="", patch="pass", **environment):
    """What ``setup.py --version`` prints last, where ``import torch`` runs ``torch``."""
    package = tmp_path / "torch" / "utils"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(torch)
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text("BuildExtension = CppExtension = object")
    code = f"import runpy, sys; {patch}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1, finished
    assert "Traceback" not in finished.stderr
    return finished.stderr.strip()


def test_a_torch_without_the_stable_abi(tmp_path):
    message = message_of_setup(tmp_path, "__version__ = '2.9.1+cpu'")
    assert message == ("fusedsep cannot be built: torch >= 2.10 is needed for its stable ABI, found torch 2.9.1+cpu.")


def test_no_torch(tmp_path):
    message = message_of_setup(tmp_path, "raise ImportError('no torch here')")
    assert "torch >= 2.10 must be importable at build time (no torch here)" in message
    assert len(message.splitlines()) == 1


def test_no_compiler(tmp_path):
    message = message_of_setup(tmp_path, "__version__ = '2.13.0'", CXX="no-such-compiler -O2")
    assert message == (
        "fusedsep cannot be built: no C++ compiler: 'no-such-compiler' was not found; install g++ or clang++, "
        "or point the variable CXX to one."
    )


@pytest.mark.parametrize("machine", ["riscv64", "i686"])
def test_another_architecture(tmp_path, machine):
    message = message_of_setup(tmp_path, patch=f"import platform; platform.machine = lambda: {machine!r}")
    assert message == (
        f"fusedsep cannot be built: the processor architecture {machine!r} is not supported; x86_64 and aarch64 are."
    )


_CUDA_TORCH = "__version__ = '2.13.0+cu130'\nclass version: cuda = '13.0'"


def nvcc_of(tmp_path, release):
    """A stand-in for nvcc that knows its version alone."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(nvcc.parent.parent)}


@pytest.mark.parametrize("wish", ["1", ""])
def test_nvcc_of_another_cuda_than_torch(tmp_path, wish):
    message = message_of_setup(tmp_path, _CUDA_TORCH, FUSEDSEP_CUDA=wish, **nvcc_of(tmp_path, "12.8"))
    assert message == (
        f"fusedsep cannot be built: torch 2.13.0+cu130 is built for CUDA 13.0, but {tmp_path}/toolkit/bin/nvcc is of "
        "CUDA 12.8; they must agree in the major version. FUSEDSEP_CUDA=0 builds without CUDA kernels."
    )


def test_cuda_is_asked_for_without_nvcc(tmp_path):
    patch = "import pathlib; pathlib.Path.is_file = lambda path: False"
    message = message_of_setup(tmp_path, _CUDA_TORCH, patch, FUSEDSEP_CUDA="1")
    assert message == (
        "fusedsep cannot be built: FUSEDSEP_CUDA=1, but nvcc was not found; put it on PATH, set CUDA_HOME, or install "
        'the packages of the extra "cuda-build".'
    )


def test_cuda_is_asked_for_in_an_unknown_way(tmp_path):
    message = message_of_setup(tmp_path, _CUDA_TORCH, FUSEDSEP_CUDA="yes")
    assert message == "fusedsep cannot be built: the variable FUSEDSEP_CUDA must be 0 or 1, got 'yes'."


def test_targets_are_those_of_the_architectures(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup_cuda.targets() == setup_cuda.TARGETS
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX 10.0")
    assert setup_cuda.targets() == ("sm_86", "sm_90", "compute_90", "sm_100")
    for wrong in ("Hopper", "90", "9.0a"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(RuntimeError, match=rf"TORCH_CUDA_ARCH_LIST must hold versions .*, got '{wrong}'"):
            setup_cuda.targets()


def test_libraries_are_those_of_the_compiler_behind_a_script(tmp_path):
    """An nvcc on PATH may be a script that calls another one."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("""#!/bin/sh\necho '#$ LIBRARIES=  "-L/cuda/lib/stubs" "-L/cuda/lib"' >&2\n""")
    nvcc.chmod(0o755)
    assert setup_cuda.library_folders(nvcc) == ["/cuda/lib/stubs", "/cuda/lib"]
