# SPDX-License-Identifier: BSD-3-Clause
"""Sums of convolutions and BNs of one map, which are one convolution in eval mode: blocks to be reparametrized.

Source: X. Ding et al., "RepVGG", 2021, section 3.3.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import fx

from .._chain_convolutions import Branch
from .._compat import is_plain_convolution
from .activations import MULTIPLY, MULTIPLY_IN_PLACE
from .batch_norms import NotABatchNorm, is_batch_norm, read_batch_norm
from .dropouts import node_passes_on
from .layer_kinds import is_depthwise_layer, is_doubling_layer, is_pointwise_layer, is_whole_convolution
from .linears import RESHAPE, factors_of
from .sites import input_of

#: What adds two maps, and what writes the sum into the first of them.
ADD = {operator.add, torch.add, "add"}
ADD_IN_PLACE = {operator.iadd, "add_"}
_SUBTRACT = {operator.sub, torch.sub, torch.subtract, "sub", "subtract"}
_SUBTRACT_IN_PLACE = {operator.isub, "sub_", "subtract_"}
_MAP = [Branch(None, None)]


class Branches(NamedTuple):
    """The sum of ``terms`` of one map.

    Attributes:
        nodes: all of it, in order; the last one gives the sum.
        terms: at least two of them with a module, or one with factors or a sign.
        largest: the convolution of most taps, which all others fit into.
    """

    nodes: list[fx.Node]
    terms: list[Branch]
    largest: nn.Conv2d


def branches_from(first: fx.Node, names: set[fx.Node], channels: int, modules: dict[str, nn.Module]) -> Branches | None:
    """The longest sum that ``first`` begins, without a node of another kind in between.

    Args:
        names: the nodes that give the map, of ``channels``.
    """
    values = dict.fromkeys(names, _MAP)  # of nodes that are sums of branches
    nodes: list[fx.Node] = []
    found: Branches | None = None
    node = first
    while (is_constant := _is_constant(node)) or (terms := _terms_of(node, values, channels, modules)) is not None:
        if node.op != "get_attr":
            nodes.append(node)
        if not is_constant:
            values[node] = terms
            inner = [each for each in nodes if each is not node]
            largest = _largest(terms, channels)
            if largest is not None and all(set(nodes).issuperset(each.users) for each in inner):
                found = Branches(list(nodes), terms, largest)
        node = node.next
    return found


def _is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is a parameter, or one of another shape."""
    if node.op == "get_attr":
        return True
    return node.target in RESHAPE and bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


def _terms_of(
    node: fx.Node, values: dict[fx.Node, list[Branch]], channels: int, modules: dict[str, nn.Module]
) -> list[Branch] | None:
    """What ``node`` is a sum of, or ``None``."""
    if node.op != "call_module" and node.target in MULTIPLY:
        return _product_of(node, values, channels, modules)
    if not values.keys() >= set(node.all_input_nodes) or not node.all_input_nodes:
        return None
    if node_passes_on(node, modules):
        return values[node.all_input_nodes[0]]
    if node.op != "call_module":
        return _sum_of(node, values, modules)
    module, source = modules[node.target], input_of(node)
    if source is None or node.all_input_nodes != [source] or "forward" in vars(module):
        return None
    given = values[source]
    if isinstance(module, nn.Conv2d):
        return [Branch(module, None)] if given is _MAP and module.in_channels == channels else None
    if not is_batch_norm(module) or len(given) != 1 or given[0] != Branch(given[0].conv, None):
        return None
    try:
        plain = read_batch_norm(module) == "none"
    except NotABatchNorm:
        return None
    if not plain or module.training or module.running_mean is None:
        return None
    if module.num_features != _channels_of(given, channels):
        return None
    return [given[0]._replace(bn=module)]


def _sum_of(node: fx.Node, values: dict[fx.Node, list[Branch]], modules: dict[str, nn.Module]) -> list[Branch] | None:
    adds, subtracts = node.target in ADD | ADD_IN_PLACE, node.target in _SUBTRACT | _SUBTRACT_IN_PLACE
    if not (adds or subtracts) or node.kwargs or len(node.args) != 2 or len(node.all_input_nodes) != 2:
        return None
    a, b = node.args
    if node.target in ADD_IN_PLACE | _SUBTRACT_IN_PLACE and not _is_only_read_by(node, a, values, modules):
        return None
    return values[a] + [term._replace(sign=term.sign if adds else -term.sign) for term in values[b]]


def _product_of(
    node: fx.Node, values: dict[fx.Node, list[Branch]], channels: int, modules: dict[str, nn.Module]
) -> list[Branch] | None:
    """Of a factor for each channel."""
    sources = [source for source in node.all_input_nodes if source in values]
    if len(sources) != 1:
        return None
    source, terms = sources[0], values[sources[0]]
    if node.target in MULTIPLY_IN_PLACE and not _is_only_read_by(node, source, values, modules):
        return None
    factors = factors_of(node, source, _channels_of(terms, channels), modules)
    return None if factors is None else [term._replace(scales=(*term.scales, factors.scale)) for term in terms]


def _channels_of(terms: list[Branch], channels: int) -> int:
    """What sums of a map of ``channels`` have."""
    return next((term.conv.out_channels for term in terms if term.conv is not None), channels)


def _is_only_read_by(
    node: fx.Node, written: fx.Node, values: dict[fx.Node, list[Branch]], modules: dict[str, nn.Module]
) -> bool:
    """Whether nobody else reads the memory of ``written``, which is not that of the map."""
    while values[written] is not _MAP and list(written.users) == [node]:
        node = written
        if not node_passes_on(node, modules):
            return True
        (written,) = node.all_input_nodes
    return False


def _largest(terms: list[Branch], channels: int) -> nn.Conv2d | None:
    """The convolution that the others of ``terms`` are added to, if they are worth it and fit."""
    convs = [term.conv for term in terms if term.conv is not None]
    are_plain = all(not term.scales and term.sign > 0 for term in terms)
    if not convs or (are_plain and sum(term != _MAP[0] for term in terms) < 2):
        return None
    largest = max(convs, key=lambda conv: conv.kernel_size[0])
    kinds = is_pointwise_layer, is_depthwise_layer, is_doubling_layer, is_whole_convolution
    has_kernel = any(is_kind(largest) for is_kind in kinds)
    if not has_kernel or not all(_fits(conv, largest) for conv in convs):
        return None
    keeps_the_map = largest.stride == (1, 1) and largest.out_channels == channels
    return largest if keeps_the_map or len(convs) == len(terms) else None


def _fits(conv: nn.Conv2d, largest: nn.Conv2d) -> bool:
    """Whether the taps of ``conv`` are those in the middle of ``largest``, which has as many around as it pads with."""
    half = conv.kernel_size[0] // 2
    return (
        is_plain_convolution(conv)
        and conv.kernel_size == (2 * half + 1, 2 * half + 1)
        and conv.padding in ((half, half), "same")
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and (conv.stride, conv.groups, conv.out_channels) == (largest.stride, largest.groups, largest.out_channels)
    )
