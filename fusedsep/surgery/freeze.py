# SPDX-License-Identifier: BSD-3-Clause
"""An eval-only copy of a model with every site folded into constants."""

from __future__ import annotations

import collections
import copy
from typing import Any, NoReturn

import torch
import torch.nn as nn

from .._frozen import HOW_TO_TRAIN, FrozenSeparable
from .._separable import SeparableConv
from .analysis import Analysis, analyse, is_block
from .fuse import defuse
from .report import check_model
from .rewrite import FrozenForward, FusedForward, FusedSite, has_hooks


class Merged(nn.Module):
    """Keeps the place of a module that became part of a :class:`FrozenSeparable`."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "this module was merged into a frozen site and is called on its own: "
            "use fusedsep.fuse instead of fusedsep.freeze for this model"
        )


class EvalOnly:
    """What ``module.train`` is in a frozen model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(HOW_TO_TRAIN)
        return type(self.module).train(self.module, False)


def freeze(model: nn.Module) -> nn.Module:
    """Make a copy of ``model`` for deployment: eval mode for good, BN folded into weights, nothing left to train.

    Equivalent to ``copy.deepcopy(model).eval().requires_grad_(False)``, with each site of :func:`fusedsep.fuse` as one
    module of constants. The merged modules are dropped, so the copy's ``state_dict`` is its own. A site with a hook in
    it, and one with a module that something else uses too, stays fused but not folded.

    Args:
        model: any module, fused or not; it is not changed.

    Returns:
        The frozen copy. ``train()`` on it raises ``RuntimeError``, as does a call with other arguments than tensors and
        defaults where a site's forward was regenerated for those.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is a ``torch.jit.ScriptModule``.
    """
    check_model(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    analysis = analyse(model)
    defuse(model)
    uses = collections.Counter(
        module for parent in model.modules() for module in parent._modules.values() if module is not None
    )
    uses[model] += 1
    for owner, forward in analysis.forwards.items():
        if _can_be_frozen(forward, analysis, uses):
            owner.forward = _freeze_sites(forward)
        else:
            owner.forward = forward
    model = _freeze_blocks(model)
    for module in model.modules():
        if module is model or any(isinstance(part, FrozenSeparable) for part in module.children()):
            module.train = EvalOnly(module)
    return model
