# SPDX-License-Identifier: BSD-3-Clause
"""A regenerated forward that runs sites as one operation, and the conditions under which it is the original one."""

from __future__ import annotations

import copy
import importlib
import itertools
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from .. import _C
from .._compat import HOOKS, has_global_hooks, has_hooks, is_plain_convolution
from .._convolution import ConvNormActivation
from .._dictionaries import Snapshot
from .._separable import SeparableConv
from .batch_norms import is_plain_batch_norm
from .dropouts import is_dropout
from .helpers import Helper
from .settings import is_constant, is_setting, names_read_by
from .sites import Chain, ConvolutionChain, find_chains, input_of
from .tracing import CallForm, Tracer, Untraceable, signature_of


class RegeneratedForward:
    """What stands as ``forward`` on a module whose Python was regenerated: equivalent to the forward of its class."""


class FusedCall:
    """One call in a regenerated forward that runs several modules as one operation."""

    def __init__(self, nodes: list[fx.Node], modules: dict[str, nn.Module], name: str) -> None:
        self.__name__ = name
        #: Every module that the call stands for: activations and padding too, and what a BN carries.
        self.modules = [
            part
            for node in nodes
            if node.op == "call_module"
            for name, part in modules[node.target].named_modules()
            if not name.startswith("parametrizations")
        ]

    def norms(self) -> list[nn.Module]:
        """The BNs that there are."""
        raise NotImplementedError

    def read(self) -> list[nn.Module]:
        """The modules whose Python somebody has read for this, so that it holds for the mode that they were in."""
        return []

    def numbers(self) -> list[nn.Module]:
        """The modules whose parameters and buffers the call reads."""
        raise NotImplementedError


class FusedConvolution(FusedCall):
    """One call of :class:`ConvNormActivation`."""

    def __init__(self, chain: ConvolutionChain, modules: dict[str, nn.Module], name: str) -> None:
        super().__init__(chain.nodes, modules, name)
        self.conv = modules[chain.conv.target]
        self.bn = modules[chain.bn2.target]
        self.operation = ConvNormActivation(chain.pointwise_activation, chain.carried_activations[1])
        if not is_plain_convolution(self.conv):
            self.operation.self_padding_class = type(self.conv)
            self.operation.carried_pad = chain.carried_pad
        self.operation.norm_forwards |= {type(self.bn).forward}
        self.operation.training_norm_forwards = self.operation.norm_forwards  # it was read in training mode

    def norms(self) -> list[nn.Module]:
        return [self.bn]

    def read(self) -> list[nn.Module]:
        return [] if self.operation.self_padding_class is None else [self.conv]

    def numbers(self) -> list[nn.Module]:
        return [self.conv, self.bn]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x, self.conv, self.bn)


class FusedSite(FusedCall):
    """One call of :class:`SeparableConv`."""

    def __init__(self, chain: Chain, modules: dict[str, nn.Module], name: str) -> None:
        def module_of(node: fx.Node | None) -> nn.Module | None:
            return None if node is None else modules[node.target]

        super().__init__(chain.nodes, modules, name)
        self.text = str(chain)
        self.dw = module_of(chain.dw)
        self.bn1 = module_of(chain.bn1)
        self.pw = module_of(chain.pw)
        self.bn2 = module_of(chain.bn2)
        self.separable = CarryingConv(chain)
        # Whoever found the chain has read the forwards of subclasses: in training mode, that of a BN for both modes.
        self.separable.self_padding_class = None if is_plain_convolution(self.dw) else type(self.dw)
        for bn in self.norms():
            self.separable.norm_forwards |= {type(bn).forward}
            if bn.training:
                self.separable.training_norm_forwards |= {type(bn).forward}

    def norms(self) -> list[nn.Module]:
        return [bn for bn in (self.bn1, self.bn2) if bn is not None]

    def read(self) -> list[nn.Module]:
        return [] if self.separable.self_padding_class is None else [self.dw]

    def numbers(self) -> list[nn.Module]:
        return [self.dw, self.pw, *self.norms()]

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


