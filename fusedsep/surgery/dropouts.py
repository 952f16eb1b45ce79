# SPDX-License-Identifier: BSD-3-Clause
"""Which modules and function calls hand their input on as it is, in the mode that they are in."""

from __future__ import annotations

import operator

import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from .activations import arguments_of

_DROPOUTS = {
    kind.forward
    for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
}
_DROPOUT_FUNCTIONS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
#: Module and name of the function in torchvision, which marks it as one call for FX.
_STOCHASTIC_DEPTH = ("torchvision.ops.stochastic_depth", "stochastic_depth")


def is_dropout(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's dropout layers."""
    return "forward" not in vars(module) and type(module).forward in _DROPOUTS


def passes_on(module: nn.Module) -> bool:
    """Whether ``module`` hands its input on: an identity, or a dropout in eval mode or with a probability of 0."""
    if "forward" in vars(module):
        return False
    return type(module).forward is nn.Identity.forward or (
        is_dropout(module) and (not module.training or module.p == 0)
    )


def call_passes_on(node: fx.Node) -> bool:
    """The same for the call of a function."""
    if node.op != "call_function":
        return False
    if node.target in (operator.add, operator.iadd):
        return any(isinstance(given, (int, float)) and given == 0 for given in node.args)
    if node.target in _DROPOUT_FUNCTIONS:
        names = ("p", "training")
    elif (node.target.__module__, node.target.__name__) == _STOCHASTIC_DEPTH:
        names = ("p", "mode", "training")
    else:
        return False
    given = arguments_of(node, names)
    return given.get("training", True) is False or given.get("p", 0.5) == 0


def node_passes_on(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """The same for a call of either kind."""
    return passes_on(modules[node.target]) if node.op == "call_module" else call_passes_on(node)
