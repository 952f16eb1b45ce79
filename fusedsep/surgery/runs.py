# SPDX-License-Identifier: BSD-3-Clause
"""Which nodes of a graph form a chain: layers that each read what the one before gives, and additions of such maps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._chain_elements import Classifier, Convolution, Element, FrozenSite, GatedConvolution, Site
from .._compat import is_patched_convolution, is_plain_convolution
from .._frozen import FrozenSeparable
from .._padding import NO_PADS, Pads, convolution_pads, pad_map, sum_of_pads
from .activations import multiplies
from .analysis import is_block
from .convolutions import PaddingUnknown, read_padding
from .dropouts import call_passes_on, passes_on
from .gates import gate_behind
from .heads import head_behind
from .program import FusedSite
from .sites import input_of, is_depthwise_map, is_plain_pointwise, is_whole_convolution, zero_pads
from .tails import only_reader, tail_behind

_ADD = {operator.add, torch.add, "add"}
_ADD_IN_PLACE = {operator.iadd, "add_"}

#: What became of the sites of a frozen model, by depthwise convolution or block; ``None`` in a model that is fused.
Frozen = dict[nn.Module, FrozenSeparable] | None
#: Makes an element.
Maker = Callable[[Frozen], Element]


class Step(NamedTuple):
    """One element of a run.

    Attributes:
        make: makes it.
        nodes: what it covers; the last one gives its map.
        names: the nodes that hand that map on as it is.
        site: what stands for it in a dictionary of frozen sites, if it is one.
        residual: the number of the map that is added to its own, or -1.
        is_depthwise: whether it is a depthwise convolution by itself.
    """

    make: Maker
    nodes: list[fx.Node]
    names: list[fx.Node]
    site: nn.Module | None = None
    residual: int = -1
    is_depthwise: bool = False


class Run:
    """The longest chain from ``start`` on; it may have no steps.

    Map 0 is what the first step reads, map i what step i - 1 gives. All but these two are read by nobody else.
    """

    def __init__(self, start: fx.Node, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self.steps: list[Step] = []
        self._numbers: dict[fx.Node, int] = {}  # of maps, by each of their names
        self._reads_images = False
        source = input_of(start)
        if source is None or not self._take_layer(start, source):
            return
        self._numbers[source] = 0
        closed: list[Step] = []
        while True:
            if self._is_closed():
                closed = list(self.steps)
            if not self._extend():
                break
        self.steps = closed

    @property
    def is_worthwhile(self) -> bool:
        """Whether it has a site, or a depthwise convolution among other layers."""
        return bool(self.site_keys) or (len(self.steps) > 1 and any(step.is_depthwise for step in self.steps))

    @property
    def nodes(self) -> list[fx.Node]:
        """All that it covers, in their order."""
        inner = [name for step in self.steps[:-1] for name in step.names]
        return sorted([*inner, *(node for step in self.steps for node in step.nodes)])

    @property
    def last(self) -> fx.Node:
        """The node that gives its output."""
        return self.steps[-1].nodes[-1]

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
        for step, element in zip(self.steps[:-1], elements, strict=False):
            element.modules = [*element.modules, *self._modules_of(step.names)]
        return elements

    def _is_closed(self) -> bool:
        """Whether nobody else reads its inner maps, or may change its input before that is added to another map."""
        nodes = self.nodes
        covered = set(nodes)
        if any(not covered.issuperset(node.users) for node in covered if node is not self.last):
            return False
        if not any(step.residual == 0 for step in self.steps):
            return True
        node = nodes[0]
        while node is not nodes[-1]:
            node = node.next
            if node not in covered and node.op != "get_attr":
                return False
        return True

    def _extend(self) -> bool:
        """Take the next step, or an addition to the last one, if there is one."""
        step = self.steps[-1]
        names = [step.nodes[-1], *step.names]
        for reader in sorted({reader for name in names for reader in name.users if reader not in step.names}):
            source = input_of(reader)
            if source is not None and (self._take_addition(reader) or self._take_layer(reader, source)):
                return True
        if self._take_gate(names):
            return True
        head = head_behind(names[-1], self._channels, self._modules)
        if head is None:
            return False
        classifier = Classifier(head.products, head.is_map, self._modules_of(head.nodes))
        return self._take(lambda frozen: classifier, head.nodes, 0)

    def _take(
        self,
        make: Maker,
        nodes: list[fx.Node],
        channels: int,
        site: nn.Module | None = None,
        is_depthwise: bool = False,
    ) -> bool:
        self._channels = channels
        names = self._name([nodes[-1]])
        self.steps.append(Step(make, nodes, names, site, is_depthwise=is_depthwise))
        self._number(len(self.steps), nodes[-1], names)
        return True

    def _name(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """The nodes that hand on what ``nodes`` give."""
        names: list[fx.Node] = []
        for node in nodes:
            names += [reader for reader in node.users if reader.all_input_nodes == [node] and self._passes_on(reader)]
        return [*names, *self._name(names)] if names else []

    def _number(self, number: int, node: fx.Node, names: list[fx.Node]) -> None:
        self._numbers.update(dict.fromkeys([node, *names], number))

    def _passes_on(self, node: fx.Node) -> bool:
        module = self._module(node)
        return call_passes_on(node) if module is None else passes_on(module)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _modules_of(self, nodes: list[fx.Node]) -> list[nn.Module]:
        return modules_of(nodes, self._modules)

    def _take_addition(self, node: fx.Node) -> bool:
        """``a + b`` of the last map and an earlier one, which becomes the last map."""
        in_place = node.target in _ADD_IN_PLACE
        step, own = self.steps[-1], len(self.steps)
        if not (in_place or node.target in _ADD) or node.kwargs or len(node.args) != 2 or step.residual >= 0:
            return False
        numbers = [self._numbers.get(argument, -1) if isinstance(argument, fx.Node) else -1 for argument in node.args]
        other = min(numbers)
        # An input that is changed is not ours to keep, and one that is read as NCHW has no map to add.
        if max(numbers) != own or other in (-1, own) or (other == 0 and (self._reads_images or in_place)):
            return False
        names = self._name([node])
        self.steps[-1] = step._replace(nodes=[*step.nodes, *step.names, node], names=names, residual=other)
        self._number(own, node, names)
        return True

    def _take_layer(self, node: fx.Node, source: fx.Node) -> bool:
        """A site, or a convolution, with what follows it."""
        target, module = node.target, self._module(node)
        if node.all_input_nodes != [source]:
            return False
        if not isinstance(target, FusedSite) and (module is None or not is_block(module)):
            fits = is_plain_pointwise(module) or is_depthwise_map(module)
            return self._take_convolution([node], module, NO_PADS) if fits else self._take_whole_convolution(node)
        if isinstance(target, FusedSite):
            site, key, separable, modules = target, target.dw, target.separable, target.modules
        else:
            parts = [part for part in (module.dw, module.bn1, module.pw, module.bn2) if part is not None]
            site, key, separable, modules = module, module, module._separable, [module, *parts]

        def make(frozen: Frozen) -> Element:
            if frozen is None:
                return Site(separable, site, (site.dw, site.bn1, site.pw, site.bn2), modules)
            return FrozenSite(frozen[key], [frozen[key]])

        return self._take(make, [node], site.pw.out_channels, key)

    def _take_whole_convolution(self, node: fx.Node) -> bool:
        """A 3x3 convolution of few channels, behind nodes that put zeros around its map."""
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

    def _take_gate(self, names: list[fx.Node]) -> bool:
        """Squeeze-and-excitation of the last map, which goes by ``names``, and the 1x1 convolution behind it."""
        readers = sorted({reader for name in names for reader in name.users if reader not in names})
        if len(readers) != 2:
            return False
        for pool, product in (readers, readers[::-1]):
            gate = gate_behind(pool, self._channels, self._modules)
            if gate is not None and list(gate.nodes[-1].users) == [product]:
                break
        else:
            return False
        if not any(multiplies(product, name, gate.nodes[-1]) for name in names):
            return False
        inner = [*gate.nodes, *sorted([product, *self._name([product])])]
        reader = only_reader(inner[-1])
        conv = None if reader is None else self._module(reader)
        if not is_plain_pointwise(conv) or conv.in_channels != self._channels:
            return False
        project, nodes = self._read_convolution([reader], conv, NO_PADS, NO_PADS)
        element = GatedConvolution(
            gate.reduce, gate.activation, gate.expand, gate.gate_activation, project, self._modules_of(inner)
        )
        return self._take(lambda frozen: element, [*inner, *nodes], conv.out_channels)

    def _take_convolution(self, nodes: list[fx.Node], conv: nn.Conv2d, pads: Pads | str) -> bool:
        own = own_pads(conv)
        if own is None or ("same" in (pads, own) and NO_PADS not in (pads, own)):
            return False
        element, nodes = self._read_convolution(nodes, conv, pads, own)
        self._reads_images |= not self.steps and element.reads_images
        return self._take(lambda frozen: element, nodes, conv.out_channels, is_depthwise=element.is_depthwise)

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


def modules_of(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The modules that ``nodes`` call, with those inside them."""
    return [
        part
        for node in nodes
        if node.op == "call_module"
        for name, part in modules[node.target].named_modules()
        if not name.startswith("parametrizations")
    ]


def _may_pad(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether to look behind ``node`` for a convolution whose map it pads."""
    if module is not None:
        return type(module).forward is nn.ConstantPad2d.forward
    return node.target in (F.pad, torch.constant_pad_nd, pad_map)
