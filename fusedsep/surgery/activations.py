# SPDX-License-Identifier: BSD-3-Clause
"""Which activation a node of a graph computes, however it is written.

Names are those of :data:`fusedsep._activations.LAYER_ACTIVATION_CODES`; a site knows fewer.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

_MODULES = {nn.ReLU.forward: "relu", nn.Hardswish.forward: "hardswish", nn.SiLU.forward: "silu"}
_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
}
_GATE_MODULES = {nn.Sigmoid.forward: "sigmoid", nn.Hardsigmoid.forward: "hardsigmoid"}
_GATE_FUNCTIONS = {
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    F.hardsigmoid: "hardsigmoid",
}
_CLAMPS = {
    **dict.fromkeys((F.hardtanh, F.hardtanh_), ("min_val", "max_val")),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, torch.clip_), ("min", "max")),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), ("min", "max")),
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"), ("min",)),
}
_CLAMP_DEFAULTS = {"min_val": -1.0, "max_val": 1.0, "min": None, "max": None}
_ADD = {operator.add, torch.add, "add"}  # in place, it would change the map that is multiplied later
MULTIPLY_IN_PLACE = {operator.imul, "mul_"}
MULTIPLY = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"} | MULTIPLY_IN_PLACE
_DIVIDE = {operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_", "divide"}


def arguments_of(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call after its first, by name."""
    given = dict(zip(names, node.args[1:], strict=False))
    given.update({key: value for key, value in node.kwargs.items() if key != "input"})
    return given


def activation_of_module(module: nn.Module) -> str | None:
    """The name of the activation that ``module`` is, or ``None``."""
    forward = type(module).forward
    if forward in (nn.Hardtanh.forward, nn.ReLU6.forward):
        return _clamp_name(module.min_val, module.max_val)
    if forward is nn.GELU.forward:
        return "gelu" if module.approximate == "none" else None
    return _MODULES.get(forward)


def activation_of_function(node: fx.Node) -> str | None:
    """The name of the activation that a function or method call computes of its first argument, or ``None``."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _CLAMPS:
        names = _CLAMPS[node.target]
        given = arguments_of(node, names)
        bounds = [given.get(name, _CLAMP_DEFAULTS[name]) for name in names]
        return _clamp_name(bounds[0], bounds[1] if len(bounds) > 1 else None)
    if node.target is F.gelu:
        return "gelu" if arguments_of(node, ()).get("approximate", "none") == "none" else None
    return _FUNCTIONS.get(node.target)


def _clamp_name(low: Any, high: Any) -> str | None:
    if not _is_number(low, 0.0):
        return None
    if high is None:
        return "relu"
    return "relu6" if _is_number(high, 6.0) else None


def _is_number(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and abs(value - wanted) < 1e-7


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an activation may write to its argument."""
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name.endswith("_") or any(given is True for given in (*node.args, *node.kwargs.values()))


def gate_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of what ``node`` computes of its first argument if it ends in numbers from 0 to 1, or ``None``."""
    if node.op == "call_module":
        return _GATE_MODULES.get(type(modules[node.target]).forward)
    return _GATE_FUNCTIONS.get(node.target)


def composed_hardsigmoid(x: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node] | None:
    """The nodes that spell out ``relu6(x + 3) / 6``, the last one being the result; ``None`` if they do not."""
    nodes = [x]
    for fits in (
        lambda node, source: _scales(node, _ADD | {operator.iadd, "add_"}, source, 3.0),
        lambda node, source: activation_of(node, modules) == "relu6",
        _is_sixth,
    ):
        node = _only_user(nodes[-1])
        if node is None or not fits(node, nodes[-1]):
            return None
        nodes.append(node)
    return nodes[1:]


def composed_activation(x: fx.Node, modules: dict[str, nn.Module]) -> tuple[list[fx.Node], str] | None:
    """The nodes that spell out an activation of ``x`` that reads it twice, and its name; ``None`` if they do not."""
    nodes = composed_hardswish(x, modules)
    if nodes is not None:
        return nodes, "hardswish"
    for gate in x.users if len(x.users) == 2 else ():  # x * sigmoid(x)
        product = _only_user(gate)
        if gate_of(gate, modules) == "sigmoid" and product is not None and _combines(product, MULTIPLY, x, gate):
            return None if gate.target in (torch.sigmoid_, "sigmoid_") else ([gate, product], "silu")
    return None


def multiplies(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    """Whether ``node`` is the product of the two, and leaves both as they are."""
    return _combines(node, MULTIPLY - MULTIPLY_IN_PLACE, a, b)


def composed_hardswish(x: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node] | None:
    """The nodes that spell out ``x * relu6(x + 3) / 6``, the last one being the result; ``None`` if they do not.

    Source: A. Howard et al., "Searching for MobileNetV3", 2019, section 5.2.
    """
    if len(x.users) != 2:
        return None
    for start in x.users:
        if _is_hardsigmoid(start, modules):
            product = _only_user(start)
            if product is not None and _combines(product, MULTIPLY, x, start):
                return [start, product]
        if not _scales(start, _ADD, x, 3.0):
            continue
        clamped = _only_user(start)
        if clamped is None or activation_of(clamped, modules) != "relu6":
            continue
        after = _only_user(clamped)
        if after is None:
            continue
        if _is_sixth(after, clamped):  # x * (relu6(x + 3) / 6)
            product = _only_user(after)
            if product is not None and _combines(product, MULTIPLY, x, after):
                return [start, clamped, after, product]
        elif _combines(after, MULTIPLY, x, clamped):  # (x * relu6(x + 3)) / 6
            sixth = _only_user(after)
            if sixth is not None and _is_sixth(sixth, after):
                return [start, clamped, after, sixth]
    return None


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the activation that ``node`` computes of its first argument, or ``None``."""
    if node.op == "call_module":
        return activation_of_module(modules[node.target])
    return activation_of_function(node)


def _is_hardsigmoid(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is one that leaves its argument as it is."""
    if node.op == "call_module":
        module = modules[node.target]
        return type(module).forward is nn.Hardsigmoid.forward and not module.inplace
    return node.target is F.hardsigmoid and not arguments_of(node, ("inplace",)).get("inplace", False)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _combines(node: fx.Node, targets: set, a: fx.Node, b: fx.Node) -> bool:
    return node.target in targets and not node.kwargs and node.args in ((a, b), (b, a))


def _scales(node: fx.Node, targets: set, x: fx.Node, number: float) -> bool:
    if node.target not in targets or node.kwargs or len(node.args) != 2:
        return False
    a, b = node.args
    return (a is x and _is_number(b, number)) or (b is x and _is_number(a, number) and targets is not _DIVIDE)


def _is_sixth(node: fx.Node, x: fx.Node) -> bool:
    return _scales(node, _DIVIDE, x, 6.0) or _scales(node, MULTIPLY, x, 1 / 6)
