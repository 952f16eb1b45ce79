# SPDX-License-Identifier: BSD-3-Clause
"""Symbolic tracing that knows who called whom, and that refuses whatever it would record wrongly.

``torch.fx`` executes a forward once with symbolic values. Python that such a run cannot represent (a branch on a size,
an attribute that the forward writes, a ``no_grad`` block) would silently be baked in or dropped, so it raises
:class:`Untraceable` here, naming the module whose Python it is; the caller then keeps that module as it is.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from .._compat import FUNCTION_TRANSFORMS, load_dynamo
from .helpers import Helper, failing_helper, recorded
from .side_effects import RandomState, RealTensors, attributes_of, first_line, global_mode, restore_attributes

#: torch.fx and this module patch functions of the whole process while they trace: one thread at a time.
_TRACING = threading.RLock()

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONSTANT_TYPES = (bool, int, float, str, type(None), torch.dtype)
_NOT_TENSORS = {getattr, len, "size", "dim", "ndimension", "numel", "item", "tolist", "stride", "type"}


class Untraceable(Exception):
    """The Python of ``module`` cannot be written down as a graph; that of ``helper``, if there is one."""

    def __init__(self, module: nn.Module, reason: str, helper: Helper | None = None) -> None:
        super().__init__(reason)
        self.module = module
        self.helper = helper


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own layers (or derives from one), which a graph shows as one node."""
    return isinstance(module, torch.jit.ScriptModule) or any(
        base.__module__.startswith("torch.nn.") and base not in _CONTAINERS for base in type(module).__mro__
    )


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the class of ``module`` defines."""
    return types.MethodType(type(module).forward, module)


def signature_of(module: nn.Module) -> inspect.Signature:
    """How :func:`original_forward` is called."""
    return inspect.signature(original_forward(module))


class TracedTensor:
    """Stands, in a :class:`CallForm`, for an argument that was a symbolic tensor."""


class TracedValue:
    """Stands, in a :class:`CallForm`, for an argument that was symbolic but not known to be a tensor."""


class CallForm:
    """How a forward is called: which of its arguments vary from call to call, and the constants that the others had."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    @classmethod
    def of_root(cls, module: nn.Module) -> CallForm:
        """Only what has no default varies."""
        arguments: dict[str, Any] = {}
        for name, parameter in signature_of(module).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                arguments[name] = ()
            elif parameter.kind is parameter.VAR_KEYWORD:
                arguments[name] = {}
            else:
                arguments[name] = TracedTensor if parameter.default is parameter.empty else parameter.default
        return cls(arguments)

    @classmethod
    def of_call(cls, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> CallForm:
        """What was symbolic in this call varies."""
        bound = signature_of(module).bind(*args, **kwargs)
        bound.apply_defaults()
        return cls({name: _to_form(value) for name, value in bound.arguments.items()})

    def is_comparable(self) -> bool:
        """Whether a later call can be compared with this one by value."""
        return _is_comparable(self.arguments)

    def is_one_tensor(self, module: nn.Module) -> bool:
        """Whether the usual call is ``module(x)``: one positional tensor, everything else as the signature defaults."""
        parameters = signature_of(module).parameters.items()
        (_, first), *rest = [(self.arguments[name], parameter) for name, parameter in parameters]
        return (
            self.arguments[first.name] is TracedTensor
            and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
            and all(form in ((), {}) or form == parameter.default for form, parameter in rest)
        )

    def fill(self, module: nn.Module, make: Callable[[str, type], Any]) -> inspect.BoundArguments:
        """The arguments with ``make(name, marker)`` wherever something varies."""
        bound = signature_of(module).bind_partial()
        for name, form in self.arguments.items():
            bound.arguments[name] = _fill(name, form, make)
        return bound

    def match(self, signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """What varies, taken out of an actual call in the order of :meth:`fill`; ``None`` if the constants differ."""
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        found: list[Any] = []
        return found if _match(self.arguments, dict(bound.arguments), found) else None


def _to_form(value: Any) -> Any:
    if isinstance(value, TensorProxy):
        return TracedTensor
    if isinstance(value, fx.Proxy):
        return TracedValue
    if type(value) in (list, tuple):
        return type(value)(_to_form(item) for item in value)
    if type(value) is dict:
        return {key: _to_form(item) for key, item in value.items()}
    return value


def _is_comparable(form: Any) -> bool:
    if type(form) in (list, tuple):
        return all(map(_is_comparable, form))
    if type(form) is dict:
        return all(map(_is_comparable, form.values()))
    return form in (TracedTensor, TracedValue) or isinstance(form, _CONSTANT_TYPES)


def _fill(name: str, form: Any, make: Callable[[str, type], Any]) -> Any:
    if form is TracedTensor or form is TracedValue:
        return make(name, form)
    if type(form) in (list, tuple):
        return type(form)(_fill(name, item, make) for item in form)
    if type(form) is dict:
        return {key: _fill(name, item, make) for key, item in form.items()}
    return form


def _match(form: Any, value: Any, found: list[Any]) -> bool:
    if form is TracedTensor or form is TracedValue:
        found.append(value)
        return not isinstance(value, fx.Proxy) and (form is TracedValue or isinstance(value, torch.Tensor))
    if type(form) is not type(value):
        return False
    if isinstance(form, (list, tuple)):
        return len(form) == len(value) and all(_match(a, b, found) for a, b in zip(form, value, strict=True))
    if isinstance(form, dict):
        return form.keys() == value.keys() and all(_match(item, value[key], found) for key, item in form.items())
    return form == value


class TensorProxy(fx.Proxy):
    """A symbolic value that is a tensor: ``x += y`` changes it, where :class:`fx.Proxy` makes ``x + y`` of that."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[TensorProxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(TensorProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


@contextlib.contextmanager
def _passing_for_tensors() -> Iterator[None]:
    """For a while, a forward that asks ``isinstance(x, torch.Tensor)`` hears yes for a :class:`TensorProxy`.

    Only Python does. A proxy with ``__class__ = torch.Tensor`` would tell C++ the same, which then reads its memory.
    Dynamo, which a forward may load (``torch.utils.checkpoint`` does), would learn the wrong builtins meanwhile: it is
    loaded before.
    """
    load_dynamo()
    isinstance_of_python = builtins.isinstance

    def is_instance(value: Any, kind: Any, /) -> bool:
        if isinstance_of_python(value, kind):
            return True
        if type(value) is not TensorProxy:
            return False
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if asked_by.startswith(FUNCTION_TRANSFORMS):  # autograd.Function asks there too, and has its own gradient
            raise fx.proxy.TraceError("calls an autograd.Function or a transform of torch.func")
        if asked_by.startswith(("torch.", "fusedsep.")):
            return False
        if value.node.meta.get("opaque"):
            raise fx.proxy.TraceError("asks for the type of what a submodule of unknown output returned")
        return issubclass(torch.Tensor, kind)

    builtins.isinstance = is_instance
    try:
        yield
    finally:
        builtins.isinstance = isinstance_of_python


class Call:
    """One call of a module during a trace."""

    def __init__(self, module: nn.Module, form: CallForm) -> None:
        self.module = module
        self.form = form


class Tracer(fx.Tracer):
    """Traces ``root`` called as ``form`` says.

    Every node carries ``meta["calls"]``: the stack of :class:`Call` that it was made under, outermost first.

    Args:
        root, form: what to trace, and how it is called.
        opaque: custom modules to show as one node.
        helpers: functions to show as one node.
        inline: if given, the only modules to look into; otherwise every custom module that is not ``opaque``.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        root: nn.Module,
        form: CallForm,
        opaque: set[nn.Module],
        helpers: Sequence[Helper] = (),
        inline: set[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._form = form
        self._opaque = opaque
        self._helpers = helpers
        self._inline = inline
        self._mode = global_mode()
        self._calls = [Call(root, form)]
        self._blamed: nn.Module | None = None
        #: Modules looked into, and those called at all.
        self.inlined: set[nn.Module] = {root}
        self.called: set[nn.Module] = {root}
        #: Modules that one node could not stand for: they hand their input on, or return several values.
        self.see_through: set[nn.Module] = set()

    def run(self) -> fx.Graph:
        """The graph of the root. Raises :class:`Untraceable`."""
        with _TRACING:
            return self._run()

    def _run(self) -> fx.Graph:
        root = self._calls[0].module
        before = {module: attributes_of(module) for module in root.modules()}
        random_state = RandomState()
        try:
            with recorded(self._helpers, self._record), _passing_for_tensors(), RealTensors():
                graph = self.trace(root)
                _check_random_numbers(random_state)
        except Exception as error:  # whatever the forward raises when it meets symbolic values
            helper = failing_helper(error, {Tracer._run.__code__, Tracer.call_module.__code__})
            raise Untraceable(self._blamed or root, first_line(error), helper) from error
        finally:
            random_state.restore()
            changed = [module for module, attributes in before.items() if restore_attributes(module, attributes)]
        if changed:
            raise Untraceable(changed[0], "its forward writes attributes")
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        def placeholder(name: str, marker: type) -> fx.Proxy:
            kind = TensorProxy if marker is TracedTensor else fx.Proxy
            target = f"{name}_{len(self.graph.nodes)}"  # a list gives several of one name
            proxy = self.create_proxy("placeholder", target, (), {}, proxy_factory_fn=lambda node: kind(node, self))
            proxy.node.meta["tensor"] = marker is TracedTensor
            return proxy

        bound = self._form.fill(self.root, placeholder)

        def call_root():
            return root_fn(self.root, *bound.args, **bound.kwargs)

        return call_root, []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._inline is not None:
            return m not in self._inline
        return m in self._opaque or is_layer(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        self.called.add(m)
        if self.is_leaf_module(m, path):
            proxy = self.create_proxy("call_module", path, args, kwargs)
            proxy.node.meta["opaque"] = m in self._opaque
            return proxy
        self._check_mode()
        self.inlined.add(m)
        self._calls.append(Call(m, CallForm.of_call(m, args, kwargs)))
        size = len(self.graph.nodes)
        random_state = RandomState()
        try:
            result = type(m).forward(m, *args, **kwargs)
            _check_random_numbers(random_state)
        except Exception:
            self._blamed = self._blamed or m
            raise
        finally:
            self._calls.pop()
        if not isinstance(result, TensorProxy) or len(self.graph.nodes) == size:
            self.see_through.add(m)
        return result

    def _record(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Proxy:
        proxy = self.create_proxy("call_function", function, args, kwargs)
        proxy.node.meta["opaque"] = True
        return proxy

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        self._check_mode()
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        node.meta["calls"] = tuple(self._calls)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise fx.proxy.TraceError("its forward creates a tensor that does not depend on the input")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        tensor = node.op in ("call_module", "get_attr") or (
            node.target not in _NOT_TENSORS and any(argument.meta.get("tensor") for argument in node.all_input_nodes)
        )
        if node.target is operator.getitem and not node.args[0].meta.get("tensor"):
            tensor = False
        node.meta["tensor"] = tensor
        return TensorProxy(node, self) if tensor else fx.Proxy(node, self)

    def _check_mode(self) -> None:
        if global_mode() != self._mode:
            raise fx.proxy.TraceError("its forward changes the grad or autocast mode, or checkpoints")


def _check_random_numbers(state: RandomState) -> None:
    if not state.is_current():  # from a generator that is none of torch's, or torch was seeded
        raise fx.proxy.TraceError("its forward draws random numbers")
