# SPDX-License-Identifier: BSD-3-Clause
"""What can be fused in a model: which modules get a regenerated forward, and why the rest stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn as nn
from torch import fx

from .._frozen import FrozenSeparable
from ..block import DepthwiseSeparableBlock
from .helpers import Helper
from .program import FusedConvolution, FusedSite, Program, write_program
from .rewrite import FusedForward
from .side_effects import in_mode, usual_global_mode
from .sites import Chain, find_chains, is_depthwise, why_not_fusable
from .tracing import Call, CallForm, Tracer, Untraceable, is_layer


class Analysis:
    """The regenerated forwards of a model, by owner, and the reason for each depthwise convolution without a site.

    They are for the mode, training or eval, that every module of ``model`` is in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.programs: dict[nn.Module, Program] = {}
        self.reasons: dict[nn.Module, str] = {}
        #: Modules that are also called outside of every site.
        self.used_elsewhere: set[nn.Module] = set()
        #: Modules whose Python no trace shows, with the reason.
        self.opaque: dict[nn.Module, str] = {
            module: ""
            for module in model.modules()
            if is_block(module) or isinstance(module, FrozenSeparable) or "forward" in vars(module)
        }
        #: Modules whose forwards were traced as a whole, the outermost that can be.
        self.roots: list[nn.Module] = []
        #: Functions that one node stands for.
        self.helpers: list[Helper] = []
        self._seen: set[nn.Module] = set()
        # A model without a depthwise convolution is not what this is for; one that has any may hold others elsewhere.
        for module in list(model.modules()) if any(map(is_depthwise, model.modules())) else []:
            if module not in self._seen and self._may_be_a_root(module):
                self._analyse(module)
        reasons, self.reasons = self.reasons, {}
        #: What stands for each depthwise convolution that is fused.
        self.fused: dict[nn.Module, FusedSite | DepthwiseSeparableBlock] = {
            site.dw: site
            for program in self.programs.values()
            for site in program.sites.values()
            if isinstance(site, FusedSite)
        }
        self.fused.update({block.dw: block for block in model.modules() if is_block(block)})
        #: Convolutions that are one operation with their BN, and no part of a site: in training mode.
        self.with_norm: set[nn.Module] = {
            site.conv
            for program in self.programs.values()
            for site in program.sites.values()
            if isinstance(site, FusedConvolution)
        }
        for module in model.modules():
            if is_depthwise(module) and module not in self.fused:
                self.reasons[module] = why_not_fusable(module) or reasons.get(module) or self._caller(model, module)

    def _may_be_a_root(self, module: nn.Module) -> bool:
        """Whether it holds a depthwise convolution, or others that no root calls."""
        convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        return any(map(is_depthwise, convolutions)) or bool(convolutions and self._seen.isdisjoint(convolutions))

    def _analyse(self, root: nn.Module) -> None:
        """Add the sites of one root; every module that the trace calls counts as seen."""
        self._seen.add(root)
        if is_block(root):
            self._seen |= set(root.modules())
        has_forward = type(root).forward is not nn.Module.forward  # nn.ModuleList has none
        if is_layer(root) or is_block(root) or "forward" in vars(root) or not has_forward:
            return
        while True:
            opaque = set(self.opaque) - {root}
            try:
                tracer = Tracer(root, CallForm.of_root(root), opaque, self.helpers)
                graph = tracer.run()
                programs = self._programs_of(root, tracer, graph, opaque)
                break
            except Untraceable as error:
                helper = error.helper
                if helper is not None and not any(helper.is_same(known) for known in self.helpers):
                    self.helpers.append(helper)
                    continue
                self.opaque[error.module] = str(error)
                if error.module is root or error.module in opaque or is_layer(error.module):
                    self.opaque[root] = str(error)
                    return
            except (TypeError, ValueError) as error:  # its forward has no signature, or is called against it
                self.opaque[root] = str(error)
                return
        self.programs.update(programs)
        self.roots.append(root)
        self._seen |= tracer.called - opaque

    def _programs_of(
        self, root: nn.Module, tracer: Tracer, graph: fx.Graph, opaque: set[nn.Module]
    ) -> dict[nn.Module, Program]:
        modules = dict(root.named_modules(remove_duplicate=False))
        chains, reasons = find_chains(graph, modules)
        calls = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
        heads = [modules[chain.dw.target if isinstance(chain, Chain) else chain.conv.target] for chain in chains]
        if not any(map(is_depthwise, heads)) and not any(map(is_block, calls)):
            chains = []  # only pointwise ones: not the network that this is for
        inline: dict[nn.Module, set[nn.Module]] = {}
        forms: dict[nn.Module, CallForm] = {}
        for chain in chains:
            stacks = [node.meta["calls"] for node in chain.nodes]
            owner = _innermost_common(stacks)
            depth = stacks[0].index(owner)
            inline.setdefault(owner.module, set()).update(
                call.module for stack in stacks for call in stack[depth + 1 :] if call.module is not owner.module
            )
            forms.setdefault(owner.module, owner.form)
        for owner in [module for module in root.modules() if module in inline]:  # outer ones first
            while inner := [module for module in inline.get(owner, ()) if module in inline]:
                inline[owner].update(*(inline.pop(module) for module in inner))

        programs = {}
        for owner, inner in inline.items():
            if not forms[owner].is_comparable():
                raise Untraceable(owner, "it is called with arguments that cannot be compared")
            inner = inner | (tracer.see_through - {owner})
            programs[owner] = write_program(owner, forms[owner], opaque, self.helpers, inner)

        covered = {node for chain in chains for node in chain.nodes}
        self.used_elsewhere |= {
            modules[node.target] for node in graph.nodes if node.op == "call_module" and node not in covered
        }
        for node in graph.nodes:
            if node.op == "get_attr":  # a module as an argument, or a tensor of one
                self.used_elsewhere |= set(modules.get(node.target, nn.Module()).modules())
                self.used_elsewhere.add(modules[node.target.rpartition(".")[0]])
        self.reasons.update(reasons)
        return programs

    def _caller(self, model: nn.Module, conv: nn.Module) -> str:
        """Why no trace shows ``conv``: the innermost untraceable module around it."""
        path = next(path for path, module in model.named_modules() if module is conv)
        while path:
            path = path.rpartition(".")[0]
            module = model.get_submodule(path)
            if self.opaque.get(module):
                where = f"{path or 'the model'} ({type(module).__name__})"
                return f"the Python of {where} cannot be traced: {self.opaque[module]}"
        return "no traceable forward calls it"


def analyse(model: nn.Module, training: bool) -> Analysis:
    """Find all sites of ``model``, fused or not, in training or in eval mode; the model is as it was afterwards."""
    with in_mode(model, training), as_written(model), usual_global_mode():
        return Analysis(model)


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """The forwards of the classes for a while, in place of regenerated ones."""
    fused = {module: vars(module)["forward"] for module in model.modules() if is_fused(module)}
    for module in fused:
        del module.forward
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.forward = forward


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` runs a regenerated forward."""
    return isinstance(vars(module).get("forward"), FusedForward)


def is_block(module: nn.Module) -> bool:
    """Whether ``module`` runs as one operation already."""
    return type(module).forward is DepthwiseSeparableBlock.forward


def _innermost_common(stacks: list[tuple[Call, ...]]) -> Call:
    """The last call that all stacks share."""
    common = stacks[0][0]
    for calls in zip(*stacks, strict=False):
        if any(call is not calls[0] for call in calls):
            break
        common = calls[0]
    return common
