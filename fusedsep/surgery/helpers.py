# SPDX-License-Identifier: BSD-3-Clause
"""Plain functions that forwards call and whose Python defeats tracing: they are recorded as one call each.

A port from TensorFlow often has a function ``same_pad(x, kernel, stride)`` with ``max`` and ``if`` on the size of its
map. Seen as one call it stays in front of the convolution, exactly as it is, and the forward around it can be traced.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import fx


class Helper(NamedTuple):
    """A function, and where the code that calls it looks it up."""

    namespace: dict[str, Any]
    name: str
    function: types.FunctionType

    def is_same(self, other: Helper) -> bool:
        return self.namespace is other.namespace and self.name == other.name


def failing_helper(error: BaseException, called_from: set[types.CodeType]) -> Helper | None:
    """The innermost function in the traceback of ``error``, below the last frame of ``called_from``."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = max((i for i, frame in enumerate(frames) if frame.f_code in called_from), default=0)
    for caller, callee in reversed(list(itertools.pairwise(frames[last:]))):
        for name, value in caller.f_globals.items():
            if isinstance(value, types.FunctionType) and value.__code__ is callee.f_code and _is_of_a_user(value):
                return Helper(caller.f_globals, name, value)
    return None


def _is_of_a_user(function: types.FunctionType) -> bool:
    return function.__module__.partition(".")[0] not in ("torch", "fusedsep")


@contextlib.contextmanager
def recorded(helpers: Iterable[Helper], record: Callable[..., fx.Proxy]) -> Iterator[None]:
    """For a while, calls of ``helpers`` on symbolic values go to ``record(function, args, kwargs)``."""
    helpers = list(helpers)
    for helper in helpers:
        helper.namespace[helper.name] = _recorder(helper.function, record)
    try:
        yield
    finally:
        for helper in helpers:
            helper.namespace[helper.name] = helper.function


def _recorder(function: types.FunctionType, record: Callable[..., fx.Proxy]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return record(function, args, kwargs)
        return function(*args, **kwargs)

    return call
