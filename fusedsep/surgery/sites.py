# SPDX-License-Identifier: BSD-3-Clause
"""Finding depthwise -> [BN] -> activation -> pointwise -> [BN] -> [activation] in a graph."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._activations import ACTIVATION_CODES, CONVOLUTION_ACTIVATION_CODES
from .._compat import is_patched_convolution, is_plain_convolution
from .._padding import NO_PADS, Pads, convolution_pads, pad_map, sum_of_pads
from .._structure import why_not_depthwise, why_not_pointwise
from .activations import (
    activation_of_function,
    activation_of_module,
    arguments_of,
    composed_activation,
    composed_hardswish,
)
from .batch_norms import NotABatchNorm, is_batch_norm, read_batch_norm
from .convolutions import PaddingUnknown, read_padding
from .dropouts import node_passes_on
from .layer_kinds import is_depthwise_map, is_first_convolution, is_plain_pointwise


class Chain:
    """One site in a graph: the nodes it covers, and what they compute."""

    #: Those that have kernels there.
    activations = ACTIVATION_CODES

    def __init__(self, depthwise: fx.Node) -> None:
        self.nodes = [depthwise]
        self.dw = depthwise
        self.bn1: fx.Node | None = None
        self.activation = "none"
        self.pw: fx.Node = depthwise
        self.bn2: fx.Node | None = None
        self.pointwise_activation = "none"
        #: The zeros that nodes in front of the depthwise convolution add, and those that its own forward adds.
        self.pad_in_front: Pads | Literal["same"] = NO_PADS
        self.carried_pad: Pads | Literal["same"] = NO_PADS
        #: Whether ``bn1`` and ``bn2`` apply the activation themselves.
        self.carried_activations = (False, False)

    @property
    def pre_pad(self) -> Pads | Literal["same"]:
        """All zeros around the map but those that ``padding`` of a plain convolution adds."""
        return sum_of_pads(self.pad_in_front, self.carried_pad)

    def __str__(self) -> str:
        pad = "" if self.pre_pad == NO_PADS else "pad + "
        bn1 = " + BN" if self.bn1 is not None else ""
        bn2 = " + BN" if self.bn2 is not None else ""
        return f"{pad}depthwise{bn1}, {self.activation}, pointwise{bn2}, {self.pointwise_activation}"


class ConvolutionChain:
    """A convolution, a BN and perhaps an activation that belong to no site.

    A pointwise convolution, a depthwise one, or one of an image. The other names are those of :class:`Chain`.
    """

    activations = CONVOLUTION_ACTIVATION_CODES

    def __init__(self, conv: fx.Node) -> None:
        self.nodes = [conv]
        self.conv = conv
        #: The zeros that a forward of its own adds.
        self.carried_pad: Pads | Literal["same"] = NO_PADS
        self.bn2: fx.Node | None = None
        self.pointwise_activation = "none"
        self.carried_activations = (False, False)


class NotASite(Exception):
    """The reason why a depthwise convolution does not start a site."""


class _Step(NamedTuple):
    """What one node does to the map: ``kind`` is passed_on, bn, activation, pointwise or other."""

    kind: str
    activation: str = "none"
    text: str = ""


def is_depthwise(module: nn.Module) -> bool:
    """Whether a reader of the model would call ``module`` a depthwise convolution, fusable or not."""
    if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels:
        return False
    return module.groups > 1 or why_not_depthwise(module) is None


def find_chains(
    graph: fx.Graph, modules: dict[str, nn.Module]
) -> tuple[list[Chain | ConvolutionChain], dict[nn.Module, str]]:
    """All sites of ``graph``, and for every other depthwise convolution the reason why it is none.

    Where BNs are in training mode, also the other convolutions in front of one that have an operator.
    """
    chains: list[Chain | ConvolutionChain] = []
    reasons: dict[nn.Module, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not is_depthwise(modules[node.target]):
            continue
        try:
            chains.append(_chain_from(node, modules))
        except NotASite as reason:
            reasons[modules[node.target]] = str(reason)
    chains += _convolution_chains(graph, modules, {node for chain in chains for node in chain.nodes})
    while (chain := _overtaking(chains, graph, modules)) is not None:
        chains.remove(chain)
        if isinstance(chain, Chain):
            reasons[modules[chain.dw.target]] = "its BN is called elsewhere in the meantime, and would change its turn"
    return chains, reasons


def _convolution_chains(
    graph: fx.Graph, modules: dict[str, nn.Module], covered: set[fx.Node]
) -> Iterator[ConvolutionChain]:
    """Those outside of ``covered`` whose BN takes the statistics of the batch."""
    for node in graph.nodes:
        if node.op != "call_module" or node in covered or input_of(node) is None:
            continue
        module = modules[node.target]
        fits = is_plain_pointwise(module) or is_first_convolution(module) or is_depthwise_map(module)
        if not fits or node.all_input_nodes != [input_of(node)] or is_patched_convolution(module):
            continue
        chain = ConvolutionChain(node)
        _follow_after(node, chain, modules)
        if chain.bn2 is None or not modules[chain.bn2.target].training:
            continue
        if not is_plain_convolution(module):
            try:
                chain.carried_pad = read_padding(module)
            except PaddingUnknown:
                continue
        yield chain


def _overtaking(
    chains: list[Chain | ConvolutionChain], graph: fx.Graph, modules: dict[str, nn.Module]
) -> Chain | ConvolutionChain | None:
    """A chain that runs a BN in training mode before an earlier call of that BN: running statistics have an order.

    A chain runs all its nodes in the place of the first one.
    """
    turns = {node: turn for turn, node in enumerate(graph.nodes)}
    latest: dict[nn.Module, int] = {}
    chain_of = {node: chain for chain in chains for node in chain.nodes}
    for node in graph.nodes:
        bn = modules[node.target] if node.op == "call_module" else None
        if bn is None or not is_batch_norm(bn) or not bn.training:
            continue
        chain = chain_of.get(node)
        turn = turns[node if chain is None else chain.nodes[0]]
        if turn < latest.get(bn, -1):
            return chain
        latest[bn] = turn
    return None


def why_not_fusable(conv: nn.Module) -> str | None:
    """The reason why a depthwise convolution by itself rules out a site, or ``None``."""
    reason = why_not_depthwise(conv)
    if reason is None and is_patched_convolution(conv):
        reason = _own_forward(conv)
    if reason is None and conv.stride[0] > 2:
        reason = f"stride {tuple(conv.stride)}"
    return reason


def _own_forward(conv: nn.Conv2d) -> str:
    return f"{type(conv).__name__} has a forward of its own"


def _chain_from(depthwise: fx.Node, modules: dict[str, nn.Module]) -> Chain:
    conv = modules[depthwise.target]
    reason = why_not_fusable(conv)
    if reason is not None:
        raise NotASite(reason)
    chain = Chain(depthwise)
    if not is_plain_convolution(conv):
        try:
            chain.carried_pad = read_padding(conv)
        except PaddingUnknown as unknown:
            raise NotASite(f"{_own_forward(conv)}: {unknown}") from None
    _follow_to_pointwise(chain, conv, modules)
    _follow_after(chain.pw, chain, modules)
    _absorb_padding(chain, conv, modules)
    return chain


def _follow_to_pointwise(chain: Chain, conv: nn.Conv2d, modules: dict[str, nn.Module]) -> None:
    activated = False
    while True:
        current = chain.nodes[-1]
        spelled_out = None if activated else composed_hardswish(current, modules)
        if spelled_out is not None:
            chain.nodes += spelled_out
            chain.activation, activated = "hardswish", True
            continue
        reader = _only_reader(current)
        step = _read(reader, current, modules)
        if step.kind == "pointwise":
            pointwise = modules[reader.target]
            reason = why_not_pointwise(pointwise)
            if reason is None and not is_plain_convolution(pointwise):
                reason = _own_forward(pointwise)
            if reason is not None:
                raise NotASite(f"the convolution that follows, {reader.target}, is not pointwise: {reason}")
            if pointwise.in_channels != conv.out_channels:
                raise NotASite(f"{reader.target} takes {pointwise.in_channels} channels, not {conv.out_channels}")
            chain.nodes.append(reader)
            chain.pw = reader
            return
        if step.kind == "bn" and chain.bn1 is None and not activated:
            if modules[reader.target].num_features != conv.out_channels:
                raise NotASite(f"{reader.target} has {modules[reader.target].num_features} features")
            chain.bn1 = reader
            chain.activation, activated = step.activation, step.activation != "none"
            chain.carried_activations = (activated, False)
        elif step.kind == "activation" and not activated:
            chain.activation, activated = step.activation, True
        elif step.kind == "end":
            raise NotASite(f"no pointwise convolution follows, but {step.text}{_xception_order(chain.dw, modules)}")
        elif step.kind != "passed_on":
            raise NotASite(f"{step.text} between depthwise and pointwise")
        chain.nodes.append(reader)


def _follow_after(conv: fx.Node, chain: Chain | ConvolutionChain, modules: dict[str, nn.Module]) -> None:
    """Take in a BN and an activation behind the last convolution; anything else stays where it is."""
    passed_on: list[fx.Node] = []
    current = conv
    activated = False
    while not activated:
        spelled_out = composed_activation(current, modules)
        if spelled_out is not None and spelled_out[1] in chain.activations:
            chain.nodes += [*passed_on, *spelled_out[0]]
            chain.pointwise_activation = spelled_out[1]
            return
        if len(current.users) != 1:
            return
        reader = next(iter(current.users))
        try:
            step = _read(reader, current, modules, chain.activations)
        except NotASite:
            return
        if step.kind == "bn" and chain.bn2 is None:
            if modules[reader.target].num_features != modules[conv.target].out_channels:
                return
            chain.bn2 = reader
            activated = step.activation != "none"
            chain.carried_activations = (chain.carried_activations[0], activated)
        elif step.kind == "activation":
            activated = True
        elif step.kind != "passed_on":
            return
        passed_on.append(reader)
        current = reader
        if step.kind != "passed_on":
            chain.pointwise_activation = step.activation
            chain.nodes += passed_on
            passed_on = []


def _absorb_padding(chain: Chain, conv: nn.Conv2d, modules: dict[str, nn.Module]) -> None:
    """Take in zero padding in front of the depthwise convolution that nobody else reads."""
    passed_on: list[fx.Node] = []
    current = input_of(chain.dw)
    while len(current.users) == 1 and (source := input_of(current)) is not None:
        passed_on.insert(0, current)
        pads = zero_pads(current, conv, modules)
        if pads is None:
            if not _passes_on(current, source, modules):
                return
        elif "same" in (pads, chain.pre_pad) and chain.pre_pad != NO_PADS:
            return
        else:
            chain.pad_in_front = sum_of_pads(pads, chain.pad_in_front)
            chain.nodes[:0] = passed_on
            passed_on = []
        current = source


def zero_pads(node: fx.Node, conv: nn.Conv2d, modules: dict[str, nn.Module]) -> Pads | Literal["same"] | None:
    """The zeros that ``node`` puts around its map if it does nothing else."""
    if node.op == "call_module":
        module = modules[node.target]
        if "forward" in vars(module) or type(module).forward is not nn.ConstantPad2d.forward or module.value != 0:
            return None
        return _as_pads(module.padding)
    if node.target in (F.pad, torch.constant_pad_nd):
        names = ("pad", "mode", "value") if node.target is F.pad else ("pad", "value")
        given = arguments_of(node, names)
        if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
            return None
        return _as_pads(given["pad"])
    if node.target is pad_map:
        given = arguments_of(node, ("padding", "stride", "dilation"))
        if given["padding"] != "same":
            return _as_pads(given["padding"])
        fits = (given["stride"], given["dilation"]) == (conv.stride[0], conv.dilation[0])
        return "same" if fits and convolution_pads(conv) == NO_PADS else None
    return None


def _as_pads(pad: Any) -> Pads | None:
    if not isinstance(pad, (tuple, list)) or not all(type(side) is int and side >= 0 for side in pad):
        return None
    sides = [*pad, 0, 0] if len(pad) == 2 else pad
    return Pads(*sides[:4]) if len(sides) % 2 == 0 and len(sides) >= 4 and not any(sides[4:]) else None


def _only_reader(node: fx.Node) -> fx.Node:
    readers = list(node.users)
    if len(readers) == 1:
        return readers[0]
    if not readers:
        raise NotASite("nothing reads its map")
    raise NotASite(f"several operations read the map of {node.name}: {', '.join(reader.name for reader in readers)}")


def _read(
    node: fx.Node, source: fx.Node, modules: dict[str, nn.Module], activations: Collection[str] = ACTIVATION_CODES
) -> _Step:
    """What ``node`` does with ``source``; of activations, ``activations`` are known."""
    if node.op == "output":
        return _Step("end", text="its map is returned")
    if node.all_input_nodes != [source] or input_of(node) is not source:
        return _Step("other", text=node.name)
    if _passes_on(node, source, modules):
        return _Step("passed_on")
    if node.op == "call_module":
        return _read_module(node.target, modules[node.target], activations)
    activation = activation_of_function(node)
    known = activation in activations
    return _Step("activation", activation, activation) if known else _Step("other", text=node.name)


def input_of(node: fx.Node) -> fx.Node | None:
    """The map that ``node`` reads: its first argument, or ``None`` if that is no node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.target is operator.add and isinstance(first, (int, float)):  # a sum of several begins with a 0
        first = node.args[1]
    return first if isinstance(first, fx.Node) and node.op != "output" else None


