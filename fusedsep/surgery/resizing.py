# SPDX-License-Identifier: BSD-3-Clause
"""Nodes of a graph that make a map smaller or larger, for which chains have kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .activations import arguments_of

_INTERPOLATE = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


class Window(NamedTuple):
    kernel: int
    stride: int
    padding: int


def max_pool_window(module: nn.Module | None) -> Window | None:
    """Of ``module``, if it is a max pool that chains have a kernel for."""
    if module is None or type(module).forward is not nn.MaxPool2d.forward or "forward" in vars(module):
        return None
    sizes = [
        size if isinstance(size, tuple) else (size, size)
        for size in (module.kernel_size, module.stride, module.padding)
    ]
    window = Window(*(size[0] for size in sizes))
    plain = module.dilation in (1, (1, 1)) and not module.ceil_mode and not module.return_indices
    has_kernel = plain and 2 <= window.kernel <= 13 and window.stride <= 2 and all(a == b for a, b in sizes)
    return window if has_kernel else None


def doubles_the_map(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` gives each pixel of its map twice in both directions."""
    given: dict[str, Any] = {}
    if node.op == "call_module":
        module = modules[node.target]
        if type(module).forward is nn.Upsample.forward and "forward" not in vars(module):
            given = vars(module)
    elif node.target is F.interpolate:
        given = arguments_of(node, _INTERPOLATE)
    return (
        given.get("size") is None
        and given.get("scale_factor") in (2, (2, 2), [2, 2])
        and given.get("mode", "nearest") in ("nearest", "nearest-exact")
        and not given.get("antialias")
    )
