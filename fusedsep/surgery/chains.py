# SPDX-License-Identifier: BSD-3-Clause
"""Finding layers of a model whose maps nobody else reads, to run them as one call in eval mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from .._chain import LayerChain
from .._chain_elements import depthwise_of
from .._frozen import FrozenSeparable
from .analysis import Analysis
from .folding import Folding
from .program import Program, program_from, replace_sites
from .rewrite import FrozenForward, FusedForward
from .runs import Frozen, Run
from .side_effects import usual_global_mode
from .sites import input_of
from .tracing import CallForm, Tracer, Untraceable


class ChainedForward(FusedForward):
    """The forward of a model in eval mode with its chains as one call each; for other calls, what it ran without."""

    def __init__(self, owner: nn.Module, program: Program, otherwise: Callable[..., Any] | None) -> None:
        super().__init__(owner, {False: program})
        self.otherwise = otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.run_original(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward with the same sites and no chain."""
        if self.otherwise is None:
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return self.otherwise(*args, **kwargs)


class FrozenChainedForward(ChainedForward, FrozenForward):
    """A :class:`ChainedForward` over sites that are folded."""


class Outline:
    """The runs of layers in a module, found before anything in it is merged.

    Args:
        root: in eval mode and unfused.
        analysis: of the whole model.

    Raises:
        Untraceable: a graph cannot stand for the forward of the root.
    """

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        self._root = root
        self._form = CallForm.of_root(root)
        if not self._form.is_comparable():
            raise Untraceable(root, "it has defaults that cannot be compared")
        self._modules = dict(root.named_modules(remove_duplicate=False))
        opaque = set(analysis.opaque) - {root}
        tracer = Tracer(root, self._form, opaque, analysis.helpers)
        runs = self._find_runs(tracer.run())
        needed = _written_out(runs, root)
        tracer = Tracer(root, self._form, opaque, analysis.helpers, needed | tracer.see_through)
        self._graph = tracer.run()
        self._runs = self._find_runs(self._graph) if runs else []
        self._inlined = tracer.inlined
        # Python that cannot be traced may call the layers of others one by one.
        self._is_called_whole = root is analysis.model

    def _find_runs(self, graph: fx.Graph) -> list[Run]:
        replace_sites(graph, self._modules)
        runs: list[Run] = []
        covered: set[fx.Node] = set()
        for node in graph.nodes:
            run = None if node in covered else Run(node, self._modules, covered)
            if run is not None and run.steps:
                runs.append(run)
                covered.update(run.nodes)
        return [] if all(run.is_lone_site for run in runs) else runs

    def depthwise(self) -> list[nn.Conv2d]:
        """The depthwise convolutions that are layers by themselves."""
        return [conv for run in self._runs for conv in depthwise_of(run.elements(None))]

    def attach(self, frozen: Frozen = None, folding: Folding | None = None) -> None:
        """Give the root a forward with its runs as chains, if it has any.

        ``frozen`` has what became of each site's depthwise convolution, and of each block. If one did not become
        anything, its owner has to decide at each call, and nothing changes.
        With ``folding``, the BNs of its runs are folded.
        """
        if not self._runs or (frozen is not None and not all(run.site_keys <= frozen.keys() for run in self._runs)):
            return
        elements = [run.elements(frozen) for run in self._runs]
        if folding is not None:
            folding.fold([*itertools.chain(*elements)], self._root, self._graph, self._modules, self._is_called_whole)
        for index, run in enumerate(self._runs):
            chain = LayerChain(f"chain_{index}", elements[index], run.links(), frozen is not None)
            nodes = run.nodes
            with self._graph.inserting_before(nodes[0]):
                call = self._graph.call_function(chain, (input_of(nodes[0]),))
            nodes[-1].replace_all_uses_with(call)
            for node in reversed(nodes):
                read = node.all_input_nodes
                self._graph.erase_node(node)
                for parameter in read:
                    if parameter.op == "get_attr" and not parameter.users:
                        self._graph.erase_node(parameter)
        present = set(self._root.modules())
        for node in self._graph.nodes:
            if node.op == "call_module" and self._modules[node.target] not in present:
                return  # merged, and not only its site calls it
        try:
            program = program_from(self._graph, self._root, self._form, LayerChain, self._inlined & present)
        except Untraceable:
            return
        kind = ChainedForward
        if frozen is not None:  # eval only, and with settings that nobody changes
            kind = FrozenChainedForward
            program.settings = [setting for setting in program.settings if not isinstance(setting[0], FrozenSeparable)]
            program.modes = [modes for modes in program.modes if not isinstance(modes[0], FrozenSeparable)]
        self._root.forward = kind(self._root, program, vars(self._root).get("forward"))


def _written_out(runs: list[Run], root: nn.Module) -> set[nn.Module]:
    """The modules whose Python must be written out; what no run needs stays a call.

    A chain needs all that it was made under. A single site stays in the forward of the module that holds it, unless
    that forward is itself written out.
    """
    needed = {root}
    while True:
        found = {
            call.module
            for run in runs
            if not run.is_lone_site or any(site.meta["around"][-1].module in needed for site in run.site_calls)
            for node in run.nodes
            for call in node.meta["calls"]
        }
        if found <= needed:
            return needed
        needed |= found


def outlines(analysis: Analysis) -> list[Outline]:
    """Those of each part of a model that can be traced as a whole; the model is in eval mode and unfused."""
    found = []
    for root in analysis.roots:
        try:
            with usual_global_mode():
                found.append(Outline(root, analysis))
        except (Untraceable, TypeError, ValueError):
            continue
    return found
