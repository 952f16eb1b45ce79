# SPDX-License-Identifier: BSD-3-Clause
"""Show the instruction set in use, threads, versions and compile flags of this installation."""

from __future__ import annotations

import argparse
import platform

from .. import backend_info
from ._output import print_table

HELP = "instruction set, threads, versions and compile flags"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    info = backend_info()
    rows = [
        ("fusedsep", info["version"]),
        ("torch", f"{info['torch_version']} (built with {info['torch_built_with']})"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("instruction set", f"{info['isa']} (set FUSEDSEP_ISA to choose another)"),
        ("supported here", ", ".join(info["supported_isas"])),
        ("compiled", ", ".join(info["compiled_isas"])),
        ("threads", f"{info['threads']} on {info['processors']} processors"),
        ("compiler", info["compiler"]),
        *((f"flags, {isa}", flags or "none") for isa, flags in info["flags"].items()),
        ("CUDA", info["cuda"]),
    ]
    print_table("fusedsep on this machine", ("what", "value"), rows, text_columns=2)
    return 0
