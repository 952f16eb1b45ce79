# SPDX-License-Identifier: BSD-3-Clause
"""The private names of torch that this package uses, each behind a function of our own (tests/test_compat.py)."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

#: The package that carries out the transforms of ``torch.func``, and the calls of an ``autograd.Function``.
FUNCTION_TRANSFORMS = "torch._functorch"

#: What forwards that are to be traced call in place of ``assert``.
TRACEABLE_ASSERT = torch._assert


def load_dynamo() -> None:
    """Load the package behind ``torch.compile``, as the first checkpoint or optimizer does."""
    importlib.import_module("torch._dynamo")


def functorch_is_active() -> bool:
    """Inside ``torch.func.grad``, ``vmap``, ``jvp`` and their relatives."""
    return torch._C._are_functorch_transforms_active()


def forward_ad_is_active() -> bool:
    """Inside ``torch.autograd.forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def dispatch_mode_is_active() -> bool:
    """Inside a ``TorchDispatchMode``: ``FakeTensorMode``, ``FlopCounterMode``, ``make_fx`` and whatever users write."""
    return torch._C._len_torch_dispatch_stack() > 0


def below_autograd() -> AbstractContextManager[object]:
    """Inside it, operators run as if no gradient were wanted, whatever their arguments and the grad mode are."""
    return torch._C._AutoDispatchBelowAutograd()


def has_saved_tensors_hooks() -> bool:
    """Inside ``torch.autograd.graph.saved_tensors_hooks``, ``torch.utils.checkpoint`` or another user of them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def current_backward() -> int:
    """Which run of the autograd engine this thread is in; -1 outside."""
    return torch._C._current_graph_task_id()


def lies_in(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether ``storage`` is that of ``tensor``; also of tensors without memory, as tracing has them."""
    return tensor.untyped_storage()._cdata == storage._cdata


def has_global_hooks() -> bool:
    """A hook registered for every module (``torch.nn.modules.module.register_module_forward_hook`` ...)."""
    return _module._has_any_global_hook()


#: Where a module keeps the hooks that run when it is called.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: torch.nn.Module) -> bool:
    """A hook that runs when ``module`` is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_patched_convolution(module: torch.nn.Module) -> bool:
    """A convolution with one of the two steps of ``torch.nn.Conv2d`` replaced on the instance."""
    return "forward" in module.__dict__ or "_conv_forward" in module.__dict__


def is_plain_convolution(module: torch.nn.Module) -> bool:
    """A ``torch.nn.Conv2d`` with neither of its two steps replaced, by the class or on the instance."""
    conv = torch.nn.Conv2d
    return (
        type(module).forward is conv.forward
        and type(module)._conv_forward is conv._conv_forward
        and not is_patched_convolution(module)
    )
