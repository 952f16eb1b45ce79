# SPDX-License-Identifier: BSD-3-Clause
"""The files that build the package, as modules: from their paths, since the source tree must not be in the search path.

There, the package in the tree would hide the installed one from processes that a test starts.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _module(name):
    spec = importlib.util.spec_from_file_location(name, _ROOT / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_cuda = _module("setup_cuda")
