# SPDX-License-Identifier: BSD-3-Clause
"""Nodes of a graph that apply linear layers and LayerNorm to the channels of each pixel, and factors of channels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._chain_layers import LayerScale
from .._chain_linear import ChannelLinear
from .activations import MULTIPLY, arguments_of
from .dropouts import node_passes_on
from .heads import is_linear
from .layer_kinds import is_plain_pointwise
from .sites import input_of
from .tails import only_reader, tail_behind
from .tracing import CallForm, Tracer, Untraceable

_PERMUTE = {torch.permute, "permute"}
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
#: What gives a parameter or a map another shape.
RESHAPE = {torch.reshape, "reshape", "view"}


class Section(NamedTuple):
    """Linear layers one after the other.

    Attributes:
        nodes: those of each; the last one of all gives a map.
        layers: of each, without the modules.
    """

    nodes: list[list[fx.Node]]
    layers: list[ChannelLinear]


class Factors(NamedTuple):
    """What a node multiplies the channels of a map with.

    Attributes:
        node: gives the product.
        constants: the nodes that read the parameter.
        scale: the parameter.
    """

    node: fx.Node
    constants: list[fx.Node]
    scale: LayerScale


def section_from(first: fx.Node, channels: int, modules: dict[str, nn.Module]) -> Section | None:
    """What ``first`` begins, which reads a map of ``channels``.

    Either it moves the channels to the end, and the section ends where they come back. Or it is a LayerNorm of the
    channels, and a 1x1 convolution follows.
    """
    search = _Search(channels, modules)
    return search.norm_and_convolution(first) or search.between_permutations(first)


def factors_of(
    node: fx.Node, source: fx.Node, channels: int, root: dict[str, nn.Module], dim: int = 1
) -> Factors | None:
    """``node`` as the product of ``source``, whose dimension ``dim`` has ``channels``, and a factor for each."""
    if node.target not in MULTIPLY or node.kwargs or len(node.args) != 2 or len(node.all_input_nodes) != 2:
        return None
    constants = [next((each for each in node.args if each is not source), None)]
    shape: Any = None
    if constants[0].target in RESHAPE and not constants[0].kwargs:
        shape = constants[0].args[1:]
        constants.append(constants[0].args[0])
    parameter = constants[-1]
    if parameter.op != "get_attr" or any(len(each.users) != 1 for each in constants):
        return None
    path, _, name = parameter.target.rpartition(".")
    owner = root[path]
    value = owner._parameters.get(name)
    if value is None or value.numel() != channels:
        return None
    try:
        given = value.shape if shape is None else value.reshape(*shape).shape
    except (RuntimeError, TypeError):
        return None
    wanted = [1, 1, 1, 1]
    wanted[dim] = channels
    if tuple(given) != tuple(wanted)[4 - len(given) :] or 4 - len(given) > dim:
        return None
    return Factors(node, constants, LayerScale(owner, name))


class _Search:
    def __init__(self, channels: int, modules: dict[str, nn.Module]) -> None:
        self._channels, self._modules = channels, modules

    def norm_and_convolution(self, first: fx.Node) -> Section | None:
        norm = self._norm_of(first, of_maps=True)
        nodes = [first]
        while norm is not None and (reader := only_reader(nodes[-1])) is not None:
            nodes.append(reader)
            if node_passes_on(reader, self._modules):
                continue
            conv = self._module(reader)
            if not is_plain_pointwise(conv) or conv.in_channels != self._channels:
                break
            tail = tail_behind(nodes, self._modules, conv.out_channels, norms=False)
            return Section([tail.nodes], [ChannelLinear(conv, norm, tail.activation, None, [])])
        return None

    def between_permutations(self, first: fx.Node) -> Section | None:
        if not _permutes(first, _TO_LAST):
            return None
        nodes, parts, layers = [first], [], []
        norm: nn.LayerNorm | None = None
        while True:
            last = nodes[-1] if nodes else parts[-1][-1]
            factors = self._factors_behind(last)
            reader = only_reader(last) if factors is None else factors.node
            if reader is None:
                return None
            nodes.append(reader)
            if factors is not None:
                if norm is not None or not layers or layers[-1].activation != "none" or layers[-1].scale is not None:
                    return None
                nodes[-1:] = [*factors.constants[:-1], reader]
                layers[-1] = layers[-1].scaled(factors.scale)
            elif _permutes(reader, _TO_FIRST):
                if norm is not None or not layers:
                    return None
                parts[-1] += nodes
                return Section(parts, layers)
            elif norm is None and (found := self._norm_of(reader)) is not None:
                norm = found
            elif not node_passes_on(reader, self._modules):
                linear = self._module(reader)
                if not is_linear(linear) or "forward" in vars(linear) or linear.in_features != self._channels:
                    return None
                self._channels = linear.out_features
                tail = tail_behind(nodes, self._modules, self._channels, norms=False)
                layers.append(ChannelLinear(linear, norm, tail.activation, None, []))
                parts.append(tail.nodes)
                nodes, norm = [], None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _factors_behind(self, node: fx.Node) -> Factors | None:
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        return None if reader is None else factors_of(reader, node, self._channels, self._modules, dim=3)

    def _norm_of(self, node: fx.Node, of_maps: bool = False) -> nn.LayerNorm | None:
        """LayerNorm of the last dimension, or of the channels of maps."""
        module = self._module(node)
        if not isinstance(module, nn.LayerNorm) or tuple(module.normalized_shape) != (self._channels,):
            return None
        if "forward" in vars(module) or _normalizes_maps(module) is not of_maps:
            return None
        return module


def _permutes(node: fx.Node, wanted: tuple[int, ...]) -> bool:
    if node.target not in _PERMUTE:
        return False
    dims = node.args[1:] or (node.kwargs.get("dims"),)
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return tuple(dim % 4 if isinstance(dim, int) else dim for dim in dims) == wanted


def _normalizes_maps(module: nn.LayerNorm) -> bool | None:
    """Whether it does so for the channels of maps; ``None`` if its forward is neither that nor torch's."""
    if type(module).forward is nn.LayerNorm.forward:
        return False
    try:
        graph = Tracer(module, CallForm.of_root(module), opaque=set()).run()
    except (Untraceable, TypeError, ValueError):
        return None
    x, *calls, output = (node for node in graph.nodes if node.op != "get_attr")
    norms = [node for node in calls if node.target is F.layer_norm]
    if len(norms) != 1 or [input_of(node) for node in calls] != [x, *calls[:-1]] or output.args != (calls[-1],):
        return None
    names = ("normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, (None, None, None, 1e-5), strict=True)) | arguments_of(norms[0], names)
    read = {name: getattr(given[name], "target", given[name]) for name in names[1:]}
    affine = [None if getattr(module, name) is None else name for name in names[1:3]]
    if read != dict(zip(names[1:], (*affine, module.eps), strict=True)):
        return None
    if tuple(given["normalized_shape"]) != tuple(module.normalized_shape):
        return None
    if calls == norms:
        return False
    moves = len(calls) == 3 and calls[1] is norms[0]
    return True if moves and _permutes(calls[0], _TO_LAST) and _permutes(calls[2], _TO_FIRST) else None
