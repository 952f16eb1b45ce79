# SPDX-License-Identifier: BSD-3-Clause
"""Which BatchNorm modules, also with a forward of their own, are a BN with fixed statistics and a known activation."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from .activations import activation_of_function, activation_of_module, arguments_of
from .tracing import CallForm, Tracer, Untraceable

_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_PASSED_ON = {nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward}
_ARGUMENTS = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class NotABatchNorm(Exception):
    """The reason why a module cannot be folded into the convolution in front of it."""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` derives from a BN of maps."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


def read_batch_norm(bn: nn.Module) -> str:
    """The activation that ``bn`` applies to what it normalised, ``"none"`` for torch's own classes.

    A subclass with a forward of its own (timm's ``BatchNormAct2d``) is traced: it must be ``F.batch_norm`` with its
    own numbers, then at most one known activation.

    Raises:
        NotABatchNorm: it is anything else, or has no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise NotABatchNorm("has no running statistics")
    if type(bn).forward in _PLAIN_FORWARDS:
        return "none"
    children = dict(bn.named_modules())
    node = _normalisation(_trace(bn), bn)
    activation = "none"
    while True:
        readers = list(node.users)
        if len(readers) == 1 and readers[0].op == "output":
            return activation
        if len(readers) != 1 or readers[0].all_input_nodes != [node]:
            raise NotABatchNorm("its forward is not a BN and an activation")
        node = readers[0]
        if node.op == "call_module" and type(children[node.target]).forward in _PASSED_ON:
            continue
        module = children[node.target] if node.op == "call_module" else None
        found = activation_of_function(node) if module is None else activation_of_module(module)
        if found is None or activation != "none":
            raise NotABatchNorm(f"applies {node.name if module is None else type(module).__name__}")
        activation = found


def _trace(bn: nn.Module) -> fx.Graph:
    if "_check_input_dim" in vars(bn):
        raise NotABatchNorm("checks its input in its own way")
    bn._check_input_dim = lambda x: None  # a branch on the rank, which is that of a convolution's output here
    try:
        return Tracer(bn, CallForm.of_root(bn), opaque=set()).run()
    except (Untraceable, TypeError, ValueError) as error:
        raise NotABatchNorm(f"its forward cannot be traced: {error}") from error
    finally:
        del bn._check_input_dim


def _normalisation(graph: fx.Graph, bn: nn.Module) -> fx.Node:
    nodes = [node for node in graph.nodes if node.target is F.batch_norm]
    if len(nodes) != 1 or not nodes[0].args or getattr(nodes[0].args[0], "op", None) != "placeholder":
        raise NotABatchNorm("its forward is not a BN and an activation")
    given = arguments_of(nodes[0], _ARGUMENTS)
    for name in _ARGUMENTS[:4]:
        value = given.get(name)
        own = value is None if getattr(bn, name) is None else getattr(value, "target", None) == name
        if not own:
            raise NotABatchNorm(f"normalises with another {name}")
    if given.get("training", False) is not False or given.get("eps", 1e-5) != bn.eps:
        raise NotABatchNorm("its forward is not a BN with fixed statistics")
    return nodes[0]
