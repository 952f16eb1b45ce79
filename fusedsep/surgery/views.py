# SPDX-License-Identifier: BSD-3-Clause
"""Nodes of a graph that only take channels of maps, put them side by side or shuffle them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from .activations import arguments_of

_CHUNK = {torch.chunk, "chunk"}
_SPLIT = {torch.split, "split"}
_CAT = {torch.cat, torch.concat, torch.concatenate}
_CHANNELS = (1, -3)
#: What a shuffle is made of, besides tensors: none of these writes to its input.
_SHUFFLING = {
    *("size", "view", "reshape", "transpose", "permute", "contiguous", "flatten"),
    *(getattr, operator.getitem, operator.floordiv, operator.mul, torch.reshape, torch.transpose, torch.permute),
    *(torch.flatten, torch.channel_shuffle, nn.functional.channel_shuffle),
}


def sections_of(node: fx.Node, channels: int) -> list[tuple[int, int]] | None:
    """The ranges of channels that ``node`` makes a tuple of, if it cuts a map of ``channels`` into such."""
    if node.target in _CHUNK:
        given = arguments_of(node, ("chunks", "dim"))
        count = given.get("chunks")
        size: Any = -(-channels // count) if isinstance(count, int) and count > 0 else None
    elif node.target in _SPLIT:
        given = arguments_of(node, ("split_size_or_sections", "dim"))
        size = given.get("split_size_or_sections", given.get("split_size"))
    else:
        return None
    if given.get("dim", 0) not in _CHANNELS:
        return None
    if isinstance(size, int):
        sizes = [min(size, channels - begin) for begin in range(0, channels, size)] if size > 0 else []
    else:
        sizes = list(size) if isinstance(size, (list, tuple)) else []
    if not all(isinstance(each, int) and each > 0 for each in sizes) or sum(sizes) != channels:
        return None
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def slice_of(node: fx.Node, channels: int) -> tuple[int, int] | None:
    """The range of channels that ``x[:, begin:end]`` takes, in all its images and pixels."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    index = [each for each in node.args[1] if each is not Ellipsis]
    if len(index) < len(node.args[1]) and node.args[1].index(Ellipsis) < 2:
        return None
    if not 2 <= len(index) <= 4 or not all(isinstance(each, slice) for each in index):
        return None
    if any(each != slice(None) for each in (index[0], *index[2:])):
        return None
    wanted = index[1]
    if wanted.step not in (None, 1) or not all(
        isinstance(end, (int, type(None))) for end in (wanted.start, wanted.stop)
    ):
        return None
    begin, end, _ = wanted.indices(channels)
    return (begin, end) if begin < end else None


def joined_by(node: fx.Node) -> list[fx.Node] | None:
    """The maps that ``node`` puts side by side, in their order."""
    if node.target not in _CAT:
        return None
    maps = node.args[0] if node.args else node.kwargs.get("tensors")
    given = dict(zip(("dim",), node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "tensors"}
    if given.pop("dim", 0) not in _CHANNELS or given or not isinstance(maps, (list, tuple)) or not maps:
        return None
    return list(maps) if all(isinstance(each, fx.Node) for each in maps) else None


def shuffle_of(
    first: fx.Node, names: set[fx.Node], channels: int, modules: dict[str, nn.Module]
) -> list[fx.Node] | None:
    """The nodes, from ``first`` on, that interleave the two halves of the channels of a map; the last one gives it.

    Args:
        first: reads the map.
        names: the nodes that give the map.

    Whether they do is tried, with a map of which every number is another one.
    """
    if channels % 2 != 0:
        return None
    x = torch.arange(2.0 * channels * 2 * 3).view(2, channels, 2, 3)
    expected = torch.stack([x[:, : channels // 2], x[:, channels // 2 :]], 2).flatten(1, 2)
    values: dict[fx.Node, Any] = dict.fromkeys(names, x)
    nodes: list[fx.Node] = []
    node = first
    while node.op != "root":
        if not values.keys().isdisjoint(node.all_input_nodes):
            if not values.keys() >= set(node.all_input_nodes) or not _may_shuffle(node, modules):
                return None
            try:
                values[node] = _value_of(node, values, modules)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
            nodes.append(node)
            if isinstance(values[node], torch.Tensor) and torch.equal(values[node], expected):
                inner = nodes[:-1]
                return nodes if all(set(nodes).issuperset(each.users) for each in inner) else None
        node = node.next
    return None


def _may_shuffle(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[node.target]
        return type(module).forward is nn.ChannelShuffle.forward and "forward" not in vars(module)
    return node.op in ("call_function", "call_method") and node.target in _SHUFFLING


def _value_of(node: fx.Node, values: dict[fx.Node, Any], modules: dict[str, nn.Module]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_module":
        return modules[node.target](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)
