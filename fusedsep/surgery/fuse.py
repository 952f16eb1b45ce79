# SPDX-License-Identifier: BSD-3-Clause
"""Putting regenerated forwards on a model, and taking them off."""

from __future__ import annotations

import copy

import torch.nn as nn

from .analysis import analyse, is_fused
from .chains import outlines
from .report import check_model
from .rewrite import FrozenForward, FusedForward
from .side_effects import in_mode


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Run every depthwise-separable convolution of ``model`` as one operation.

    Equivalent to ``copy.deepcopy(model)``: the outputs, the modules, their names, parameters, buffers, hooks and the
    ``state_dict`` are the same. Only the forwards that hold a site (depthwise 3x3, BN, activation, pointwise 1x1, BN,
    activation) are regenerated, once for training and once for eval mode, as the two may differ, and for eval mode
    that of the model as a whole, in which layers whose maps nobody else reads run as one call; for training mode also
    those of the other pointwise 1x1 and depthwise convolutions with a BN, and of the 3x3 convolution of the images.
    Where a call is not what was found at fusing time (a replaced child, a hook in between, an unusual argument) the
    original forward runs. After editing a fused model, fuse it again.

    Args:
        model: any module. What is not the pattern stays as it is; :func:`fusedsep.fusion_report` says why.
        inplace: change ``model`` itself instead of a copy. Default: False.

    Returns:
        The fused model, in the mode (training or eval) of ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is a ``torch.jit.ScriptModule``.
    """
    check_model(model)
    if not inplace:
        model = copy.deepcopy(model)
    analyses = [analyse(model, training) for training in (False, True)]
    defuse(model)
    with in_mode(model, False):
        parts = outlines(analyses[False])
    for owner in model.modules():
        programs = {
            training: analysis.programs[owner]
            for training, analysis in enumerate(analyses)
            if owner in analysis.programs
        }
        if programs:
            owner.forward = FusedForward(owner, programs)
    with in_mode(model, False):
        for part in parts:
            part.attach()
    return model


def defuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fusedsep.fuse` in place: every module runs the forward of its class again.

    Args:
        model: a fused model, or any other, which then stays as it is. What :func:`fusedsep.freeze` merged stays merged.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is a ``torch.jit.ScriptModule``.
    """
    check_model(model)
    for module in model.modules():
        if is_fused(module) and not isinstance(module.forward, FrozenForward):
            del module.forward
    return model
