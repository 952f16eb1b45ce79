# SPDX-License-Identifier: BSD-3-Clause
"""Squeeze-and-excitation in a graph: what makes a factor for each channel of a map from the means of its channels."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from torch import fx

from .activations import (
    activation_of_function,
    activation_of_module,
    composed_activation,
    composed_hardsigmoid,
    gate_of,
)
from .dropouts import call_passes_on, passes_on
from .heads import rank_of_pooled
from .sites import is_plain_pointwise
from .tails import only_reader


class Gate(NamedTuple):
    """``gate_activation(expand(activation(reduce(x.mean((2, 3), keepdim=True)))))``.

    Attributes:
        nodes: all of it, in order; the last one gives the factors.
    """

    nodes: list[fx.Node]
    reduce: nn.Conv2d
    activation: str
    expand: nn.Conv2d
    gate_activation: str


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
        activation = "none" if reduce is None else self._take_activation()
        expand = self._take_convolution()
        gate_activation = None if expand is None else self._take_gate()
        if reduce is None or expand is None or gate_activation is None:
            return None
        if not (reduce.in_channels == expand.out_channels == channels and reduce.out_channels == expand.in_channels):
            return None
        return Gate(self._nodes, reduce, activation, expand, gate_activation)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _next(self) -> fx.Node | None:
        """The reader of the last node, behind those that hand its map on; these are taken."""
        while (reader := only_reader(self._nodes[-1])) is not None:
            module = self._module(reader)
            if not (call_passes_on(reader) if module is None else passes_on(module)):
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

    def _take_activation(self) -> str:
        """The one that comes next, or ``"none"``."""
        spelled_out = composed_activation(self._nodes[-1], self._modules)
        if spelled_out is not None:
            self._nodes += spelled_out[0]
            return spelled_out[1]
        reader = self._next()
        if reader is None:
            return "none"
        module = self._module(reader)
        activation = activation_of_function(reader) if module is None else activation_of_module(module)
        if activation is None:
            return "none"
        self._nodes.append(reader)
        return activation

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
