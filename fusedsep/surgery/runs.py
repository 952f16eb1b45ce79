# SPDX-License-Identifier: BSD-3-Clause
"""Which nodes of a graph form a chain: layers, and what becomes of their maps until the next one reads them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._chain import INPUT, Link, Part
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
from .flow import Flow, Frozen, Step
from .gates import gate_behind
from .heads import head_behind, rank_of_pooled
from .layer_kinds import (
    is_depthwise_layer,
    is_grouped_layer,
    is_plain_pointwise,
    is_pointwise_layer,
    is_whole_convolution,
)
from .linears import factors_of, section_from
from .maps import Maps, channels_of
from .program import FusedSite
from .resizing import doubles_the_map, max_pool_window
from .sites import input_of, zero_pads
from .tails import only_reader, tail_behind


class Run(Flow):
    """The longest chain from ``start`` on; it may have no steps.

    Nodes that only take channels of maps, or put maps side by side, are no steps: what is read and written says where
    those lie. Nobody else reads a map inside.

    Args:
        start: the first node that it covers.
        others: nodes that are not its own.
    """

    def __init__(self, start: fx.Node, modules: dict[str, nn.Module], others: set[fx.Node]) -> None:
        super().__init__(modules)
        source = input_of(start)
        if source is None or not (self._take_branches(start, source) or self._take_layer(start, source)):
            self.steps = []
            return
        closed, work = self._closed() or ([], self._maps, [], []), self._work
        node = start.next
        while node.op != "root":
            read = [] if node in self._nodes else [each for each in node.all_input_nodes if self._is_known(each)]
            if read and (node in others or not self._take(node)):
                if any(part.map != INPUT for each in read for part in self._all_parts(each)):
                    break
            elif read and self._work > work and (ended := self._closed()) is not None:
                closed, work = ended, self._work
            node = node.next
        self.steps, self._maps, self._nodes, self._views = closed

    @property
    def is_worthwhile(self) -> bool:
        """Whether it has a site, or a depthwise convolution among other layers."""
        return bool(self.site_keys) or (len(self.steps) > 1 and any(step.is_depthwise for step in self.steps))

    @property
    def nodes(self) -> list[fx.Node]:
        """All that it covers, in their order; the last one gives its output."""
        return self._nodes

    @property
    def site_calls(self) -> list[fx.Node]:
        """The calls that stand for several modules each."""
        return [node for node in self.nodes if isinstance(node.target, FusedSite)]

    @property
    def site_keys(self) -> set[nn.Module]:
        """What stands for its sites in a dictionary of frozen ones."""
        return {step.site for step in self.steps if step.site is not None}

    def elements(self, frozen: Frozen) -> list[Element]:
        """What it consists of."""
        elements = [step.make(frozen) for step in self.steps]
        activations = [node for node in self._activations if node in set(self._nodes)]
        elements[0].modules = [*elements[0].modules, *self._modules_of([*self._views, *activations])]
        return elements

    def links(self) -> list[Link]:
        """What each of its elements reads and writes."""
        written = [self._maps.found(self._own(number)) for number in range(1, len(self.steps) + 1)]
        owners = {INPUT: INPUT}  # the first element that writes a map
        for number, part in enumerate(written, 1):
            owners.setdefault(part.map, number)

        def numbered(part: Part | None) -> Part | None:
            if part is None:
                return None
            found = self._maps.found(part)
            return found._replace(map=owners[found.map])

        return [
            Link(numbered(step.input), numbered(part), numbered(step.residual), step.activation)
            for step, part in zip(self.steps, written, strict=True)
        ]

    def _closed(self) -> tuple[list[Step], Maps, list[fx.Node], list[fx.Node]] | None:
        """Its steps, maps, nodes and views if it may end here.

        Nobody else reads its inner maps, its last node gives all of a map, and nobody changes its input before that is
        read again.
        """
        last = self._nodes[-1]
        if last in self._sections:
            return None
        own = set(self._nodes)
        # Views of the input may have other readers: they stay where they are.
        views = [node for node in self._views if all(part.map == INPUT for part in self._all_parts(node))]
        left: set[fx.Node] = set()
        for node in reversed(views):
            if not (own - left).issuperset(node.users):
                left.add(node)
        own -= left
        if any(not own.issuperset(node.users) for node in own if node is not last):
            return None
        steps, maps = list(self.steps), self._maps
        self._maps = maps.copy()
        output = self._gathered(self._values[last]) if last in self._values else self._own(len(steps))
        is_last = output is not None and self._maps.found(self._own(len(self.steps))).map == output.map
        ended, self.steps, self._maps = (list(self.steps), self._maps), steps, maps
        nodes = sorted(own)
        if not is_last or not ended[1].is_whole(output) or nodes[-1] is not last:
            return None
        if not self._is_kept(own | left, ended[0]):
            return None
        return (*ended, nodes, [node for node in self._views if node in own])

    def _is_kept(self, known: set[fx.Node], steps: list[Step]) -> bool:
        """Whether nobody may change the input between the first and the last read of it."""
        read = [part for step in steps for part in (step.input, step.residual) if part is not None]
        if sum(self._maps.found(part).map == INPUT for part in read) < 2:
            return True
        nodes = sorted(known)
        node = nodes[0]
        while node is not nodes[-1]:
            node = node.next
            if node not in known and node.op != "get_attr":
                return False
        return True

    def _take(self, node: fx.Node) -> bool:
        """Take ``node``, which reads maps, and what belongs to it."""
        if self._take_view(node) or self._take_addition(node) or self._take_factors(node):
            return True
        source = input_of(node)
        if source not in self._values:
            return False
        if self._take_norm(node, source) or self._take_activation(node, source):
            return True
        if self._take_branches(node, source) or self._take_layer(node, source):
            return True
        if self._take_linears(node, source) or self._take_shuffle(node, source):
            return True
        if self._take_pool(node, source) or self._take_upsampling(node, source):
            return True
        return rank_of_pooled(node, self._modules) is not None and (
            self._take_gate(node, source) or self._take_head(source)
        )

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
        element = SumOfBranches(found.terms, conv, tail.bn, tail.activation, modules, NO_PADS, own, tail.carried)
        self._reads_images |= not self.steps and element.reads_images
        self._add_step(lambda frozen: element, tail.nodes, read, conv.out_channels, is_depthwise=element.is_depthwise)
        return True

    def _take_layer(self, node: fx.Node, source: fx.Node) -> bool:
        """A site, or a convolution, with what follows it."""
        target, module = node.target, self._module(node)
        if node.all_input_nodes != [source]:
            return False
        if not isinstance(target, FusedSite) and (module is None or not is_block(module)):
            if is_pointwise_layer(module) or is_depthwise_layer(module):
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
        elements = [
            Convolution(conv, tail.bn, tail.activation, modules, NO_PADS, own, tail.carried, group)
            for group in range(conv.groups)
        ]
        parts = []
        for group, element in enumerate(elements):
            channels = element.in_channels
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
        """Factors of the channels that a 1x1 convolution or a linear layer gives, and nobody else reads."""
        for source in node.all_input_nodes:
            value = self._maps.joined([self._values[source]]) if source in self._values else ()
            part = value[0] if len(value) == 1 and value[0].map >= 1 and self._maps.is_whole(value[0]) else None
            factors = None if part is None else factors_of(node, source, part.channels, self._modules)
            if factors is None:
                continue
            step = self.steps[part.map - 1]
            layer = None if step.site is not None else _unscaled(step.make(None))
            nodes = [*factors.constants[:-1], node]
            if layer is None or step.residual is not None or step.activation != "none" or nodes[0] < self._nodes[0]:
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
        self._add_step(lambda frozen: pool, [node], read, read.channels, adds=False, activates=False)
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
            self._add_step(lambda frozen: element, nodes, read, read.channels, adds=False)
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
        self._reads_images |= not self.steps and element.reads_images
        self._add_step(lambda frozen: element, nodes, read, conv.out_channels, is_depthwise=element.is_depthwise)
        return True

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


def _unscaled(element: Element) -> ChannelLinear | None:
    """``element`` as a linear layer that may have factors, if it is one, or a 1x1 convolution and nothing else."""
    if isinstance(element, ChannelLinear):
        return element if element.activation == "none" and element.scale is None else None
    is_alone = type(element) is Convolution and element.bn is None and element.activation == "none"
    if not is_alone or not is_plain_pointwise(element.conv):
        return None
    return ChannelLinear(element.conv, None, "none", None, element.modules)


def _may_pad(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether to look behind ``node`` for a convolution whose map it pads."""
    if module is not None:
        return type(module).forward is nn.ConstantPad2d.forward
    return node.target in (F.pad, torch.constant_pad_nd, pad_map)
