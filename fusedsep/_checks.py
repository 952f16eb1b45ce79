# SPDX-License-Identifier: BSD-3-Clause
"""Checks of plain arguments, with messages that name the argument, what was wanted and what came."""

from __future__ import annotations


def check_positive_int(value: object, argument: str) -> int:
    """Return ``value`` if it is an int of at least 1, otherwise raise ``TypeError`` or ``ValueError``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")
    return value
