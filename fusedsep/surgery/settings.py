# SPDX-License-Identifier: BSD-3-Clause
"""Attributes of modules that their Python may read, and what can be told about changes of them."""

from __future__ import annotations

import types
from typing import Any

import torch.nn as nn

_PLAIN_TYPES = (bool, int, float, str, type(None))


def is_setting(value: Any) -> bool:
    """Whether a forward that reads ``value`` can be told by comparison that it has changed."""
    return isinstance(value, tuple) or _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return isinstance(value, _PLAIN_TYPES)


def is_constant(value: Any) -> bool:
    """Whether nobody can change ``value`` itself."""
    return isinstance(value, _PLAIN_TYPES) or (isinstance(value, tuple) and all(map(is_constant, value)))


def names_read_by(module: nn.Module) -> set[str]:
    """Every name in the Python of its class, among them the attributes that this may read."""
    names: set[str] = set()
    for base in type(module).__mro__:
        if base in (nn.Module, object):
            continue
        for attribute, value in vars(base).items():
            if attribute != "__init__" and hasattr(value, "__code__"):
                names.update(_names_in(value.__code__))
    return names


def _names_in(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(
        *(_names_in(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))
    )