class Program:
    """A regenerated forward of ``owner``, traced with every module in the mode that it is in now.

    Args:
        owner: the module; its class keeps the original forward.
        form: how the owner was called when it was traced.
        source, names: the forward as Python text, and the global names that it uses.
        sites: the callables among those names that run a site, or a chain of layers.
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
        self.takes_one_tensor = form.is_one_tensor(owner)

        parts = {part for site in sites.values() for part in site.modules}
        run_by_the_sites = {part for site in sites.values() for part in site.numbers()}
        # Whose Python was read, besides the BNs: written out in ``source``, or tried.
        read_by_sites = {part for site in sites.values() for part in site.read()}
        read = inlined | read_by_sites
        norms = {bn for site in sites.values() for bn in site.norms() if not is_plain_batch_norm(bn)}
        carried = {part: whole for whole in norms | read_by_sites for part in whole.modules() if part is not whole}
        dropouts = {part for part in parts if is_dropout(part)}
        #: Modules that are never called now: a hook of theirs needs the original forward.
        self.bypassed = [
            module
            for module in parts | inlined
            if module is not owner and (module in read or module not in run_by_the_sites)
        ]
        #: The same with their classes.
        self.kinds = [(module, type(module)) for module in self.bypassed]
        #: Modules whose mode must be that of another one. A BN may be in any: the site looks at each call.
        self.modes = list(carried.items())
        self.modes += [(part, owner) for part in read | dropouts if part is not owner and part not in carried]
        #: Attributes that this Python, or what was found out about it, may depend on.
        self.settings = [
            (module, name, copy.deepcopy(value) if isinstance(value, (list, set, dict)) else value)
            for module in {owner, *self.bypassed, *norms} - (set() if owner.training else dropouts)
            for name, value in vars(module).items()
            if name != "training" and name in names_read_by(module) and is_setting(value)
        ]
        self.slots = _slots(owner, parts | inlined)
        self._prepare()

    def with_sites(self, sites: dict[str, Any]) -> Program:
        """The same forward with other callables for its sites: the owner holds those that are modules already."""
        program = Program.__new__(Program)
        vars(program).update(vars(self), sites=sites)
        modules = set(self.owner.modules())
        expected = {module for _, _, module in self.slots} | set(sites.values())
        program.slots = _slots(self.owner, expected & modules)
        program.bypassed = [module for module in self.bypassed if module in modules]
        program.kinds = [(module, kind) for module, kind in self.kinds if module in modules]
        program.modes = [(module, like) for module, like in self.modes if {module, like} <= modules]
        program.settings = [setting for setting in self.settings if setting[0] in modules]
        program._prepare()
        return program

    def arguments_of(self, args: tuple, kwargs: dict[str, Any]) -> Sequence[Any] | None:
        """What to run it on for a call of the owner, or ``None`` if that is another call than was traced."""
        if self.takes_one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            return args
        return self.form.match(self._signature, args, kwargs)

    def holds(self) -> bool:
        """Whether all is as it was traced: no hooks, the same modules, modes and settings."""
        if has_global_hooks():
            return False
        if torch.compiler.is_compiling():  # which reads Python, and looks at the same things before every later call
            return not self._has_changed()
        if self._facts is None:
            self._facts = self._collect_facts()
            self._dictionaries, self._other_facts = self._split_facts()
        if self._seen is not None and self._seen.is_current():
            return _C.facts_hold(*self._other_facts)
        seen = Snapshot(self._dictionaries)  # before a look at what is in them
        holds = _C.facts_hold(*self._facts)
        self._seen = seen if holds else None
        return holds

    def _has_changed(self) -> bool:
        for parent, name, module in self.slots:
            if parent._modules.get(name) is not module:
                return True
        for module, kind in self.kinds:
            if type(module) is not kind or has_hooks(module) or _runs_another_forward(module):
                return True
        for module, like in self.modes:
            if module.training is not like.training:
                return True
        for module, name, value in self.settings:  # noqa: SIM110, a generator costs more
            if module.__dict__.get(name) != value:
                return True
        return False

    def _collect_facts(self) -> tuple[tuple[Any, ...], ...]:
        """What :meth:`_has_changed` looks at, for one call of ``_C.facts_hold``."""
        parents = {parent: None for parent, _, _ in self.slots}
        identical = [(vars(parent), "_modules", parent._modules) for parent in parents]
        identical += [(parent._modules, name, module) for parent, name, module in self.slots]
        same = [(vars(module), "training", vars(like)) for module, like in self.modes]
        equal = [(vars(module), name, value) for module, name, value in self.settings]
        empty = [(vars(module), name) for module, _ in self.kinds for name in HOOKS]
        absent = [
            (vars(module), name, RegeneratedForward) for module, _ in self.kinds for name in _steps_of_forward(module)
        ]
        return tuple(tuple(itertools.chain(*facts)) for facts in (identical, same, equal, empty, absent, self.kinds))

    def _split_facts(self) -> tuple[tuple[dict[str, Any], ...], tuple[tuple[Any, ...], ...]]:
        """The dictionaries that hold the facts, and the facts that may change without a change of any of them."""
        modules = {parent for parent, _, _ in self.slots} | {module for pair in self.modes for module in pair}
        modules |= {module for module, _, _ in self.settings}
        kept = [*map(vars, modules), *(parent._modules for parent, _, _ in self.slots)]
        for module, _ in self.kinds:
            kept += [vars(module), *(vars(module)[name] for name in HOOKS)]
        mutable = [(vars(module), name, value) for module, name, value in self.settings if not is_constant(value)]
        others = ((), (), tuple(itertools.chain(*mutable)), (), (), tuple(itertools.chain(*self.kinds)))
        return tuple({id(each): each for each in kept}.values()), others

    def __call__(self, *arguments: Any) -> Any:
        return self._function(self.owner, *arguments)

    def _prepare(self) -> None:
        """Make what a pickle cannot hold."""
        names = {**self.names, **self.sites}
        exec(compile(self.source, f"<forward of {type(self.owner).__name__}, fused>", "exec"), names)
        self._function = names["forward"]
        self._facts: tuple[tuple[Any, ...], ...] | None = None
        self._seen: Snapshot | None = None  # when all facts held
        self._signature = signature_of(self.owner)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        modules = {key: value.__name__ for key, value in self.names.items() if isinstance(value, types.ModuleType)}
        state["names"] = {key: value for key, value in self.names.items() if key not in modules}
        state["imports"] = modules
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        imports = state.pop("imports")
        state["names"].update({key: importlib.import_module(name) for key, name in imports.items()})
        vars(self).update(state)
        self._prepare()


def _runs_another_forward(module: nn.Module) -> bool:
    own = vars(module)
    return any(name in own and not isinstance(own[name], RegeneratedForward) for name in _steps_of_forward(module))


def _steps_of_forward(module: nn.Module) -> tuple[str, ...]:
    """What somebody may put on ``module`` itself to have it run other Python."""
    return ("forward", "_conv_forward") if isinstance(module, nn.Conv2d) else ("forward",)


def _slots(owner: nn.Module, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Where ``modules`` hang below ``owner``: each step of every path to them, as parent, name and child."""
    wanted = set(modules)
    slots: dict[tuple[nn.Module, str], nn.Module] = {}
    for path, module in owner.named_modules(remove_duplicate=False):
        if module not in wanted or not path:
            continue
        parent = owner
        for name in path.split("."):
            child = parent._modules[name]
            slots[parent, name] = child
            parent = child
    return [(parent, name, child) for (parent, name), child in slots.items()]


