# SPDX-License-Identifier: BSD-3-Clause
"""Which nodes of a graph form a chain: layers, and what becomes of their maps until the next one reads them."""

from __future__ import annotations

import torch.nn as nn
from torch import fx

from .._chain import INPUT, Link, Part
from .._chain_elements import Element
from .flow import Frozen, Step
from .heads import rank_of_pooled
from .layers import Layers
from .maps import Maps
from .program import FusedSite
from .sites import input_of


class Run(Layers):
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
    def is_lone_site(self) -> bool:
        """Whether it is a site and nothing else, which is one operation without a chain."""
        return len(self.steps) == 1 and bool(self.site_keys)

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
            Link(numbered(step.input), numbered(part), numbered(step.residual), step.activation, step.multiplies)
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
        if self._take_view(node) or self._take_combination(node) or self._take_factors(node):
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
