# SPDX-License-Identifier: BSD-3-Clause
"""The script that README shows for several processes is complete, and learns something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fusedsep

_TIMEOUT_SECONDS = 120
_README = Path(__file__).resolve().parent.parent / "README.md"


def script_of_readme() -> str:
    section = _README.read_text(encoding="utf-8").split("\n## Training on several processes\n")[1].split("\n## ")[0]
    (script,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return script


def run_on_two_processes(path: Path) -> str:
    """What ``torchrun`` prints; it ends its processes when it is told to end."""
    package_root = str(Path(fusedsep.__file__).parent.parent)
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
        raise AssertionError(f"torchrun ran for more than {_TIMEOUT_SECONDS} s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def test_the_script_runs_and_learns(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(script_of_readme(), encoding="utf-8")
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+)$", run_on_two_processes(path), re.MULTILINE)]
    assert len(losses) == 4
    assert losses[-1] < 0.75 * losses[0]
