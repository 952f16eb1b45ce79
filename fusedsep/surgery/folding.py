# SPDX-License-Identifier: BSD-3-Clause
"""Folding the BNs of a frozen model's chains into the layers in front of them, in the model itself."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

import torch.nn as nn
from torch import fx

from .._chain_convolutions import Convolution, SumOfBranches
from .._chain_elements import Element
from .._chain_products import Classifier, Gate, GatedConvolution
from .._compat import has_hooks, is_plain_convolution
from .._fold import fold_tensors

#: What stays in the place of a BN that applies an activation itself.
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class Folding:
    """What becomes of the BNs of a model.

    Args:
        held_twice: modules that several others hold, which stay as they are.
    """

    def __init__(self, held_twice: set[nn.Module]) -> None:
        self._held_twice = held_twice
        self._replaced: dict[nn.Module, nn.Module] = {}  # BNs that are folded

    def fold(
        self,
        elements: list[Element],
        root: nn.Module,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        is_called_whole: bool,
    ) -> None:
        """Fold the BNs of ``elements`` where nothing else reads them or the layers in front of them.

        A layer gets the folded weight and bias, and the BN makes room for its activation, or for ``nn.Identity``.

        Args:
            graph: the forward of ``root``.
            modules: of ``root``, by name.
            is_called_whole: whether nobody calls parts of ``root``; otherwise only what was folded before counts.
        """
        calls = collections.Counter(modules[node.target] for node in graph.nodes if node.op == "call_module")
        read = {modules[node.target.rpartition(".")[0]] for node in graph.nodes if node.op == "get_attr"}

        def is_alone(module: nn.Module) -> bool:
            return (
                calls[module] == 1
                and module not in self._held_twice | read
                and not has_hooks(module)
                and "forward" not in vars(module)
                and not nn.utils.parametrize.is_parametrized(module)
            )

        replaced = self._replaced
        for layer, bn, activation in _pairs(elements) if is_called_whole else ():
            # A part of the model that has a forward of its own may have been here before.
            if bn not in replaced and activation in _ACTIVATIONS and is_alone(layer) and is_alone(bn):
                replaced[bn] = _fold(layer, bn, _ACTIVATIONS[activation])
        for parent in list(root.modules()):
            held = parent._modules
            held.update({name: replaced[child] for name, child in held.items() if child in replaced})
        modules.update({name: replaced[module] for name, module in modules.items() if module in replaced})
        for element in elements:
            element.modules = [replaced.get(module, module) for module in element.modules]
            for part in _convolutions(element):
                if part.bn in replaced:
                    part.bn, part.carried = None, False
                part.modules = [replaced.get(module, module) for module in part.modules]
                if isinstance(part, SumOfBranches):
                    part.branches = [each._replace(bn=None) if each.bn in replaced else each for each in part.branches]
            if isinstance(element, (Classifier, Gate)):
                element.products = [
                    product._replace(bn=None, carried=False) if product.bn in replaced else product
                    for product in element.products
                ]


def _pairs(elements: list[Element]) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """The layers with a BN behind them that may be folded, the BN, and the activation that it applies itself."""
    for element in elements:
        for part in _convolutions(element):
            if isinstance(part, SumOfBranches):
                pairs = [(branch.conv, branch.bn) for branch in part.branches]
                yield from ((conv, bn, "none") for conv, bn in pairs if conv is not None and bn is not None)
            elif (
                part.bn is not None
                and part.bn.num_features == part.conv.out_channels
                and is_plain_convolution(part.conv)
            ):
                yield part.conv, part.bn, part.activation if part.carried else "none"
        for product in element.products if isinstance(element, (Classifier, Gate)) else ():
            if product.bn is not None and isinstance(product.layer, nn.Conv2d) and is_plain_convolution(product.layer):
                yield product.layer, product.bn, product.activation if product.carried else "none"


def _convolutions(element: Element) -> Iterable[Convolution]:
    if isinstance(element, Convolution):
        return [element]
    return [element.project] if isinstance(element, GatedConvolution) else []


def _fold(conv: nn.Conv2d, bn: nn.Module, activation: type[nn.Module]) -> nn.Module:
    """Change ``conv``, and make what follows it instead of ``bn``."""
    weight, bias = fold_tensors(conv.weight, conv.bias, bn)
    conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return activation().train(bn.training)
