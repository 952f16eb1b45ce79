# SPDX-License-Identifier: BSD-3-Clause
"""Which BatchNorm modules, also with a forward of their own, are a BN and a known activation."""

from __future__ import annotations

import operator

import torch.nn as nn
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from .._compat import TRACEABLE_ASSERT
from .activations import activation_of_function, activation_of_module, arguments_of
from .dropouts import passes_on
from .side_effects import in_mode
from .tracing import CallForm, Tracer, Untraceable

_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_ARGUMENTS = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
#: Nodes that look at the input without anything following from it but an error.
_LOOKS = {getattr, operator.getitem, operator.eq, operator.ne, TRACEABLE_ASSERT, "dim", "size", "ndimension"}


class NotABatchNorm(Exception):
    """The reason why a module cannot be a part of a site."""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` derives from a BN of maps."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


def is_plain_batch_norm(bn: nn.Module) -> bool:
    """Whether ``bn`` has the forward of torch's own classes."""
    return type(bn).forward in _PLAIN_FORWARDS


def read_batch_norm(bn: nn.Module) -> str:
    """The activation that ``bn`` applies to what it normalised, ``"none"`` for torch's own classes.

    A subclass with a forward of its own (timm's ``BatchNormAct2d``) is traced: it must be ``F.batch_norm`` with its
    own numbers, then at most one known activation. One in training mode must be that in both modes, as it may be frozen
    at any time, and its buffers must change as those of ``nn.BatchNorm2d`` do.

    Raises:
        NotABatchNorm: it is anything else.
    """
    if (bn.running_mean is None) != (bn.running_var is None):
        raise NotABatchNorm("has one of two running statistics")
    if is_plain_batch_norm(bn):
        return "none"
    if bn.running_mean is None:
        raise NotABatchNorm("has no running statistics")
    activation = _activation_after(_trace(bn), bn)
    if bn.training:
        if isinstance(bn, nn.SyncBatchNorm):  # its class promises statistics that this forward does not share
            raise NotABatchNorm("is a SyncBatchNorm with a forward of its own")
        with in_mode(bn, False):
            if _activation_after(_trace(bn), bn) != activation:
                raise NotABatchNorm("applies one activation in training mode and another in eval mode")
    return activation


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


def _activation_after(graph: fx.Graph, bn: nn.Module) -> str:
    """The activation behind the one BN of ``graph``, which must hold nothing else."""
    children = dict(bn.named_modules())
    node = _normalisation(graph, bn)
    known = {node, *_counting(graph, bn)}
    activation = "none"
    while True:
        readers = list(node.users)
        if len(readers) != 1 or readers[0].all_input_nodes != [node]:
            raise NotABatchNorm("its forward is not a BN and an activation")
        node = readers[0]
        known.add(node)
        if node.op == "output":
            break
        module = children[node.target] if node.op == "call_module" else None
        if module is not None and passes_on(module):
            continue
        found = activation_of_function(node) if module is None else activation_of_module(module)
        if found is None or activation != "none":
            raise NotABatchNorm(f"applies {node.name if module is None else type(module).__name__}")
        activation = found
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr") and node not in known and node.target not in _LOOKS:
            raise NotABatchNorm(f"its forward calls {node.name} too")
    return activation


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
    if given.get("training", False) is not bn.training or given.get("eps", 1e-5) != bn.eps:
        raise NotABatchNorm(f"its forward is not a BN with {'batch' if bn.training else 'fixed'} statistics")
    if bn.training and given.get("momentum", 0.1) != bn.momentum:
        raise NotABatchNorm("averages its running statistics with another momentum")
    return nodes[0]


def _counting(graph: fx.Graph, bn: nn.Module) -> list[fx.Node]:
    """The node that counts a batch: there must be one where ``nn.BatchNorm2d`` has it."""

    def counts(node: fx.Node) -> bool:
        return (
            node.op == "call_method"
            and node.target == "add_"
            and getattr(node.args[0], "target", None) == "num_batches_tracked"
            and node.args[1:] == (1,)
            and not node.kwargs
        )

    nodes = [node for node in graph.nodes if counts(node)]
    if not bn.training:
        return []
    if not bn.track_running_stats or len(nodes) != (bn.num_batches_tracked is not None):
        raise NotABatchNorm("does not count batches as nn.BatchNorm2d does")
    return nodes
