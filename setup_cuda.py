# SPDX-License-Identifier: BSD-3-Clause
"""The part of setup.py that builds fusedsep._C_cuda: the kernels with nvcc, without torch, then their binding.

FUSEDSEP_CUDA=1 asks for it and 0 does without; left out, it is built where nvcc is found and torch is a CUDA build. It
can be built, and imported, without a GPU and with a torch that has no CUDA.
TORCH_CUDA_ARCH_LIST, such as "8.6;9.0+PTX", says for which processors instead of for all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

SOURCES, BINDINGS = Path("csrc/cuda"), Path("csrc/bindings/cuda")
#: Turing, A100, other Ampere, Ada, Hopper, Blackwell of data centers, other Blackwell; as PTX for what comes after.
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120")
#: Exact arithmetic: no flag that trades it for speed.
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")


class CudaBuild(NamedTuple):
    nvcc: Path
    version: str

    @classmethod
    def from_environment(cls) -> CudaBuild | None:
        """What to build with, ``None`` where nothing is to be built. Raises ``RuntimeError`` where that cannot be."""
        import torch

        wish = os.environ.get("FUSEDSEP_CUDA", "")
        if wish not in ("", "0", "1"):
            raise RuntimeError(f"the variable FUSEDSEP_CUDA must be 0 or 1, got {wish!r}.")
        cuda_of_torch = torch.version.cuda
        if wish == "0" or (wish == "" and cuda_of_torch is None):
            return None
        nvcc = find_nvcc()
        if nvcc is None:
            if wish == "":
                return None
            raise RuntimeError(
                "FUSEDSEP_CUDA=1, but nvcc was not found; put it on PATH, set CUDA_HOME, or install the packages of "
                'the extra "cuda-build".'
            )
        version = version_of(nvcc)
        if cuda_of_torch is not None and cuda_of_torch.split(".")[0] != version.split(".")[0]:
            raise RuntimeError(
                f"torch {torch.__version__} is built for CUDA {cuda_of_torch}, but {nvcc} is of CUDA {version}; they "
                "must agree in the major version. FUSEDSEP_CUDA=0 builds without CUDA kernels."
            )
        targets()
        return cls(nvcc, version)

    def command(self, source: Path, output: Path, *flags: str) -> list[str]:
        """nvcc for every target, compiled side by side."""
        codes = [f"-gencode=arch={target.replace('sm_', 'compute_')},code={target}" for target in targets()]
        return [str(self.nvcc), *NVCC_FLAGS, *codes, "--threads=0", *flags, "-c", str(source), "-o", str(output)]

    def compile(self, root: Path) -> None:
        """Writes the kernels' objects, where they are older than a source, each with what ptxas says of its registers.

        And the header that says how they were built.
        """
        newest = max(
            path.stat().st_mtime for folder in (SOURCES, Path("csrc/kernels")) for path in (root / folder).iterdir()
        )
        for source, output in zip(sources(root), self.objects(root), strict=True):
            output.parent.mkdir(parents=True, exist_ok=True)
            if not output.exists() or output.stat().st_mtime < newest:
                finished = subprocess.run(
                    self.command(source, output, "-Xptxas=-v"), stderr=subprocess.PIPE, text=True, check=False
                )
                if finished.returncode != 0:
                    raise RuntimeError(f"{self.nvcc} failed:\n{finished.stderr}")
                output.with_suffix(".ptxas.txt").write_text(finished.stderr)
        header = root / "build" / "generated" / "fusedsep_cuda_build_info.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(
            f"#define FUSEDSEP_NVCC_VERSION {json.dumps(self.version)}\n"
            f"#define FUSEDSEP_CUDA_TARGETS_JSON {json.dumps(json.dumps(targets()))}\n"
        )

    def objects(self, root: Path) -> list[Path]:
        folder = "-".join(("cuda", self.version, *targets())) if targets() != TARGETS else f"cuda-{self.version}"
        return [root / "build" / folder / f"{source.stem}.o" for source in sources(root)]

    def extension(
        self,
        cpp_extension: Any,
        root: Path,
        include_folders: list[str],
        compile_flags: list[str],
        link_flags: list[str],
    ) -> Any:
        return cpp_extension(
            "fusedsep._C_cuda",
            [str(path) for path in sorted(BINDINGS.glob("*.cpp"))],
            include_dirs=include_folders,
            depends=[
                str(path)
                for folder in (SOURCES, BINDINGS.parent, Path("csrc/kernels"))
                for path in sorted(folder.glob("*.h"))
            ],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=compile_flags,
            extra_objects=[str(path) for path in self.objects(root)],
            # The static runtime looks for the driver when it is first used: the extension loads where there is none.
            library_dirs=library_folders(self.nvcc),
            libraries=["cudart_static", "dl", "rt", "pthread"],
            extra_link_args=link_flags,
        )


def targets() -> tuple[str, ...]:
    """Raises ``RuntimeError`` where TORCH_CUDA_ARCH_LIST is not understood."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    chosen = []
    for item in re.split(r"[; ]+", wish.strip("; ")) if wish.strip("; ") else []:
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", item)
        if match is None:
            raise RuntimeError(
                f"the variable TORCH_CUDA_ARCH_LIST must hold versions such as 8.6 or 9.0+PTX, got {item!r}."
            )
        chosen.append(f"sm_{match[1]}{match[2]}")
        if match[3]:
            chosen.append(f"compute_{match[1]}{match[2]}")
    return tuple(chosen) or TARGETS


def sources(root: Path) -> list[Path]:
    return sorted((root / SOURCES).glob("*.cu"))


def find_nvcc() -> Path | None:
    """From CUDA_HOME, from PATH, or from its PyPI package beside torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if (on_path := shutil.which("nvcc")) is not None:
        candidates.append(Path(on_path).resolve())
    candidates += [path for folder in sys.path for path in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))]
    return next((path for path in candidates if path.is_file()), None)


def library_folders(nvcc: Path) -> list[str]:
    """Where it links from; it may be a script that calls another one, so only itself can tell."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r'"-L([^"]+)"', output)


def version_of(nvcc: Path) -> str:
    """Such as ``13.5``."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", output)[1]  # type: ignore[index]
