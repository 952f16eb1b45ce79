# SPDX-License-Identifier: BSD-3-Clause
"""Which nodes of a graph form a chain: layers that each read what the one before gives, and nobody else does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .._chain_elements import Classifier, Element, FirstConvolution, FrozenSite, Site
from .._compat import is_plain_convolution
from .._frozen import FrozenSeparable
from .._structure import why_not_pointwise
from .activations import activation_of_function, activation_of_module, arguments_of
from .analysis import is_block
from .batch_norms import is_plain_batch_norm
from .dropouts import call_passes_on, passes_on
from .program import FusedSite
from .sites import input_of

#: A convolution of more channels has more patches than output; torch's own is the better one.
_MOST_CHANNELS = 8
_MEANS = {torch.mean, "mean"}
_FLATTEN = {torch.flatten, "flatten"}
_BOTH_DIRECTIONS = {(2, 3), (3, 2), (-2, -1), (-1, -2)}
_RESHAPE = {torch.reshape, "reshape", "view"}

#: What became of the sites of a frozen model, by depthwise convolution or block; ``None`` in a model that is fused.
Frozen = dict[nn.Module, FrozenSeparable] | None
#: Makes an element.
Maker = Callable[[Frozen], Element]


class Run:
    """The longest chain from ``start`` on: how to make its elements, and the nodes that they cover, in order."""

    def __init__(self, start: fx.Node, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self.makers: list[Maker] = []
        self.nodes: list[fx.Node] = []
        #: What stands for its sites in a dictionary of frozen ones.
        self.site_keys: set[nn.Module] = set()
        self._channels = 0  # of the last map
        if self._take_site([start]) or self._take_first_convolution(start):
            while self._take_site(path := self._path_from(self.nodes[-1])):
                pass
            self._take_classifier(path)

    def _take(self, make: Maker, nodes: list[fx.Node]) -> bool:
        self.makers.append(make)
        self.nodes += nodes
        return True

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _modules_of(self, nodes: list[fx.Node]) -> list[nn.Module]:
        return [module for node in nodes if (module := self._module(node)) is not None]

    def _path_from(self, node: fx.Node) -> list[fx.Node]:
        """The next node that does something with the map of ``node``, behind those that hand it on."""
        path: list[fx.Node] = []
        while (reader := _only_reader(node)) is not None:
            path.append(reader)
            module = self._module(reader)
            if not (call_passes_on(reader) if module is None else passes_on(module)):
                return path
            node = reader
        return []

    def _take_site(self, path: list[fx.Node]) -> bool:
        if not path:
            return False
        target, module = path[-1].target, self._module(path[-1])
        if not isinstance(target, FusedSite) and (module is None or not is_block(module)):
            return False
        if isinstance(target, FusedSite):
            site, key, separable, modules = target, target.dw, target.separable, target.modules
        else:
            parts = [part for part in (module.dw, module.bn1, module.pw, module.bn2) if part is not None]
            site, key, separable, modules = module, module, module._separable, [module, *parts]
        self.site_keys.add(key)
        self._channels = site.pw.out_channels
        handed_on = self._modules_of(path[:-1])

        def make(frozen: Frozen) -> Element:
            if frozen is None:
                return Site(separable, site, (site.dw, site.bn1, site.pw, site.bn2), [*handed_on, *modules])
            return FrozenSite(frozen[key], [*handed_on, frozen[key]])

        return self._take(make, path)

    def _take_first_convolution(self, node: fx.Node) -> bool:
        conv = self._module(node)
        if not isinstance(conv, nn.Conv2d) or not _is_first_convolution(conv) or input_of(node) is None:
            return False
        nodes, bn, activation = [node], None, "none"
        while activation == "none" and (reader := _only_reader(nodes[-1])) is not None:
            module = self._module(reader)
            if module is not None and "forward" in vars(module):
                break
            if bn is None and isinstance(module, nn.BatchNorm2d) and _is_fixed_norm(module):
                bn = module
            else:
                found = activation_of_function(reader) if module is None else activation_of_module(module)
                if found is None:
                    break
                activation = found
            nodes.append(reader)
        self._channels = conv.out_channels
        return self._take(_always(FirstConvolution(conv, bn, activation, self._modules_of(nodes))), nodes)

    def _take_classifier(self, path: list[fx.Node]) -> bool:
        """Global average pool, flatten and linear layer, or a 1x1 convolution in the place of the last two."""
        rank = None if not path else self._rank_of_pooled(path[-1])
        if rank is None:
            return False
        nodes = list(path)
        while True:
            flatten = self._flatten_of(nodes[-1]) if rank == 4 else None
            if flatten is not None:
                nodes += flatten
                rank = 2
                continue
            reader = _only_reader(nodes[-1])
            if reader is None:
                return False
            nodes.append(reader)
            module = self._module(reader)
            if call_passes_on(reader) if module is None else passes_on(module):
                continue
            if rank == 2:
                fits = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
            else:
                fits = _is_plain_pointwise(module)
            if not fits or "forward" in vars(module):
                return False
            return self._take(_always(Classifier(module, rank == 4, self._modules_of(nodes))), nodes)

    def _rank_of_pooled(self, node: fx.Node) -> int | None:
        """Dimensions of the output if ``node`` takes the mean of each map."""
        module = self._module(node)
        if module is not None:
            pools = type(module).forward is nn.AdaptiveAvgPool2d.forward and "forward" not in vars(module)
            return 4 if pools and module.output_size in (1, (1, 1)) else None
        if node.target is F.adaptive_avg_pool2d:
            return 4 if arguments_of(node, ("output_size",)).get("output_size") in (1, (1, 1), [1, 1]) else None
        if node.target in _MEANS:
            given = arguments_of(node, ("dim", "keepdim"))
            dim = given.pop("dim", None)
            keeps = given.pop("keepdim", False)
            if not given and isinstance(dim, (tuple, list)) and tuple(dim) in _BOTH_DIRECTIONS:
                return 4 if keeps is True else 2
        return None

    def _is_flatten(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            flattens = type(module).forward is nn.Flatten.forward and "forward" not in vars(module)
            return flattens and (module.start_dim, module.end_dim) == (1, -1)
        if node.target in _FLATTEN:
            given = arguments_of(node, ("start_dim", "end_dim"))
            return given.get("start_dim", 0) == 1 and given.get("end_dim", -1) == -1
        if node.target in _RESHAPE:
            return _shape_of(node) == (-1, self._channels)
        return False

    def _flatten_of(self, node: fx.Node) -> list[fx.Node] | None:
        """The nodes that make ``[N, C]`` of ``[N, C, 1, 1]``, if they are all that reads ``node``."""
        readers = list(node.users)
        if len(readers) == 1:
            return readers if _only_reader(node) is not None and self._is_flatten(readers[0]) else None
        if len(readers) != 2:
            return None
        size, reshape = sorted(readers)  # x.view(x.size(0), -1), x.reshape(x.shape[0], -1)
        sizes = [size]
        if (
            size.op == "call_function"
            and size.target is getattr
            and size.args[1:] == ("shape",)
            and len(size.users) == 1
        ):
            sizes.append(next(iter(size.users)))
            if sizes[-1].target is not operator.getitem or sizes[-1].args != (size, 0):
                return None
        elif size.target != "size" or size.args[1:] != (0,) or size.kwargs:
            return None
        if list(sizes[-1].users) != [reshape] or reshape.target not in _RESHAPE or reshape.kwargs:
            return None
        return [*sizes, reshape] if reshape.args[0] is node and _shape_of(reshape) == (sizes[-1], -1) else None


def _shape_of(reshape: fx.Node) -> tuple[Any, ...]:
    """What a ``view`` or ``reshape`` was given, as a sequence or one by one."""
    shape = reshape.args[1:]
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def _always(element: Element) -> Maker:
    return lambda frozen: element


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The node that reads ``node`` and no other one, if it is the only one that reads it."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or reader.op == "output" or reader.all_input_nodes != [node] or input_of(reader) is not node:
        return None
    return reader


def _is_first_convolution(conv: nn.Conv2d) -> bool:
    return (
        is_plain_convolution(conv)
        and tuple(conv.kernel_size) == (3, 3)
        and conv.groups == 1
        and conv.in_channels <= _MOST_CHANNELS
        and conv.stride[0] == conv.stride[1] <= 2
        and conv.dilation[0] == conv.dilation[1]
        and conv.padding_mode == "zeros"
    )


def _is_fixed_norm(bn: nn.BatchNorm2d) -> bool:
    return is_plain_batch_norm(bn) and bn.running_mean is not None and bn.running_var is not None and not bn.training


def _is_plain_pointwise(module: nn.Module | None) -> bool:
    return module is not None and why_not_pointwise(module) is None and is_plain_convolution(module)
