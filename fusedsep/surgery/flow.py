# SPDX-License-Identifier: BSD-3-Clause
"""What the nodes of a graph give, in terms of the maps that the steps of a chain write."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch.nn as nn
from torch import fx

from .._chain import INPUT, Part
from .._chain_elements import Element
from .._combinations import Combination
from .._frozen import FrozenSeparable
from .activations import MULTIPLY, MULTIPLY_IN_PLACE, activation_of, composed_activation, gate_of, is_in_place
from .branches import ADD, ADD_IN_PLACE
from .dropouts import node_passes_on
from .maps import Maps, Value, channels_of, cut
from .tails import only_reader
from .views import joined_by, sections_of, shuffle_of, slice_of

#: What became of the sites of a frozen model, by depthwise convolution or block; ``None`` in a model that is fused.
Frozen = dict[nn.Module, FrozenSeparable] | None
#: Makes an element.
Maker = Callable[[Frozen], Element]


class Step(NamedTuple):
    """One element of a run.

    Attributes:
        make: makes it.
        nodes: what it covers; the last one gives its map.
        channels: of its map.
        input: what it reads.
        residual: what is added to its map, or combined with it.
        site: what stands for it in a dictionary of frozen sites, if it is one.
        joins: whether a sum with another map may become a part of it; a product too, if it ``activates``.
        activation: name of what is applied to the sum, or to its map where nothing is added.
        activates: whether it may have such.
        multiplies: whether ``residual`` is not added, but multiplied.
    """

    make: Maker
    nodes: list[fx.Node]
    channels: int
    input: Part
    residual: Part | None = None
    site: nn.Module | None = None
    joins: bool = True
    activation: str = "none"
    activates: bool = True
    multiplies: bool = False


class Flow:
    """Steps, and the nodes that only take channels of their maps, put maps side by side, add or shuffle them."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self.steps: list[Step] = []
        self._maps = Maps()
        self._values: dict[fx.Node, Value] = {}
        self._sections: dict[fx.Node, list[Value]] = {}  # what a node gives that cuts a map into several
        self._nodes: list[fx.Node] = []
        self._views: list[fx.Node] = []  # those of its nodes that belong to no step
        self._activations: list[fx.Node] = []  # nodes that became the activation of a step
        self._reads_images = False  # as they lie in NCHW, which nobody else can
        self._work = 0  # steps and additions

    def _is_known(self, node: fx.Node) -> bool:
        return node in self._values or node in self._sections

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _modules_of(self, nodes: list[fx.Node]) -> list[nn.Module]:
        """The modules that ``nodes`` call, with those inside them."""
        called = [self._modules[node.target] for node in nodes if node.op == "call_module"]
        return [
            part
            for module in called
            for name, part in module.named_modules()
            if not name.startswith("parametrizations")
        ]

    def _passed_on(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that hand on what ``node`` gives, one after the other."""
        names: list[fx.Node] = []
        while (reader := only_reader(node)) is not None and node_passes_on(reader, self._modules):
            names.append(reader)
            node = reader
        return names

    def _own(self, number: int) -> Part:
        """The map of a step, as that step wrote it."""
        return Part(number, 0, self.steps[number - 1].channels)

    def _all_parts(self, node: fx.Node) -> list[Part]:
        """What ``node`` gives."""
        values = self._sections[node] if node in self._sections else [self._values[node]]
        return [self._maps.found(part) for value in values for part in value]

    def _add_step(
        self,
        make: Maker,
        nodes: list[fx.Node],
        read: Part,
        channels: int,
        residual: Part | None = None,
        **kinds: Any,
    ) -> Part:
        self.steps.append(Step(make, nodes, channels, read, residual, **kinds))
        own = self._maps.add(len(self.steps), channels)
        self._work += 1
        self._nodes += nodes
        if nodes:
            self._values[nodes[-1]] = (own,)
        return own

    def _combine(self, a: Part, b: Part | None, nodes: list[fx.Node], interleaved: bool = False, **kinds: Any) -> Part:
        """A step that makes one map of two, or copies one."""
        element = Combination(a.channels, interleaved)
        kinds = {"joins": False, "activates": not interleaved, **kinds}
        return self._add_step(lambda frozen: element, nodes, a, element.out_channels, b, **kinds)

    def _gathered(self, value: Value) -> Part | None:
        """``value`` as channels of one map: written there, or copied where it is read elsewhere too."""
        parts = self._maps.joined([value])
        if len(parts) == 1:
            return parts[0]
        if self._reads_images and any(part.map == INPUT for part in parts):
            return None
        placed: list[Part] = []
        for part in parts:
            free = self._maps.is_whole(part) and part not in placed
            placed.append(part if free else self._combine(part, None, []))
        return self._maps.place(tuple(placed))

    def _readable(self, node: fx.Node) -> Part | None:
        """What ``node`` gives, as channels of one map that a layer may read."""
        part = self._gathered(self._values[node])
        return None if part is None or (self._reads_images and part.map == INPUT) else part

    def _take_view(self, node: fx.Node) -> bool:
        """Channels of maps, or maps side by side; or one that is handed on as it is."""
        value: Value | None = None
        joined = joined_by(node)
        if joined is not None:
            if all(each in self._values for each in joined):
                value = self._maps.joined(self._values[each] for each in joined)
        elif len(node.all_input_nodes) == 1:
            source = node.all_input_nodes[0]
            if source in self._sections:
                values = self._sections[source]
                if node.target is operator.getitem and isinstance(node.args[1], int) and node.args[1] < len(values):
                    value = values[node.args[1]]
            else:
                value = self._view_of(node, self._values[source])
        if value is None and node not in self._sections:
            return False
        if value is not None:
            self._values[node] = value
        self._nodes.append(node)
        self._views.append(node)
        return True

    def _view_of(self, node: fx.Node, whole: Value) -> Value | None:
        sections = sections_of(node, channels_of(whole))
        if sections is not None:
            whole = self._uncut(whole, [end for _, end in sections])
            self._sections[node] = [cut(whole, *section) for section in sections]
            return None
        sliced = slice_of(node, channels_of(whole))
        if sliced is not None:
            return cut(self._uncut(whole, sliced), *sliced)
        return whole if node_passes_on(node, self._modules) else None

    def _uncut(self, value: Value, ends: Iterable[int]) -> Value:
        """``value``, as one map if one of ``ends`` would cut a part of it, and nothing has to be copied for that."""
        value = self._maps.joined([value])
        bounds = list(itertools.accumulate(part.channels for part in value))
        is_free = len(set(value)) == len(value) > 1 and all(map(self._maps.is_whole, value))
        if not is_free or {0, *bounds}.issuperset(ends):
            return value
        return (self._maps.place(value),)

    def _take_combination(self, node: fx.Node) -> bool:
        """``a + b`` or ``a * b`` of two maps: of the step that gives the later one, if nobody else reads that."""
        in_place, multiplies = node.target in ADD_IN_PLACE | MULTIPLY_IN_PLACE, node.target in MULTIPLY
        if not (multiplies or node.target in ADD | ADD_IN_PLACE) or node.kwargs or len(node.args) != 2:
            return False
        if not all(isinstance(argument, fx.Node) and argument in self._values for argument in node.args):
            return False
        if in_place and not self._may_change(node.args[0], node):
            return False
        maps = [self._readable(argument) for argument in node.args]
        if None in maps or maps[0].channels != maps[1].channels:
            return False
        for own, other in sorted((maps, maps[::-1]), key=lambda pair: -pair[0].map):
            if self._fold(own, other, node, multiplies):
                return True
        self._combine(maps[0], maps[1], [node], multiplies=multiplies)
        return True

    def _fold(self, own: Part, other: Part, node: fx.Node, multiplies: bool) -> bool:
        """Make the sum or product ``node`` a part of the step that writes ``own``."""
        number = own.map
        if number < 1 or not self._maps.is_whole(own) or not self._is_there_before(other, number):
            return False
        step = self.steps[number - 1]
        if not (step.joins and (step.activates or not multiplies)) or not self._is_read_by(own, [node]):
            return False
        if step.residual is not None or step.activation != "none":
            return False
        self.steps[number - 1] = step._replace(residual=other, multiplies=multiplies)
        self._work += 1
        self._nodes.append(node)
        self._views.append(node)
        self._values[node] = (own,)  # as the names do, which nobody reads any more
        return True

    def _is_read_by(self, part: Part, nodes: list[fx.Node]) -> bool:
        """Whether nobody but ``nodes``, and what passes it on, reads the map of ``part``."""
        joined = self._maps.joined
        names = [name for name, value in self._values.items() if any(each.map == part.map for each in joined([value]))]
        return not any(set(name.users) - {*names, *nodes} for name in names)

    def _take_activation(self, node: fx.Node, source: fx.Node) -> bool:
        """An activation: of the step that gives the map, if nobody else reads that, or a step of its own."""
        module = self._module(node)
        if module is not None and "forward" in vars(module):
            return False
        nodes, name = composed_activation(source, self._modules) or ([node], None)
        name = name or activation_of(node, self._modules) or gate_of(node, self._modules)
        if name is None or node not in nodes or node.all_input_nodes != [source]:
            return False
        if is_in_place(node, self._modules) and not self._may_change(source, node):
            return False
        value = self._maps.joined([self._values[source]])
        if self._reads_images and any(part.map == INPUT for part in value):
            return False
        activated = {part: self._activated(part, name, nodes, value) for part in dict.fromkeys(value)}
        value = tuple(activated[part] for part in value)
        self._nodes += nodes
        self._activations += nodes
        self._values[nodes[-1]] = value
        return True

    def _activated(self, part: Part, name: str, nodes: list[fx.Node], value: Value) -> Part:
        """An activation of ``part``, which is one of those of ``value``."""
        step = self.steps[part.map - 1] if part.map >= 1 and self._maps.is_whole(part) else None
        is_alone = all(other == part or other.map != part.map for other in value)
        if step is None or not step.activates or step.activation != "none" or not is_alone:
            return self._combine(part, None, [], activation=name)
        if not self._is_read_by(part, nodes):
            return self._combine(part, None, [], activation=name)
        self.steps[part.map - 1] = step._replace(activation=name)
        self._work += 1
        return part

    def _is_there_before(self, part: Part, number: int) -> bool:
        """Whether ``part`` is written before step ``number`` runs."""
        writers = [i for i in range(1, len(self.steps) + 1) if self._maps.found(self._own(i)).map == part.map]
        return all(writer < number for writer in writers)

    def _may_change(self, written: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` may write to the memory of what ``written`` gives: nobody reads that map afterwards."""
        changed = {part.map for part in self._all_parts(written)}
        if INPUT in changed:
            return False
        names = [*self._values, *self._sections]
        names = [name for name in names if any(part.map in changed for part in self._all_parts(name))]
        return all(user <= node for name in names for user in name.users)

    def _take_shuffle(self, node: fx.Node, source: fx.Node) -> bool:
        """A channel shuffle of two groups, however it is written."""
        value = self._maps.joined([self._values[source]])
        channels = channels_of(value)
        names = {name for name, each in self._values.items() if self._maps.joined([each]) == value}
        nodes = shuffle_of(node, names, channels, self._modules)
        if nodes is None:
            return False
        half = channels // 2
        a, b = (self._gathered(cut(value, *ends)) for ends in ((0, half), (half, channels)))
        if a is None or b is None or (self._reads_images and INPUT in (a.map, b.map)):
            return False
        self._combine(a, b, nodes, interleaved=True)
        return True
