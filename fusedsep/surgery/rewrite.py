# SPDX-License-Identifier: BSD-3-Clause
"""A regenerated forward that runs sites as one operation, next to the untouched original.

Nothing of the model is replaced: a :class:`FusedForward` is an instance attribute ``forward`` of the module whose
forward holds the sites. Whenever a call is not what was traced, the forward of the class runs instead.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn as nn
from torch import fx

from .._compat import has_global_hooks, has_hooks, is_plain_convolution
from .._separable import SeparableConv
from .helpers import Helper
from .sites import Chain, find_chains, input_of
from .tracing import CallForm, Tracer, Untraceable, original_forward


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
        self.separable = CarryingConv(chain)
        # Whoever found the chain has read the forwards of subclasses.
        self.separable.self_padding_class = None if is_plain_convolution(self.dw) else type(self.dw)
        self.separable.norm_forwards |= {type(bn).forward for bn in (self.bn1, self.bn2) if bn is not None}
        #: Every module that the site stands for: activations and padding too, and what a BN carries.
        self.modules = [
            part
            for node in chain.nodes
            if node.op == "call_module"
            for name, part in modules[node.target].named_modules()
            if not name.startswith("parametrizations")
        ]

    def numbers(self) -> list[nn.Module]:
        """The modules whose parameters and buffers the site reads."""
        return [module for module in (self.dw, self.bn1, self.pw, self.bn2) if module is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.separable(x, self.dw, self.bn1, self.pw, self.bn2)


class CarryingConv(SeparableConv):
    """A chain whose modules may carry a part of it themselves: running them must not do that part again."""

    def __init__(self, chain: Chain) -> None:
        super().__init__(chain.activation, chain.pointwise_activation, chain.pre_pad)
        first, second = chain.carried_activations
        self._around_modules = SeparableConv(
            "none" if first else chain.activation, "none" if second else chain.pointwise_activation, chain.pad_in_front
        )

    def composite(self, *arguments: Any) -> torch.Tensor:
        return self._around_modules.composite(*arguments)


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
        parts = {part for site in sites.values() for part in site.modules}
        run_by_the_sites = {part for site in sites.values() for part in site.numbers()}
        #: Modules whose Python was read, in eval mode: written out in ``source``, or tried.
        read = inlined | {site.dw for site in sites.values() if site.separable.self_padding_class is not None}
        #: Modules that are never called now: a hook of theirs, or training mode, needs the original forward.
        self.bypassed = [
            module
            for module in parts | inlined
            if module is not owner and (module in read or module not in run_by_the_sites)
        ]
        #: Modules that must still be in place.
        self.expected = {
            path: module
            for path, module in owner.named_modules(remove_duplicate=False)
            if path and module in parts | inlined
        }
        #: Plain attributes that this Python may have branched on.
        self.settings = [
            (module, name, value)
            for module in read
            for name, value in vars(module).items()
            if name != "training" and name in _names_read_by(module) and isinstance(value, _SETTING_TYPES)
        ]
        self.takes_one_tensor = form.is_one_tensor(owner)
        self._slots: list[tuple[dict[str, Any], str, nn.Module]] | None = None
        self._program = self._compile()

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return original_forward(self.owner)

    @property
    def __globals__(self) -> NoReturn:
        """Only ``torch.jit.script`` asks for it."""
        raise AttributeError(
            "torch.jit.script cannot read the forwards of a fused model: "
            "script what fusedsep.defuse returns, or use torch.jit.trace or torch.export"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.run_compiled(*args, **kwargs)
        if self.takes_one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            inputs: Any = args
        else:
            inputs = self.form.match(self.owner, args, kwargs)
        if inputs is None or self._needs_original():
            return self.run_original(*args, **kwargs)
        return self._program(self.owner, *inputs)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the owner's class."""
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What ``torch.compile`` sees: the kernels are not for it, so it gets the Python that it knows."""
        return self.run_original(*args, **kwargs)

    def _needs_original(self) -> bool:
        """Whether anything differs from what was traced: training mode, hooks, replaced modules, changed settings."""
        if self.owner.training or has_global_hooks():
            return True
        for siblings, name, module in self._slots or self._find_slots():
            if siblings.get(name) is not module:
                return True
        for module in self.bypassed:
            if module.training or has_hooks(module):
                return True
        return bool(self._values) and any(state.get(name) != value for state, name, value in self._values)

    def _find_slots(self) -> list[tuple[dict[str, Any], str, nn.Module]]:
        """Where the expected modules hang: not known before a copy of the owner is complete."""
        self._slots = []
        for path, module in self.expected.items():
            parent, _, name = path.rpartition(".")
            self._slots.append((self.owner.get_submodule(parent)._modules, name, module))
        self._values = [(vars(module), name, value) for module, name, value in self.settings]
        return self._slots

    def _compile(self) -> Callable[..., Any]:
        names = {**self.names, **self.sites}
        exec(compile(self.source, f"<forward of {type(self.owner).__name__}, fused>", "exec"), names)
        return names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        modules = {key: value.__name__ for key, value in self.names.items() if isinstance(value, types.ModuleType)}
        state["names"] = {key: value for key, value in self.names.items() if key not in modules}
        state["imports"] = modules
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        imports = state.pop("imports")
        state["names"].update({key: importlib.import_module(name) for key, name in imports.items()})
        vars(self).update(state, _slots=None)
        self._program = self._compile()


class FrozenForward(FusedForward):
    """A :class:`FusedForward` with sites that are folded, and so without an original to go back to.

    Args:
        forward: the one that it takes the place of; the owner holds the folded sites already.
        sites: its sites, folded or not.
    """

    def __init__(self, forward: FusedForward, sites: dict[str, Any]) -> None:
        vars(self).update(vars(forward))
        self.sites = sites
        wanted = {*forward.expected.values(), *(site for site in sites.values() if isinstance(site, nn.Module))}
        modules = dict(self.owner.named_modules(remove_duplicate=False))
        self.expected = {path: module for path, module in modules.items() if module in wanted}
        self.bypassed = [module for module in forward.bypassed if module in set(modules.values())]
        self.settings = [setting for setting in forward.settings if setting[0] in set(modules.values())]
        self._slots = None
        self._program = self._compile()

    def run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        if not self.takes_one_tensor or len(args) != 1 or kwargs:
            return self.run_original(*args, **kwargs)
        return self._program(self.owner, *args)

    def run_original(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"this call of the frozen {type(self.owner).__name__} is not the one that was frozen: other arguments than "
            "tensors and defaults, a hook on a merged module, a replaced module, a changed setting or training mode; "
            "use the model that freeze was called on for that"
        )


_SETTING_TYPES = (bool, int, float, str, tuple, type(None))


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


def fused_forward(
    owner: nn.Module, form: CallForm, opaque: set[nn.Module], helpers: list[Helper], inline: set[nn.Module]
) -> FusedForward:
    """Regenerate the forward of ``owner`` with every site in it as one call.

    Args:
        form: how the owner is called.
        opaque, helpers: what must stay one call.
        inline: the modules inside it to write out; all others stay calls.

    Raises:
        Untraceable: its Python cannot be written down.
    """
    tracer = Tracer(owner, form, opaque, helpers, inline)
    graph = tracer.run()
    modules = dict(owner.named_modules(remove_duplicate=False))
    for index, chain in enumerate(find_chains(graph, modules)[0]):
        site = FusedSite(chain, modules, f"separable_{index}")
        # In the place of the first node: later ones may come after something that changes the input in place.
        with graph.inserting_before(chain.nodes[0]):
            call = graph.call_function(site, (input_of(chain.nodes[0]),))
        chain.nodes[-1].replace_all_uses_with(call)
        for node in sorted(chain.nodes, reverse=True):
            graph.erase_node(node)
    for node in graph.nodes:
        node.type = None  # the text needs no annotations, and their names might not be importable
    graph.lint()
    try:
        code = graph.python_code("self")
        names = {name: value for name, value in code.globals.items() if not isinstance(value, FusedSite)}
        sites = {name: value for name, value in code.globals.items() if isinstance(value, FusedSite)}
        return FusedForward(owner, form, code.src, names, sites, tracer.inlined)
    except (RuntimeError, NotImplementedError, AttributeError, SyntaxError) as error:  # a call without a name
        raise Untraceable(owner, f"its graph cannot be written as Python: {error}") from error