def write_program(
    owner: nn.Module, form: CallForm, opaque: set[nn.Module], helpers: list[Helper], inline: set[nn.Module]
) -> Program:
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
    replace_sites(graph, modules)
    return program_from(graph, owner, form, FusedCall, tracer.inlined)


def program_from(graph: fx.Graph, owner: nn.Module, form: CallForm, kind: type, inlined: set[nn.Module]) -> Program:
    """The :class:`Program` of ``graph``, in which calls of ``kind`` run the sites.

    Raises:
        Untraceable: its Python cannot be written down.
    """
    for node in graph.nodes:
        node.type = None  # the text needs no annotations, and their names might not be importable
    graph.lint()
    try:
        code = graph.python_code("self")
        names = {name: value for name, value in code.globals.items() if not isinstance(value, kind)}
        sites = {name: value for name, value in code.globals.items() if isinstance(value, kind)}
        return Program(owner, form, code.src, names, sites, inlined)
    except (RuntimeError, NotImplementedError, AttributeError, SyntaxError) as error:  # a call without a name
        raise Untraceable(owner, f"its graph cannot be written as Python: {error}") from error


def replace_sites(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Make one call of a :class:`FusedCall` of every site in ``graph``.

    It was made under all calls of its nodes; ``meta["around"]`` has those that all of them were made under.
    """
    for index, chain in enumerate(find_chains(graph, modules)[0]):
        if isinstance(chain, Chain):
            site = FusedSite(chain, modules, f"separable_{index}")
        else:
            site = FusedConvolution(chain, modules, f"convolution_{index}")
        # In the place of the first node: later ones may come after something that changes the input in place.
        with graph.inserting_before(chain.nodes[0]):
            call = graph.call_function(site, (input_of(chain.nodes[0]),))
        stacks = [node.meta["calls"] for node in chain.nodes]
        call.meta["calls"] = tuple({made: None for stack in stacks for made in stack})
        call.meta["around"] = tuple(made for made in stacks[0] if all(made in stack for stack in stacks))
        chain.nodes[-1].replace_all_uses_with(call)
        for node in sorted(chain.nodes, reverse=True):
            graph.erase_node(node)
