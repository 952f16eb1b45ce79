# SPDX-License-Identifier: BSD-3-Clause
"""The compiled extension: which kernels there are, which are in use, and how they were built."""

from __future__ import annotations

import os
from typing import Any

import torch

from . import _C, _cuda
from ._version import __version__

#: Compiled everywhere so that tests can run the tiles of AVX-512 on any processor; slow, and never chosen by itself.
_TEST_ISAS = ("portable16",)


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this build has kernels for and this processor can run, best last."""
    return tuple(isa for isa in _C.supported_isas() if isa not in _TEST_ISAS)


def active_isa() -> str:
    """The instruction set in use: the best one, unless ``FUSEDSEP_ISA`` or :func:`use_isa` says otherwise.

    Raises:
        ValueError: the environment variable ``FUSEDSEP_ISA`` names no supported instruction set.
    """
    return _C.active_isa()


class use_isa:
    """Use the kernels of one instruction set from now on, in the whole process.

    Takes effect at the call. As a context manager (``with fusedsep.use_isa("avx2"): ...``) it puts the former choice
    back at the end.

    Args:
        name: one of :func:`supported_isas`, or ``"portable16"``, the tiles of AVX-512 in portable vectors, for tests.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is unknown, or this processor does not have it; never a silent fallback.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string such as 'avx2', got {name!r}")
        known = _C.supported_isas()
        former = _C.active_isa() if name in known else ""
        _C.use_isa(name)  # raises for an unknown or unsupported name
        self._former = former

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _C.use_isa(self._former)


def backend_info() -> dict[str, Any]:
    """Facts about this build and this machine.

    Returns:
        ``version``, ``torch_version`` (running), ``torch_built_with``, ``isa`` (active), ``supported_isas``,
        ``compiled_isas``, ``threads`` (torch's intra-op threads), ``processors`` (that this process may use),
        ``compiler``, ``flags`` (compiler flags by ISA) and ``cuda`` (the kernels' state, in words).
    """
    return {
        "version": __version__,
        "torch_version": torch.__version__,
        "torch_built_with": _C.build_info["torch"],
        "isa": active_isa(),
        "supported_isas": supported_isas(),
        "compiled_isas": tuple(_C.compiled_isas()),
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "compiler": _C.build_info["compiler"],
        "flags": dict(_C.build_info["flags"]),
        "cuda": _cuda.state(),
    }
