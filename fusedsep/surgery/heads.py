# SPDX-License-Identifier: BSD-3-Clause
"""The head of a classifier in a graph, however it is written: mean of each map, and products of these."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._chain_products import Product
from .activations import arguments_of
from .dropouts import node_passes_on
from .layer_kinds import is_plain_pointwise
from .sites import input_of
from .tails import only_reader, tail_behind
from .tracing import CallForm, Tracer, Untraceable

_MEANS = {torch.mean, "mean"}
_FLATTEN = {torch.flatten, "flatten"}
_BOTH_DIRECTIONS = {(2, 3), (3, 2), (-2, -1), (-1, -2)}
_RESHAPE = {torch.reshape, "reshape", "view"}


class Head(NamedTuple):
    """Global average pool, flatten and linear layers, or 1x1 convolutions in front of the flatten.

    Attributes:
        nodes: all of it; the first one reads the map.
        products: the layers, each with the BN and the activation behind it.
        is_map: the output has four dimensions.
    """

    nodes: list[fx.Node]
    products: list[Product]
    is_map: bool


def head_behind(node: fx.Node, channels: int, modules: dict[str, nn.Module]) -> Head | None:
    """What the only reader of ``node``, a map of ``channels``, begins."""
    return _Search(channels, modules).behind(node)


class _Search:
    def __init__(self, channels: int, modules: dict[str, nn.Module]) -> None:
        self._channels = channels
        self._modules = modules

    def behind(self, node: fx.Node) -> Head | None:
        pool = only_reader(node)
        rank = None if pool is None else rank_of_pooled(pool, self._modules)
        if rank is None:
            return None
        nodes, products = [pool], []
        head: Head | None = None
        while True:
            flatten = self._flatten_of(nodes[-1]) if rank == 4 else None
            if flatten is not None:
                nodes += flatten
                rank = 2
                continue
            reader = only_reader(nodes[-1])
            if reader is None:
                return head
            nodes.append(reader)
            module = self._module(reader)
            if node_passes_on(reader, self._modules):
                continue
            fits = is_linear(module) if rank == 2 else is_plain_pointwise(module)
            if not fits or "forward" in vars(module):
                return head
            self._channels = module.weight.shape[0]
            nodes, *tail = tail_behind(nodes, self._modules, self._channels, norms=rank == 4)
            products.append(Product(module, *tail))
            head = Head(list(nodes), list(products), rank == 4)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _is_flatten(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            flattens = type(module).forward is nn.Flatten.forward and "forward" not in vars(module)
            return flattens and (module.start_dim, module.end_dim) == (1, -1)
        if node.target in _FLATTEN:
            given = arguments_of(node, ("start_dim", "end_dim"))
            return given.get("start_dim", 0) == 1 and given.get("end_dim", -1) == -1
        if node.target in _RESHAPE:
            return _shape_of(node) == (-1, self._channels)
        return False

    def _flatten_of(self, node: fx.Node) -> list[fx.Node] | None:
        """The nodes that make ``[N, C]`` of ``[N, C, 1, 1]``, if they are all that reads ``node``."""
        readers = list(node.users)
        if len(readers) == 1:
            return readers if only_reader(node) is not None and self._is_flatten(readers[0]) else None
        if len(readers) != 2:
            return None
        size, reshape = sorted(readers)  # x.view(x.size(0), -1), x.reshape(x.shape[0], -1)
        sizes = [size]
        if (
            size.op == "call_function"
            and size.target is getattr
            and size.args[1:] == ("shape",)
            and len(size.users) == 1
        ):
            sizes.append(next(iter(size.users)))
            if sizes[-1].target is not operator.getitem or sizes[-1].args != (size, 0):
                return None
        elif size.target != "size" or size.args[1:] != (0,) or size.kwargs:
            return None
        if list(sizes[-1].users) != [reshape] or reshape.target not in _RESHAPE or reshape.kwargs:
            return None
        return [*sizes, reshape] if reshape.args[0] is node and _shape_of(reshape) == (sizes[-1], -1) else None


def is_linear(module: nn.Module | None) -> bool:
    """Whether ``module`` is a linear layer; a forward of its own (timm's ``Linear``) is traced."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        graph = Tracer(module, CallForm.of_root(module), opaque=set()).run()
    except (Untraceable, TypeError, ValueError):
        return False
    x, *calls, output = (node for node in graph.nodes if node.op != "get_attr")
    if [node.target for node in calls] != [F.linear] or output.args != (calls[0],) or x.op != "placeholder":
        return False
    given = {"bias": None, **arguments_of(calls[0], ("weight", "bias")), "input": input_of(calls[0])}
    read = {name: getattr(value, "target", value) for name, value in given.items()}
    return read == {"input": x.target, "weight": "weight", "bias": None if module.bias is None else "bias"}


def rank_of_pooled(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """Dimensions of the output if ``node`` takes the mean of each map."""
    module = modules[node.target] if node.op == "call_module" else None
    if module is not None:
        pools = type(module).forward is nn.AdaptiveAvgPool2d.forward and "forward" not in vars(module)
        return 4 if pools and module.output_size in (1, (1, 1)) else None
    if node.target is F.adaptive_avg_pool2d:
        return 4 if arguments_of(node, ("output_size",)).get("output_size") in (1, (1, 1), [1, 1]) else None
    if node.target in _MEANS:
        given = arguments_of(node, ("dim", "keepdim"))
        dim = given.pop("dim", None)
        keeps = given.pop("keepdim", False)
        if not given and isinstance(dim, (tuple, list)) and tuple(dim) in _BOTH_DIRECTIONS:
            return 4 if keeps is True else 2
    return None


def _shape_of(reshape: fx.Node) -> tuple[Any, ...]:
    """What a ``view`` or ``reshape`` was given, as a sequence or one by one."""
    shape = reshape.args[1:]
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
