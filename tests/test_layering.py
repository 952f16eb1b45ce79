# SPDX-License-Identifier: BSD-3-Clause
"""The layers stay apart: kernels know no torch, no Python, no threads; intrinsics live in vec_*.h alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
FILES = sorted(path for path in KERNELS.iterdir() if path.suffix in (".h", ".cpp"))

#: All that kernels include from outside their folder: freestanding headers, and what the dispatcher and the plan need.
_STANDARD = {"cstddef", "cstdint", "cstring", "cmath"}
_STANDARD_OF = {
    "isa.h": {"string", "vector"},
    "isa.cpp": {"atomic", "cstdlib", "stdexcept"},
    "plan.cpp": {"algorithm"},
}
_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
_COMMENT = re.compile(r"//.*")


def code_of(path: Path) -> str:
    return _COMMENT.sub("", path.read_text())


def test_there_are_kernels_to_look_at():
    assert {"separable.h", "depthwise-inl.h", "pointwise-inl.h", "isa.cpp"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_include_only_themselves_and_the_standard_library(path):
    allowed = _STANDARD | _STANDARD_OF.get(path.name, set())
    if path.name.startswith("vec_"):
        allowed = allowed | {"immintrin.h", "arm_neon.h"}
    for bracket, name in _INCLUDE.findall(path.read_text()):
        if bracket == '"':
            assert (KERNELS / name).is_file(), f'{path.name} includes "{name}", which is no file of csrc/kernels'
        else:
            assert name in allowed, f"{path.name} includes <{name}>"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_intrinsics_live_in_the_vector_wrappers(path):
    intrinsics = re.findall(r"\b_mm\d*_\w+|\b__m(?:128|256|512)[di]?\b|\bv\w+q_f(?:32|64)\b", code_of(path))
    if not path.name.startswith("vec_"):
        assert not intrinsics


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_neither_allocate_nor_start_threads(path):
    """The dispatcher, which runs once, may use std::vector and std::string."""
    if path.name.startswith("isa."):
        return
    found = re.findall(
        r"\bnew\b|\b(?:malloc|calloc|realloc|aligned_alloc|free)\s*\(|\bstd::(?:vector|thread|async)\b|#\s*pragma omp",
        code_of(path),
    )
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_an_isa_compiles_has_internal_linkage(path):
    """Otherwise the linker may pick the AVX-512 copy of an inline function for every processor."""
    if not (path.name.endswith("-inl.h") or path.name == "vec.h" or path.name.startswith("vec_")):
        return
    text = path.read_text()
    assert re.search(r"namespace fusedsep \{\nnamespace \{\n", text)
    assert text.endswith("}  // namespace\n}  // namespace fusedsep\n")


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".cpp" and path.stem not in ("isa", "plan")])
def test_an_isa_is_a_thin_file_with_one_symbol(path):
    text = code_of(path)
    assert len(text.splitlines()) <= 30
    assert len(re.findall(r"^const Isa& (\w+)\(\)", text, re.MULTILINE)) == 1
    assert f"const Isa& {path.stem}_isa()" in text


def test_only_the_bindings_include_torch_and_python():
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and "bindings" not in path.parts:
            outside = [
                name
                for _, name in _INCLUDE.findall(path.read_text())
                if re.match(r"(torch|ATen|c10|pybind11|Python)", name)
            ]
            assert not outside, path


def test_python_calls_the_kernels_from_one_place():
    """The rest of the package asks _kernel_path whether and how; what differentiates operators calls them too."""
    package = ROOT / "fusedsep"
    calls = re.compile(r"torch\.ops\.fusedsep|_ops\.(separable_|pack\b|normalize|conv2d_|(depth|point)wise_)")
    callers = {str(path.relative_to(package)) for path in package.rglob("*.py") if calls.search(path.read_text())}
    allowed = {
        "_ops.py",
        "_kernel_path.py",
        "_convolution.py",
        "_chain.py",
        "_chain_convolutions.py",
        "_chain_layers.py",
    }
    assert callers <= allowed | {"_training.py", "_sync.py"}
