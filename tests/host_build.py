# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the sources of csrc/cuda and tests/cuda_host for the host: without nvcc, and without importing torch."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST, KERNELS, BINDINGS = ROOT / "tests" / "cuda_host", ROOT / "csrc" / "cuda", ROOT / "csrc" / "bindings"

_COMPILER = shlex.split(os.environ.get("CXX", "c++"))
_SANITIZERS = os.environ.get("FUSEDSEP_SANITIZE")


def optimized() -> list[str]:
    """Flags for code that takes its time; with the sanitizers of ``FUSEDSEP_SANITIZE``, if any."""
    return ["-O1", "-g1", f"-fsanitize={_SANITIZERS}", "-fno-sanitize-recover=all"] if _SANITIZERS else ["-O2"]


def compile_for_host(source: Path, output: Path, *flags: str) -> None:
    """``source`` with the emulation of CUDA."""
    command = [
        *_COMPILER,
        *("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"),
        *flags,
        *(f"-I{folder}" for folder in (KERNELS, HOST)),
        *("-x", "c++", str(source), "-o", str(output)),
    ]
    subprocess.run(command, check=True, timeout=600, env=without_preload())


def without_preload() -> dict[str, str]:
    """The environment of a compiler, or of a program with a sanitizer of its own, in a run under a sanitizer."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def library(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """A shared library of ``sources``, compiled once for all processes until a file changes; slow sources first."""
    digest = hashlib.sha256(repr((_COMPILER, sources, flags, link)).encode())
    folders = KERNELS, ROOT / "csrc" / "kernels", BINDINGS, BINDINGS / "cuda", HOST
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        digest.update(path.read_bytes())
    path = ROOT / "build" / "emulated" / digest.hexdigest()[:16] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            objects = [Path(folder) / f"{i}.o" for i in range(len(sources))]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda *files: compile_for_host(*files, "-c", "-fPIC", *flags), sources, objects))
            command = [*_COMPILER, "-shared", *flags, *map(str, objects), *link, "-o", f"{folder}/{name}"]
            subprocess.run(command, check=True, timeout=600, env=without_preload())
            os.replace(f"{folder}/{name}", path)
    return path


def kernels() -> list[str]:
    """Linker flags for the library of all kernels."""
    path = library("libkernels.so", [KERNELS / "training.cu", KERNELS / "forward.cu"], optimized(), [])
    return [str(path), f"-Wl,-rpath,{path.parent}"]


def torch_flags() -> tuple[list[str], list[str]]:
    """For the compiler and for the linker."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    includes = torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"
    folders = [*map(str, includes), sysconfig.get_paths()["include"]]
    return [f"-isystem{folder}" for folder in folders], [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
