# SPDX-License-Identifier: BSD-3-Clause
"""What is fused in a model, what is not, and why."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn as nn

from .._compat import has_hooks
from .._frozen import FrozenSeparable
from .analysis import Analysis, analyse, as_written
from .chains import ChainedForward, outlines
from .program import FusedSite
from .side_effects import in_mode


@dataclasses.dataclass(frozen=True)
class Site:
    """One depthwise convolution.

    Attributes:
        name: its qualified name in the model.
        reason: what was fused with it, and why not in both training and eval mode if so; or why nothing was.
    """

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """The depthwise convolutions of a model; ``str()`` is a table of them.

    Attributes:
        fused: those that run (or would run, after :func:`fusedsep.fuse`) as one operation with what follows them.
        chained: the others that are layers of a chain in eval mode; what they are called with then is one call.
        skipped: those that stay as they are.
    """

    fused: list[Site]
    chained: list[Site]
    skipped: list[Site]

    def __str__(self) -> str:
        sites = self.fused + self.chained + self.skipped
        noun = "depthwise convolution" if len(sites) == 1 else "depthwise convolutions"
        more = f", {len(self.chained)} more in chains in eval mode" if self.chained else ""
        lines = [f"{len(self.fused)} of {len(sites)} {noun} fused{more}"]
        width = max((len(site.name) for site in sites), default=0)
        for verb, sites in (("fused", self.fused), ("chained", self.chained), ("skipped", self.skipped)):
            lines += [f"  {verb:7}  {site.name:{width}}  {site.reason}" for site in sites]
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """Say for each depthwise convolution of ``model`` whether it is fused, or why not.

    Works on a fused model and on one that is not: then it says what :func:`fusedsep.fuse` would do.

    Args:
        model: any module; it is not changed.

    Returns:
        :class:`FusionReport`.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is a ``torch.jit.ScriptModule``.
    """
    check_model(model)
    in_eval, in_training = (analyse(model, training) for training in (False, True))
    return _report(model, in_eval, in_training, _chained(model, in_eval))


def _chained(model: nn.Module, in_eval: Analysis) -> set[nn.Module]:
    """The depthwise convolutions that are layers of chains by themselves."""
    if any(isinstance(module, FrozenSeparable) for module in model.modules()):  # parts of its Python are gone
        forwards = [vars(module).get("forward") for module in model.modules()]
        programs = [forward.programs[False] for forward in forwards if isinstance(forward, ChainedForward)]
        return {conv for program in programs for chain in program.sites.values() for conv in chain.depthwise()}
    with in_mode(model, False), as_written(model):
        return {conv for outline in outlines(in_eval) for conv in outline.depthwise()}


def _report(model: nn.Module, in_eval: Analysis, in_training: Analysis, in_chains: set[nn.Module]) -> FusionReport:
    fused: list[Site] = []
    chained: list[Site] = []
    skipped: list[Site] = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenSeparable):
            fused.append(Site(name, "frozen"))
        elif module in in_eval.fused or module in in_training.fused:
            hooked = _hooked(model, in_eval.fused.get(module) or in_training.fused[module])
            if hooked:
                skipped.append(Site(name, f"hooks on {', '.join(hooked)} need the modules themselves"))
            else:
                fused.append(Site(name, _text(module, in_eval, in_training)))
        elif module in in_eval.reasons:
            reason = in_eval.reasons[module]
            if module in in_training.with_norm:
                reason += "; one operation with its BN in training mode"
            (chained if module in in_chains else skipped).append(Site(name, reason))
    return FusionReport(fused, chained, skipped)


def _text(conv: nn.Module, in_eval: Analysis, in_training: Analysis) -> str:
    """What is fused with ``conv``, which may not be the same in both modes."""
    if conv not in in_training.fused:
        return f"{_text_of(in_eval.fused[conv])}; in eval mode only: {in_training.reasons[conv]}"
    training_text = _text_of(in_training.fused[conv])
    if conv not in in_eval.fused:
        return f"{training_text}; in training mode only: {in_eval.reasons[conv]}"
    text = _text_of(in_eval.fused[conv])
    return text if text == training_text else f"{text}; in training mode {training_text}"


def _text_of(site: nn.Module | FusedSite) -> str:
    return site.text if isinstance(site, FusedSite) else "a DepthwiseSeparableBlock"


def _hooked(model: nn.Module, site: nn.Module | FusedSite) -> list[str]:
    parts = set(site.modules) if isinstance(site, FusedSite) else set(site.children())
    return [name for name, module in model.named_modules() if module in parts and has_hooks(module)]


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless ``model`` is a module whose Python can be read."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be an nn.Module with a Python forward, got {type(model).__name__}: "
            "pass the module that it was compiled from"
        )
