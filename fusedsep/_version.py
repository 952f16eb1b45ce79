# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fusedsep")
except PackageNotFoundError:  # running from a source tree that was built in place
    __version__ = "0+unknown"
