# SPDX-License-Identifier: BSD-3-Clause
"""Squeeze-and-excitation in a graph: what makes a factor for each channel of a map from the means of its channels."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from torch import fx

from .._chain_products import Product
from .activations import composed_hardsigmoid, gate_of
from .dropouts import node_passes_on
from .heads import rank_of_pooled
from .layer_kinds import is_plain_pointwise
from .tails import only_reader, tail_behind


class Gate(NamedTuple):
    """``gate(reduce(x.mean((2, 3))))``, two products that end in an activation each.

    Attributes:
        nodes: all of it, in order; the last one gives the factors.
        products: the two.
    """

    nodes: list[fx.Node]
    products: list[Product]


def gate_behind(pool: fx.Node, channels: int, modules: dict[str, nn.Module]) -> Gate | None:
    """What ``pool``, which reads a map of ``channels``, begins."""
    return _Search(modules).behind(pool, channels)


class _Search:
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._nodes: list[fx.Node] = []

    def behind(self, pool: fx.Node, channels: int) -> Gate | None:
        if rank_of_pooled(pool, self._modules) != 4:
            return None
        self._nodes = [pool]
        reduce = self._take_convolution()
        if reduce is None or reduce.in_channels != channels:
            return None
        self._nodes, *tail = tail_behind(self._nodes, self._modules, reduce.out_channels)
        expand = self._take_convolution()
        gate = None if expand is None else self._take_gate()
        if gate is None or expand.in_channels != reduce.out_channels or expand.out_channels != channels:
            return None
        return Gate(self._nodes, [Product(reduce, *tail), Product(expand, None, gate)])

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _next(self) -> fx.Node | None:
        """The reader of the last node, behind those that hand its map on; these are taken."""
        while (reader := only_reader(self._nodes[-1])) is not None:
            module = self._module(reader)
            if not node_passes_on(reader, self._modules):
                return None if module is not None and "forward" in vars(module) else reader
            self._nodes.append(reader)
        return None

    def _take_convolution(self) -> nn.Conv2d | None:
        reader = self._next()
        conv = None if reader is None else self._module(reader)
        if not is_plain_pointwise(conv):
            return None
        self._nodes.append(reader)
        return conv

    def _take_gate(self) -> str | None:
        spelled_out = composed_hardsigmoid(self._nodes[-1], self._modules)
        if spelled_out is not None:
            self._nodes += spelled_out
            return "hardsigmoid"
        reader = self._next()
        activation = None if reader is None else gate_of(reader, self._modules)
        if activation is not None:
            self._nodes.append(reader)
        return activation
