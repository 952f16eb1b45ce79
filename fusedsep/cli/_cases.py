# SPDX-License-Identifier: BSD-3-Clause
"""The combinations that ``bench`` is asked for, and the document that their results go into."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ._limits import Limits, measure_limits
from ._output import machine, progress


class Case(NamedTuple):
    """One combination of what the command line lists. ``model`` is ``None`` for MobileNetV1."""

    model: str | None
    threads: int
    batch: int
    width: float
    resolution: int


def images_for(network: nn.Module, case: Case) -> torch.Tensor:
    """A random batch in NCHW of as many channels as the first convolution of ``network`` takes."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    return torch.randn(case.batch, channels, case.resolution, case.resolution)


class Cases:
    """Every combination, and the limits of the machine at each number of threads."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._threads = arguments.threads or (torch.get_num_threads(),)
        self._widths = arguments.width if arguments.model is None else arguments.width[:1]
        lists = self._threads, arguments.batch, self._widths, arguments.resolution
        self._cases = [Case(arguments.model, *case) for case in itertools.product(*lists)]
        self._limits: dict[int, Limits] = {}

    def __len__(self) -> int:
        return len(self._cases)

    def measure(self, steps: int, measure: Callable[[Case, Limits, Callable[[str], None]], None]) -> None:
        """Call ``measure(case, limits, begin)`` for each case, at its threads.

        It calls ``begin(what)`` before each of its ``steps``.
        """
        with progress(len(self) * steps + len(self._threads)) as begin:
            for case in self._cases:
                torch.set_num_threads(case.threads)
                if case.threads not in self._limits:
                    begin("the limits of this machine")
                    self._limits[case.threads] = measure_limits()
                measure(case, self._limits[case.threads], begin)

    def document(
        self, subject: str, *, facts: Mapping[str, Any], settings: Mapping[str, Any], **content: Any
    ) -> dict[str, Any]:
        """For the JSON: ``content``, measured on this machine (and ``facts`` of it) with these settings."""
        arguments = self._arguments
        return {
            "subject": subject,
            "machine": {**machine(), "threads": list(self._threads), **facts},
            "limits": [{**known.as_json(), "text": str(known)} for known in self._limits.values()],
            "settings": {
                "model": arguments.model,
                "width": list(self._widths),
                "resolution": list(arguments.resolution),
                "batch": list(arguments.batch),
                "repeats": arguments.repeats,
                **settings,
            },
            **content,
        }
