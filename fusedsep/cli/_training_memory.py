# SPDX-License-Identifier: BSD-3-Clause
"""What a training step keeps, and how much memory the operating system sees it take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ._cases import Case

_STEPS = 3  # the first one also allocates gradients and momentum
_TIMEOUT = 600  # seconds


def saved_bytes(forward: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps when ``forward`` runs.

    Args:
        forward: may run the backward too.
        known: tensors that do not count, as parameters and buffers do not.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def resident_peak(case: Case, engine: str) -> int | None:
    """Bytes by which the resident set of a fresh process grows at most while it trains for three steps.

    ``None`` where the operating system does not tell (only Linux does) or the process fails.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
    command = [sys.executable, "-m", __name__, json.dumps([*case, engine])]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=True,
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[2],  # -m looks there first: this package, and not a source tree
        )
        return int(done.stdout.split()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None


def _main(specification: str) -> None:
    """In the child: print the growth."""
    from ._training_steps import Trainee, make_subject  # imports this module

    *values, engine = json.loads(specification)
    case = Case(*values)
    torch.set_num_threads(case.threads)
    _, network, images, labels = make_subject(case)
    trainee = Trainee(network, images, labels, engine)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _status("VmRSS")
    for _ in range(_STEPS):
        trainee.step()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes, from a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    _main(sys.argv[1])
