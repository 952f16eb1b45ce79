# SPDX-License-Identifier: BSD-3-Clause
"""A regenerated forward that runs sites as one operation, next to the untouched original.

Nothing of the model is replaced: a :class:`FusedForward` is an instance attribute ``forward`` of the module whose
forward holds the sites. Whenever a call is not what was traced, the forward of the class runs instead.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn as nn
from torch import fx
from torch.nn.modules.module import _has_any_global_hook

from .._separable import SeparableConv
from .sites import Chain, find_chains, input_of
from .tracing import CallForm, Tracer, original_forward


class FusedSite:
    """One call of :class:`SeparableConv` in a regenerated forward, with the modules that it runs."""

    def __init__(self, chain: Chain, modules: dict[str, nn.Module], name: str) -> None:
        def module_of(node: fx.Node | None) -> nn.Module | None:
            return None if node is None else modules[node.target]

        self.__name__ = name
        self.text = str(chain)
        self.dw = module_of(chain.dw)
        self.bn1 = module_of(chain.bn1)
        self.pw = module_of(chain.pw)
        self.bn2 = module_of(chain.bn2)
        kind = SelfActivatingConv if any(chain.carried) else SeparableConv
        self.separable = kind(chain.activation, chain.pointwise_activation, chain.pre_pad)
        if any(chain.carried):
            self.separable.carry(*chain.carried)
        #: Every module that the site stands for, activations and padding too.
        self.modules = [modules[node.target] for node in chain.nodes if node.op == "call_module"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.separable(x, self.dw, self.bn1, self.pw, self.bn2)


class SelfActivatingConv(SeparableConv):
    """Where a BN applies the activation itself, running the modules must not apply it again."""

    def carry(self, bn1: bool, bn2: bool) -> None:
        """Say which of the two BNs do."""
        self._between = SeparableConv(
            "none" if bn1 else self.activation, "none" if bn2 else self.pointwise_activation, self.pre_pad
        )

    def composite(self, *arguments: Any) -> torch.Tensor:
        return self._between.composite(*arguments)


class FusedForward:
    """What ``owner(...)`` runs in eval mode.

    Args:
        owner: the module; its class keeps the original forward.
        form: how the owner was called when it was traced.
        source, names: the regenerated forward as Python text, and the global names that it uses.
        sites: the callables among those names that run a site.
        inlined: the owner and the modules whose Python became part of ``source``.
    """

    def __init__(
        self,
        owner: nn.Module,
        form: CallForm,
        source: str,
        names: dict[str, Any],
        sites: dict[str, Any],
        inlined: set[nn.Module],
    ) -> None:
        self.owner = owner
        self.form = form
        self.source = source
        self.names = names
        self.sites = sites
        parts = {part for site in sites.values() for module in site.modules for part in module.modules()}
        run_by_the_sites = {part for site in sites.values() for part in (site.dw, site.bn1, site.pw, site.bn2)}
        #: Modules that are never called now: a hook of theirs, or training mode, needs the original forward.
        self.bypassed = [module for module in parts | inlined if module is not owner and module not in run_by_the_sites]
        #: Modules that must still be in place.
        self.expected = {
            path: module
            for path, module in owner.named_modules(remove_duplicate=False)
            if path and module in parts | inlined
        }
        #: Plain attributes that the Python of the inlined modules may have branched on.
        self.settings = [
            (module, name, value)
            for module in inlined
            for name, value in vars(module).items()
            if name != "training" and name in _names_read_by(module) and isinstance(value, _SETTING_TYPES)
        ]
        self._program: Callable[..., Any] | None = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return original_forward(self.owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = self._program or self._prepare()
        if self._takes_one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            inputs: Any = args
        else:
            inputs = self.form.match(self.owner, args, kwargs)
        if inputs is None or self._needs_original():
            return self.run_original(*args, **kwargs)
        return program(self.owner, *inputs)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the owner's class."""
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def _needs_original(self) -> bool:
        """Whether anything differs from what was traced: training mode, hooks, replaced modules, changed settings."""
        if self.owner.training or _has_any_global_hook():
            return True
        for siblings, name, module in self._slots:
            if siblings.get(name) is not module:
                return True
        for module in self.bypassed:
            if module.training or has_hooks(module):
                return True
        for state, name, value in self._values:
            if state.get(name) != value:
                return True
        return False

    def _prepare(self) -> Callable[..., Any]:
        """Compile the text; after unpickling or copying too."""
        self._takes_one_tensor = self.form.is_one_tensor(self.owner)
        self._slots = []
        for path, module in self.expected.items():
            parent, _, name = path.rpartition(".")
            siblings = (self.expected[parent] if parent in self.expected else self.owner.get_submodule(parent))._modules
            self._slots.append((siblings, name, module))
        self._values = [(vars(module), name, value) for module, name, value in self.settings]
        names = {**self.names, **self.sites}
        exec(compile(self.source, f"<forward of {type(self.owner).__name__}, fused>", "exec"), names)
        self._program = names["forward"]
        return self._program

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        modules = {key: value.__name__ for key, value in self.names.items() if isinstance(value, types.ModuleType)}
        state["names"] = {key: value for key, value in self.names.items() if key not in modules}
        state["imports"] = modules
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        imports = state.pop("imports")
        vars(self).update(state, _program=None)
        self.names.update({key: __import__(name, fromlist=["*"]) for key, name in imports.items()})


class FrozenForward(FusedForward):
    """A :class:`FusedForward` whose sites are folded: there is no original to go back to."""

    def run_original(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"this call of the frozen {type(self.owner).__name__} is not the one that was frozen: other arguments than "
            "tensors and defaults, a hook on a merged module, a replaced module, a changed setting or training mode; "
            "use the model that freeze was called on for that"
        )


_SETTING_TYPES = (bool, int, float, str, tuple, type(None))


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook runs when ``module`` is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _names_read_by(module: nn.Module) -> set[str]:
    names: set[str] = set()
    for base in type(module).__mro__:
        if base in (nn.Module, object):
            continue
        for attribute, value in vars(base).items():
            code = getattr(value, "__code__", None)
            if code is not None and attribute != "__init__":
                names.update(code.co_names)
    return names


def fused_forward(owner: nn.Module, form: CallForm, opaque: set[nn.Module], inline: set[nn.Module]) -> FusedForward:
    """Regenerate the forward of ``owner`` with every site in it as one call.

    Args:
        form: how the owner is called.
        inline: the modules inside it to write out; all others stay calls.

    Raises:
        Untraceable: its Python cannot be written down.
    """
    tracer = Tracer(owner, form, opaque, inline)
    graph = tracer.run()
    modules = dict(owner.named_modules(remove_duplicate=False))
    sites = []
    for index, chain in enumerate(find_chains(graph, modules)[0]):
        site = FusedSite(chain, modules, f"separable_{index}")
        sites.append(site)
        # In the place of the first node: later ones may come after something that changes the input in place.
        with graph.inserting_before(chain.nodes[0]):
            call = graph.call_function(site, (input_of(chain.nodes[0]),))
        chain.nodes[-1].replace_all_uses_with(call)
        for node in sorted(chain.nodes, reverse=True):
            graph.erase_node(node)
    for node in graph.nodes:
        node.type = None  # the text needs no annotations, and their names might not be importable
    graph.lint()
    code = graph.python_code("self")
    names = {name: value for name, value in code.globals.items() if not isinstance(value, FusedSite)}
    bound = {name: value for name, value in code.globals.items() if isinstance(value, FusedSite)}
    return FusedForward(owner, form, code.src, names, bound, tracer.inlined)
