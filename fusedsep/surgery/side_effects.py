# SPDX-License-Identifier: BSD-3-Clause
"""What a forward may do besides computing its result, and how to notice and undo it.

A trace runs Python once with symbolic values. Whatever that changes for good must be put back, and a program that was
written down from it would not do it again.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from .._compat import has_saved_tensors_hooks


def global_mode() -> tuple[bool, ...]:
    """The modes of torch that a ``with`` block in a forward may change."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        has_saved_tensors_hooks(),  # torch.utils.checkpoint, too, is a block with such hooks
    )


@contextlib.contextmanager
def usual_global_mode() -> Iterator[None]:
    """The modes of a training loop for a while, so that a ``no_grad`` block in a forward can be told from none."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield


class RealTensors(TorchDispatchMode):
    """While it is active, what would change a real tensor, or draw random numbers for one, is an error instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise fx.proxy.TraceError("its forward draws random numbers")
        if func._schema.is_mutable:
            raise fx.proxy.TraceError("its forward changes a tensor that is not its input")
        return func(*args, **(kwargs or {}))


class RandomState:
    """The states of the generators that the whole process shares."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = {} if numpy is None else numpy.random.get_state(legacy=False)

    def is_current(self) -> bool:
        """Whether nobody drew a number since."""
        now = RandomState()
        return (
            now._python == self._python and torch.equal(now._torch, self._torch) and _is_equal(now._numpy, self._numpy)
        )

    def restore(self) -> None:
        """Go back to it."""
        if self.is_current():
            return
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy:
            sys.modules["numpy"].random.set_state(self._numpy)


def _is_equal(a: Any, b: Any) -> bool:
    """Of two states of NumPy: dictionaries of numbers, names, arrays and dictionaries."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(value, b[key]) for key, value in a.items())
    return a.tolist() == b.tolist() if hasattr(a, "tolist") else a == b


def attributes_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute of ``module``, with a copy if it is a collection."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, dict, set)) else None)
        for name, value in vars(module).items()
    }


def restore_attributes(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> bool:
    """Undo what was done to ``module`` since :func:`attributes_of`; say whether anything was."""
    state = vars(module)
    changed = state.keys() != attributes.keys() or any(state[name] is not old for name, (old, _) in attributes.items())
    for value, content in attributes.values():
        if content is not None and not _holds_the_same(value, content):
            changed = True
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
    if changed:
        state.clear()
        state.update({name: value for name, (value, _) in attributes.items()})
    return changed


def _holds_the_same(value: Any, content: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(item is content[key] for key, item in value.items())
    return len(value) == len(content) and all(map(operator.is_, value, content))


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules of ``model`` in training or eval mode for a while; their own flags afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
