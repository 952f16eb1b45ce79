# SPDX-License-Identifier: BSD-3-Clause
"""What follows on a product in a graph and can be computed with it: a BN in eval mode and an activation."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from torch import fx

from .activations import activation_of_function, activation_of_module, composed_activation
from .batch_norms import NotABatchNorm, is_batch_norm, read_batch_norm
from .dropouts import node_passes_on
from .sites import input_of


class Tail(NamedTuple):
    """``activation(bn(x))``.

    Attributes:
        nodes: those that it was found behind, and its own.
        bn: in eval mode with running statistics, or ``None``.
        activation: its name.
        carried: ``bn`` applies the activation itself.
    """

    nodes: list[fx.Node]
    bn: nn.Module | None
    activation: str
    carried: bool


def tail_behind(nodes: list[fx.Node], modules: dict[str, nn.Module], channels: int, norms: bool = True) -> Tail:
    """What follows on the last of ``nodes``, which gives ``channels``; a BN only where ``norms`` says so."""
    bn: nn.Module | None = None
    activation, carried, pending = "none", False, list(nodes)
    nodes = list(nodes)
    while activation == "none":
        spelled_out = composed_activation(pending[-1], modules)
        if spelled_out is not None:
            nodes, activation = [*pending, *spelled_out[0]], spelled_out[1]
            break
        reader = only_reader(pending[-1])
        if reader is None:
            break
        pending.append(reader)
        module = modules[reader.target] if reader.op == "call_module" else None
        if node_passes_on(reader, modules):
            continue
        if module is not None and "forward" in vars(module):
            break
        if norms and bn is None and module is not None and is_batch_norm(module):
            try:
                found = read_batch_norm(module)
            except NotABatchNorm:
                break
            if module.training or module.running_mean is None or module.num_features != channels:
                break
            bn, activation, carried = module, found, found != "none"
        else:
            found = activation_of_function(reader) if module is None else activation_of_module(module)
            if found is None:
                break
            activation = found
        nodes = list(pending)
    return Tail(nodes, bn, activation, carried)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The node that reads ``node`` and no other one, if it is the only one that reads it."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or reader.op == "output" or reader.all_input_nodes != [node] or input_of(reader) is not node:
        return None
    return reader
