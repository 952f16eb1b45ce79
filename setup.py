# SPDX-License-Identifier: BSD-3-Clause
"""Builds fusedsep._C: one static library per ISA without torch, then the stable-ABI binding that links them.

With FUSEDSEP_CUDA=1, or where nvcc is found and torch is a CUDA build, also fusedsep._C_cuda (setup_cuda.py).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_clib import build_clib

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # not there in an isolated build
from setup_cuda import CudaBuild  # noqa: E402

KERNELS, BINDINGS = Path("csrc/kernels"), Path("csrc/bindings")
OLDEST_TORCH = (2, 10)
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}

# The one table of ISA flags. Floating-point contraction is off where the source writes every FMA as an intrinsic; the
# portable vectors leave it to the compiler, so that processors with FMA in their baseline use it.
ISA_FLAGS = {
    "portable": ["-ffp-contract=fast", "-Wno-psabi"],
    "portable16": ["-ffp-contract=fast", "-Wno-psabi"],
    "avx2": ["-mavx2", "-mfma", "-ffp-contract=off"],
    # GCC 12 calls the undefined pass-through operands in its own AVX-512 header uninitialized.
    "avx512": ["-mavx512f", "-mavx2", "-mfma", "-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}
ISAS = {"x86_64": ["portable", "portable16", "avx2", "avx512"], "aarch64": ["portable", "portable16"]}


def stop(message: str) -> None:
    sys.exit(f"fusedsep cannot be built: {message}")


def target_machine() -> str:
    machine = platform.machine().lower()
    if machine not in MACHINES:
        stop(f"the processor architecture {machine!r} is not supported; x86_64 and aarch64 are.")
    return MACHINES[machine]


def import_build_extension() -> tuple[type, type, str]:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        stop(f"torch >= 2.10 must be importable at build time ({error}); `pip install .` arranges that.")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        stop(f"torch >= 2.10 is needed for its stable ABI, found torch {torch.__version__}.")
    return BuildExtension, CppExtension, torch.__version__


def include_folders() -> list[str]:
    """Of both extensions. Some versions of torch bring pybind11, but forbid it beside the stable ABI (2.11 does)."""
    try:
        import pybind11
    except ImportError as error:
        stop(f"pybind11 must be importable at build time ({error}); `pip install .` arranges that.")
    return [pybind11.get_include(), str(ROOT / "build" / "generated")]


def check_compiler() -> None:
    command = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(command) is None:
        stop(f"no C++ compiler: {command!r} was not found; install g++ or clang++, or point the variable CXX to one.")


def common_flags() -> list[str]:
    flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    sanitizers = os.environ.get("FUSEDSEP_SANITIZE")  # for example "address,undefined"
    if sanitizers:
        # Python's own flags have -fwrapv, which hides overflows. Null pointers and ends of objects are ASan's.
        flags += ["-O1", "-g1", "-fno-wrapv", f"-fsanitize={sanitizers}", "-fno-sanitize=null,object-size"]
        flags += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    return flags


def kernel_flags() -> list[str]:
    """Of the kernels alone: with sanitizers, what keeps GCC from minutes per file. Checks are calls, not code."""
    if not os.environ.get("FUSEDSEP_SANITIZE"):
        return []
    calls = ["--param", "asan-instrumentation-with-call-threshold=0"]
    return [*calls, "-fno-sanitize-address-use-after-scope", "-fno-tree-pta"]


def libraries(machine: str) -> list[tuple[str, dict]]:
    headers = [str(path) for path in sorted(KERNELS.glob("*.h"))]

    def library(name: str, sources: list[str], flags: list[str]) -> tuple[str, dict]:
        paths = [str(KERNELS / source) for source in sources]
        return name, {"sources": paths, "cflags": common_flags() + kernel_flags() + flags, "obj_deps": {"": headers}}

    # The dispatcher refers to the ISAs, so that it comes first on the linker's command line.
    return [library("fusedsep_dispatch", ["isa.cpp", "plan.cpp"], [])] + [
        library(f"fusedsep_{isa}", [f"{isa}.cpp"], ISA_FLAGS[isa]) for isa in ISAS[machine]
    ]


def main() -> None:
    machine = target_machine()
    check_compiler()
    build_extension, cpp_extension, torch_version = import_build_extension()
    try:
        cuda = CudaBuild.from_environment()
    except RuntimeError as error:
        stop(str(error))

    class BuildLibraries(build_clib):
        """Compiles the ISAs side by side."""

        def build_libraries(self, libraries: list[tuple[str, dict]]) -> None:
            build = super().build_libraries
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda library: build([library]), libraries))

    class BuildFusedsep(build_extension):
        """Builds the kernels first, also for in-place builds, and writes down how they were built."""

        def run(self) -> None:
            self.run_command("build_clib")
            header = ROOT / "build" / "generated" / "fusedsep_build_info.h"
            header.parent.mkdir(parents=True, exist_ok=True)
            facts = {isa: " ".join(common_flags() + ISA_FLAGS[isa]) for isa in ISAS[machine]}
            text = (
                f"#define FUSEDSEP_BUILT_WITH_TORCH {json.dumps(torch_version)}\n"
                f"#define FUSEDSEP_FLAGS_JSON {json.dumps(json.dumps(facts))}\n"
            )
            if not header.exists() or header.read_text() != text:
                header.write_text(text)
            if cuda is not None:
                cuda.compile(ROOT)
            super().run()

    sanitizers = os.environ.get("FUSEDSEP_SANITIZE")
    extension = cpp_extension(
        "fusedsep._C",
        [str(path) for path in sorted(BINDINGS.glob("*.cpp"))],
        include_dirs=include_folders(),
        depends=[str(path) for folder in (KERNELS, BINDINGS) for path in sorted(folder.glob("*.h"))],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=common_flags(),
        extra_link_args=["-Wl,-s"] if not sanitizers else [f"-fsanitize={sanitizers}"],
    )
    extensions = [extension]
    if cuda is not None:
        extensions.append(
            cuda.extension(cpp_extension, ROOT, include_folders(), common_flags(), extension.extra_link_args)
        )
    setup(
        libraries=libraries(machine),
        ext_modules=extensions,
        cmdclass={"build_clib": BuildLibraries, "build_ext": BuildFusedsep},
    )


main()
