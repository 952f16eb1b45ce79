# SPDX-License-Identifier: BSD-3-Clause
"""What becomes a step of a chain, node by node: convolutions with what follows them, and layers of other kinds."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._chain import INPUT, Part
from .._chain_convolutions import Convolution, FrozenSite, Site, SumOfBranches
from .._chain_elements import Element
from .._chain_linear import ChannelLinear
from .._chain_products import Classifier, Gate, GatedConvolution
from .._combinations import MaxPool, Upsample
from .._compat import is_patched_convolution, is_plain_convolution
from .._padding import NO_PADS, Pads, convolution_pads, pad_map, sum_of_pads
from .activations import multiplies
from .analysis import is_block
from .batch_norms import is_batch_norm
from .branches import branches_from
from .convolutions import PaddingUnknown, read_padding
from .flow import Flow, Frozen
from .gates import gate_behind
from .heads import head_behind
from .layer_kinds import (
    is_depthwise_layer,
    is_doubling_layer,
    is_grouped_layer,
    is_plain_pointwise,
    is_pointwise_layer,
    is_whole_convolution,
)
from .linears import factors_of, section_from
from .maps import channels_of
from .program import FusedSite
from .resizing import doubles_the_map, max_pool_window
from .sites import input_of, zero_pads
from .tails import only_reader, tail_behind


class Layers(Flow):
    """Layers, and what else a node may begin that becomes steps: each of these takes the nodes that it covers."""

    def _input_for(self, source: fx.Node, channels: int) -> Part | None:
        """What ``source`` gives, for a layer that takes ``channels``."""
        if not self.steps:
            part = self._maps.add(INPUT, channels)
            self._values[source] = (part,)
            return part
        part = self._readable(source)
        return part if part is not None and part.channels == channels else None

    def _take_branches(self, node: fx.Node, source: fx.Node) -> bool:
        """A sum of convolutions and BNs of one map."""
        names, module = {source}, self._module(node)
        if self.steps:
            value = self._maps.joined([self._values[source]])
            names = {name for name, each in self._values.items() if self._maps.joined([each]) == value}
            channels = channels_of(value)
        else:
            channels = getattr(module, "in_channels", None) or getattr(module, "num_features", 0)
        found = branches_from(node, names, channels, self._modules)
        read = None if found is None else self._input_for(source, channels)
        if read is None:
            return False
        conv, own = found.largest, own_pads(found.largest)
        tail = tail_behind(found.nodes, self._modules, conv.out_channels)
        modules = self._modules_of(tail.nodes)
        whole = SumOfBranches(found.terms, conv, tail.bn, tail.activation, modules, NO_PADS, own, tail.carried)
        self._add_convolution(whole, tail.nodes, read)
        return True

    def _take_layer(self, node: fx.Node, source: fx.Node) -> bool:
        """A site, or a convolution, with what follows it."""
        target, module = node.target, self._module(node)
        if node.all_input_nodes != [source]:
            return False
        if not isinstance(target, FusedSite) and (module is None or not is_block(module)):
            if is_pointwise_layer(module) or is_depthwise_layer(module) or is_doubling_layer(module):
                return self._take_convolution([node], module, NO_PADS)
            return self._take_groups(node, module) or self._take_whole_convolution(node)
        if isinstance(target, FusedSite):
            site, key, separable, modules = target, target.dw, target.separable, target.modules
        else:
            parts = [part for part in (module.dw, module.bn1, module.pw, module.bn2) if part is not None]
            site, key, separable, modules = module, module, module._separable, [module, *parts]

        def make(frozen: Frozen) -> Element:
            if frozen is None:
                return Site(separable, site, (site.dw, site.bn1, site.pw, site.bn2), modules)
            return FrozenSite(frozen[key], [frozen[key]])

        read = self._input_for(source, site.dw.in_channels)
        if read is None:
            return False
        self._add_step(make, [node], read, site.pw.out_channels, site=key)
        return True

    def _take_groups(self, node: fx.Node, conv: nn.Module | None) -> bool:
        """A grouped convolution, not as the first step: each group reads some channels and writes some."""
        fits = self.steps and is_grouped_layer(conv)
        read = self._input_for(input_of(node), conv.in_channels) if fits else None
        if read is None:
            return False
        own, tail = own_pads(conv), tail_behind([node], self._modules, conv.out_channels)
        modules = self._modules_of(tail.nodes)
        channels, size = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        whole = Convolution(conv, tail.bn, tail.activation, modules, NO_PADS, own, tail.carried)
        first = range(0, conv.out_channels, size)
        elements = [whole.with_filters(channels, range(begin, begin + size)) for begin in first]
        parts = []
        for group, element in enumerate(elements):
            part = Part(read.map, read.begin + group * channels, channels)
            parts.append(self._add_step(lambda frozen, element=element: element, [], part, element.out_channels))
        self._nodes += tail.nodes
        self._values[tail.nodes[-1]] = (self._maps.place(tuple(parts)),)
        return True

    def _take_norm(self, node: fx.Node, source: fx.Node) -> bool:
        """A BN of maps side by side, which convolutions have given: each gets its channels."""
        if not is_batch_norm(self._module(node)):
            return False
        value = self._maps.joined([self._values[source]])
        tail = tail_behind([source], self._modules, channels_of(value))
        nodes = tail.nodes[1:]
        if tail.bn is None or nodes[0] is not node or len(set(value)) < len(value):
            return False
        steps, begin = list(self.steps), 0
        for part in value:
            step = steps[part.map - 1] if part.map >= 1 and self._maps.is_whole(part) else None
            element = None if step is None or step.site is not None else step.make(None)
            if not isinstance(element, Convolution) or element.bn is not None or element.activation != "none":
                return False
            if step.residual is not None or step.activation != "none" or not self._is_read_by(part, [node]):
                return False
            normalized = element.with_norm(tail.bn, begin, tail.activation, tail.carried)
            steps[part.map - 1] = step._replace(make=lambda frozen, normalized=normalized: normalized)
            begin += part.channels
        self.steps = steps
        self._work += 1
        self._nodes += nodes
        self._activations += nodes
        self._values[nodes[-1]] = value
        return True

    def _take_whole_convolution(self, node: fx.Node) -> bool:
        """A 3x3 convolution of all channels, behind nodes that put zeros around its map."""
        nodes = [node]
        while not isinstance(conv := self._module(nodes[-1]), nn.Conv2d):
            reader = only_reader(nodes[-1])
            if reader is None or not _may_pad(nodes[-1], conv):
                return False
            nodes.append(reader)
        if not is_whole_convolution(conv):
            return False
        pads: Pads | str = NO_PADS
        for node in nodes[:-1]:
            more = zero_pads(node, conv, self._modules)
            if more is None or ("same" in (more, pads) and pads != NO_PADS):
                return False
            pads = sum_of_pads(pads, more)
        return self._take_convolution(nodes, conv, pads)

    def _take_linears(self, node: fx.Node, source: fx.Node) -> bool:
        """Linear layers of the channels of each pixel, behind LayerNorm or not."""
        section = section_from(node, channels_of(self._values[source]), self._modules)
        read = None if section is None else self._readable(source)
        if read is None:
            return False
        for nodes, layer in zip(section.nodes, section.layers, strict=True):
            layer.modules = self._modules_of(nodes)
            read = self._add_step(lambda frozen, layer=layer: layer, nodes, read, layer.out_channels)
        return True

    def _take_factors(self, node: fx.Node) -> bool:
        """Factors of the channels that a linear layer gives, and nobody else reads."""
        for source in node.all_input_nodes:
            value = self._maps.joined([self._values[source]]) if source in self._values else ()
            part = value[0] if len(value) == 1 and value[0].map >= 1 and self._maps.is_whole(value[0]) else None
            factors = None if part is None else factors_of(node, source, part.channels, self._modules)
            if factors is None:
                continue
            step = self.steps[part.map - 1]
            layer = None if step.site is not None else step.make(None)
            nodes = [*factors.constants[:-1], node]
            if not isinstance(layer, ChannelLinear) or layer.activation != "none" or layer.scale is not None:
                return False
            if step.residual is not None or step.activation != "none" or nodes[0] < self._nodes[0]:
                return False
            if not self._is_read_by(part, [node]):
                return False
            layer = layer.scaled(factors.scale)
            self.steps[part.map - 1] = step._replace(make=lambda frozen, layer=layer: layer)
            self._work += 1
            self._nodes += nodes
            self._values[node] = value
            return True
        return False

    def _take_pool(self, node: fx.Node, source: fx.Node) -> bool:
        module = self._module(node)
        window = max_pool_window(module)
        read = None if window is None else self._readable(source)
        if read is None:
            return False
        pool = MaxPool(read.channels, *window, [module])
        self._add_step(lambda frozen: pool, [node], read, read.channels, joins=False, activates=False)
        return True

    def _take_upsampling(self, node: fx.Node, source: fx.Node) -> bool:
        read = self._readable(source) if doubles_the_map(node, self._modules) else None
        if read is None:
            return False
        element = Upsample(read.channels, self._modules_of([node]))
        self._add_step(lambda frozen: element, [node], read, read.channels, activates=False)
        return True

    def _take_gate(self, pool: fx.Node, source: fx.Node) -> bool:
        """Squeeze-and-excitation of the map that ``pool`` reads, with a 1x1 convolution behind it."""
        value = self._maps.joined([self._values[source]])
        gate = gate_behind(pool, channels_of(value), self._modules)
        product = None if gate is None or len(gate.nodes[-1].users) != 1 else next(iter(gate.nodes[-1].users))
        if product is None:
            return False
        names = [name for name in product.all_input_nodes if name in self._values]
        names = [name for name in names if self._maps.joined([self._values[name]]) == value]
        if not any(multiplies(product, name, gate.nodes[-1]) for name in names):
            return False
        read = self._readable(source)
        if read is None:
            return False
        nodes = [*gate.nodes, product]
        inner = [*nodes, *self._passed_on(product)]
        reader = only_reader(inner[-1])
        conv = None if reader is None else self._module(reader)
        if not is_plain_pointwise(conv) or conv.in_channels != read.channels:
            element = Gate(gate.products, self._modules_of(nodes))
            self._add_step(lambda frozen: element, nodes, read, read.channels, joins=False)
            return True
        project, nodes = self._read_convolution([reader], conv, NO_PADS, NO_PADS)
        element = GatedConvolution(gate.products, project, self._modules_of(inner))
        self._add_step(lambda frozen: element, [*inner, *nodes], read, conv.out_channels)
        return True

    def _take_head(self, source: fx.Node) -> bool:
        """The mean of each map, and products of these, which end a chain."""
        head = head_behind(source, channels_of(self._values[source]), self._modules)
        read = None if head is None else self._readable(source)
        if read is None:
            return False
        classifier = Classifier(head.products, head.is_map, self._modules_of(head.nodes))
        self._add_step(lambda frozen: classifier, head.nodes, read, head.products[-1].layer.weight.shape[0])
        del self._values[head.nodes[-1]]
        return True

    def _take_convolution(self, nodes: list[fx.Node], conv: nn.Conv2d, pads: Pads | str) -> bool:
        own = own_pads(conv)
        if own is None or ("same" in (pads, own) and NO_PADS not in (pads, own)):
            return False
        read = self._input_for(input_of(nodes[0]), conv.in_channels)
        if read is None:
            return False
        element, nodes = self._read_convolution(nodes, conv, pads, own)
        self._add_convolution(element, nodes, read)
        return True

    def _add_convolution(self, element: Convolution, nodes: list[fx.Node], read: Part) -> None:
        """``element``, in two steps if it is a depthwise convolution with two filters for each channel."""
        self._reads_images |= not self.steps and element.reads_images
        if not is_doubling_layer(element.conv):
            self._add_step(lambda frozen: element, nodes, read, element.out_channels)
            return
        halves = []
        for first in (0, 1):
            half = element.with_filters(read.channels, range(first, element.out_channels, 2))
            halves.append(self._add_step(lambda frozen, half=half: half, [], read, half.out_channels))
        self._combine(*halves, nodes, interleaved=True)

    def _read_convolution(
        self, nodes: list[fx.Node], conv: nn.Conv2d, pads: Pads | str, own: Pads | str
    ) -> tuple[Convolution, list[fx.Node]]:
        """``conv`` at the end of ``nodes``, with a BN and an activation behind it, and all nodes."""
        tail = tail_behind(nodes, self._modules, conv.out_channels)
        element = Convolution(conv, tail.bn, tail.activation, self._modules_of(tail.nodes), pads, own, tail.carried)
        return element, tail.nodes


def own_pads(conv: nn.Conv2d) -> Pads | Literal["same"] | None:
    """The zeros that ``conv`` puts around its map; ``None`` if its forward is no convolution of a padded map."""
    if is_plain_convolution(conv):
        return convolution_pads(conv)
    if is_patched_convolution(conv):
        return None
    try:
        return read_padding(conv, gradients=False)  # chains have none
    except PaddingUnknown:
        return None


def _may_pad(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether to look behind ``node`` for a convolution whose map it pads."""
    if module is not None:
        return type(module).forward is nn.ConstantPad2d.forward
    return node.target in (F.pad, torch.constant_pad_nd, pad_map)
