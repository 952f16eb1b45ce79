# SPDX-License-Identifier: BSD-3-Clause
"""The one exception of this package; its subclasses say which step failed."""

from __future__ import annotations


class PretrainedError(Exception):
    """Weights, class names or photographs could not be had; the message is one sentence a user can act on."""