def _passes_on(node: fx.Node, source: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` gives ``source`` back unchanged."""
    if node.all_input_nodes != [source]:
        return False
    return node_passes_on(node, modules)


def _read_module(path: str, module: nn.Module, activations: Collection[str]) -> _Step:
    described = f"{type(module).__name__} ({path})"
    if "forward" in vars(module):
        return _Step("other", text=described)
    if is_batch_norm(module):
        try:
            activation = read_batch_norm(module)
        except NotABatchNorm as reason:
            raise NotASite(f"{described}: {reason}") from None
        if activation not in activations:
            raise NotASite(f"{described}: applies {activation}")
        return _Step("bn", activation, described)
    if isinstance(module, nn.Conv2d):
        return (
            _Step("end", text=f"{described} {tuple(module.kernel_size)}")
            if is_depthwise(module)
            else _Step("pointwise")
        )
    activation = activation_of_module(module)
    known = activation in activations
    return _Step("activation", activation, described) if known else _Step("other", text=described)


def _xception_order(depthwise: fx.Node, modules: dict[str, nn.Module]) -> str:
    """A remark where a pointwise convolution stands in front of the depthwise one instead."""
    node = input_of(depthwise)
    while node is not None:
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            pointwise = why_not_pointwise(module) is None
            return ' (pointwise -> depthwise, the order of the "extreme Inception")' if pointwise else ""
        node = input_of(node)
    return ""
