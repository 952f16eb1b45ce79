# SPDX-License-Identifier: BSD-3-Clause
"""An eval-only copy of a model with every site folded into constants."""

from __future__ import annotations

import collections
import copy
from typing import Any, NoReturn

import torch
import torch.nn as nn

from .._compat import has_hooks
from .._frozen import HOW_TO_TRAIN, FrozenSeparable
from .analysis import Analysis, analyse, is_block
from .chains import outlines
from .folding import Folding
from .fuse import defuse
from .program import FusedSite, Program
from .report import check_model
from .rewrite import FrozenForward, FusedForward


class Merged(nn.Module):
    """Keeps the place of a module that became part of a :class:`FrozenSeparable`."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

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
        """Raise ``RuntimeError`` for ``mode=True``."""
        if mode:
            raise RuntimeError(HOW_TO_TRAIN)
        return type(self.module).train(self.module, False)


def freeze(model: nn.Module) -> nn.Module:
    """Make a copy of ``model`` for deployment: eval mode for good, BN folded into weights, nothing left to train.

    Equivalent to ``copy.deepcopy(model).eval().requires_grad_(False)``, with each site of :func:`fusedsep.fuse` as one
    module of constants. Layers whose maps nobody else reads run as one call: convolutions, sites, what joins their
    branches, global average pool and classifier. A BN in such a call is folded into the convolution in front of it,
    and leaves its activation or ``nn.Identity`` in its place, if the forward of ``model`` itself can be traced; it
    remains where Python that cannot be might call one without the other, and is folded while weights are packed. The
    merged modules are dropped, so the copy's ``state_dict`` is its own. What has a hook, and what something else uses
    too, stays as it is: a site is fused but not folded, a BN remains.

    Args:
        model: any module, fused or not; it is not changed.

    Returns:
        The frozen copy. ``train()`` on it raises ``RuntimeError``, as does a call with other arguments than tensors and
        defaults where a site's forward was regenerated for those.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is a ``torch.jit.ScriptModule``.
    """
    check_model(model)
    with torch.inference_mode(False):  # tensors that count their changes, wherever this is called
        return _frozen_copy(model)


def _frozen_copy(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    analysis = analyse(model, training=False)
    defuse(model)
    held_twice = _held_twice(model)
    shared = held_twice | _used_twice(analysis)
    parts = outlines(analysis)
    frozen: dict[nn.Module, FrozenSeparable] = {}
    for owner, program in analysis.programs.items():
        owner.forward = _freeze_sites(program, shared, frozen)
    model = _freeze_blocks(model, shared, frozen)
    folding = Folding(held_twice)
    for part in parts:
        part.attach(frozen, folding)
    if not isinstance(model, FrozenSeparable):
        for module in model.modules():
            if module is model or _holds_frozen(module):
                module.train = EvalOnly(module)
    return model


def _held_twice(model: nn.Module) -> set[nn.Module]:
    """Modules that several others hold."""
    holders = collections.Counter(part for parent in model.modules() for part in parent.children())
    return {part for part in holders if holders[part] > 1}


def _used_twice(analysis: Analysis) -> set[nn.Module]:
    """Modules that are more than one site's, or that something besides their site calls."""
    sites = [site for program in analysis.programs.values() for site in program.sites.values()]
    uses_in_sites = collections.Counter(part for site in sites for part in set(site.numbers()))
    return analysis.used_elsewhere | {part for part in uses_in_sites if uses_in_sites[part] > 1}


def _freeze_sites(program: Program, shared: set[nn.Module], frozen: dict[nn.Module, FrozenSeparable]) -> FusedForward:
    """Merge the sites of a regenerated forward, in the owner itself; note in ``frozen`` what became of them."""
    owner = program.owner
    hooked = any(map(has_hooks, program.bypassed)) or any(has_hooks(module) for _, _, module in program.slots)
    merged: dict[nn.Module, nn.Module] = {}
    sites: dict[str, FusedSite | FrozenSeparable] = dict(program.sites)
    for name, site in program.sites.items():
        if hooked or shared.intersection(site.numbers()) or not _can_fold(site.bn1, site.bn2):
            continue
        sites[name] = FrozenSeparable(site.separable, site.dw, site.bn1, site.pw, site.bn2)
        merged.update({part: Merged() for part in site.numbers()})
        merged[site.dw] = frozen[site.dw] = sites[name]
    if not merged:
        return FusedForward(owner, {False: program})
    _replace(owner, merged)
    return FrozenForward(owner, {False: program.with_sites(sites)})


def _freeze_blocks(model: nn.Module, shared: set[nn.Module], frozen: dict[nn.Module, FrozenSeparable]) -> nn.Module:
    """Put a :class:`FrozenSeparable` in the place of every block; note it in ``frozen``."""
    merged = {}
    for block in [module for module in model.modules() if is_block(module)]:
        parts = [part for part in (block.dw, block.bn1, block.pw, block.bn2) if part is not None]
        if (
            _can_fold(block.bn1, block.bn2)
            and not any(map(has_hooks, [block, *parts]))
            and not shared.intersection(parts)
        ):
            merged[block] = FrozenSeparable(block._separable, block.dw, block.bn1, block.pw, block.bn2)
    frozen.update(merged)
    _replace(model, merged)
    return merged.get(model, model)


def _can_fold(*norms: nn.Module | None) -> bool:
    return all(bn is None or bn.running_mean is not None for bn in norms)


def _holds_frozen(module: nn.Module) -> bool:
    return not isinstance(module, FrozenSeparable) and any(isinstance(p, FrozenSeparable) for p in module.modules())


def _replace(root: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[name] = replacements[child]
