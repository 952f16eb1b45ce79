# SPDX-License-Identifier: BSD-3-Clause
"""Python in a process of its own: what may crash or hang is a failed test there, not the end of the run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_TESTS = Path(__file__).parent
_TIMEOUT_SECONDS = 120


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder. The package comes from where this process has it from."""
    return _run([str(_TESTS / name), *arguments], environment)


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code``, dedented."""
    return _run(["-c", textwrap.dedent(code)], environment)


def _run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    import fusedsep

    package_root = str(Path(fusedsep.__file__).parent.parent)
    path = os.pathsep.join([package_root, str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=_TESTS,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
