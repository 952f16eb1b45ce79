# SPDX-License-Identifier: BSD-3-Clause
"""The private names of torch behind fusedsep/_compat.py do what the package takes them to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedsep
from fusedsep import _compat


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vjp(f, x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.functionalize(f)(x),
    ],
    ids=["grad", "vmap", "jvp", "vjp", "jacrev", "jacfwd", "functionalize"],
)
def test_functorch_is_active_inside_its_transforms(transform):
    seen = []

    def function(x):
        seen.append(_compat.functorch_is_active())
        return x.sum()

    assert not _compat.functorch_is_active()
    transform(function, torch.ones(3))
    assert seen
    assert all(seen)
    assert not _compat.functorch_is_active()


def test_forward_ad_is_active_inside_a_dual_level():
    assert not _compat.forward_ad_is_active()
    with forward_ad.dual_level():
        assert _compat.forward_ad_is_active()
    assert not _compat.forward_ad_is_active()


def test_a_dispatch_mode_is_active_inside_it():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    assert not _compat.dispatch_mode_is_active()
    for mode in (Mode(), FlopCounterMode(display=False), torch._subclasses.FakeTensorMode()):
        with mode:
            assert _compat.dispatch_mode_is_active()
        assert not _compat.dispatch_mode_is_active()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("cpu")])
def test_ordinary_contexts_are_no_dispatch_modes(context):
    with context():
        assert not _compat.dispatch_mode_is_active()


def test_saved_tensors_hooks_are_noticed():
    seen = []
    assert not _compat.has_saved_tensors_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert _compat.has_saved_tensors_hooks()
    checkpoint(lambda x: seen.append(_compat.has_saved_tensors_hooks()) or x, torch.ones(3), use_reentrant=False)
    assert seen == [True]
    assert not _compat.has_saved_tensors_hooks()


def test_every_backward_has_a_number():
    numbers = []
    x = torch.ones(3, requires_grad=True)
    y = (x * 1).sum()
    x.register_hook(lambda _: numbers.append(_compat.current_backward()))
    y.backward(retain_graph=True)
    y.backward()
    assert len(set(numbers)) == 2
    assert _compat.current_backward() == -1
    assert -1 not in numbers


def test_a_storage_is_known_again():
    x = torch.ones(3)
    storage = x.untyped_storage()
    assert _compat.lies_in(x[1:], storage)
    assert not _compat.lies_in(x.clone(), storage)
    x.data = torch.ones(3)
    assert not _compat.lies_in(x, storage)


def test_below_autograd_no_graph_is_made_whatever_the_grad_mode():
    x = torch.ones(3, requires_grad=True)
    with _compat.below_autograd():
        assert torch.is_grad_enabled()
        assert not torch.relu(x).requires_grad
    assert torch.relu(x).requires_grad


def test_below_autograd_a_kernel_for_autograd_is_passed_by():
    library = torch.library.Library("fusedsep_test_compat", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    operator = torch.ops.fusedsep_test_compat.twice.default
    calls = []

    def kernel(x):
        calls.append(x)
        with _compat.below_autograd():
            return operator(x)

    library.impl("twice", kernel, "Autograd")
    x = torch.ones(3)
    assert torch.equal(operator(x), 2 * x)
    assert len(calls) == 1
    with _compat.below_autograd():
        operator(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks_are_seen(register):
    assert not _compat.has_global_hooks()
    handle = register(lambda *_: None)
    try:
        assert _compat.has_global_hooks()
    finally:
        handle.remove()
    assert not _compat.has_global_hooks()


@pytest.mark.parametrize(
    "method",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_module_are_seen(method):
    module = nn.Conv2d(1, 1, 1)
    assert not _compat.has_hooks(module)
    handle = getattr(module, method)(lambda *_: None)
    assert _compat.has_hooks(module)
    handle.remove()
    assert not _compat.has_hooks(module)


def test_hooks_that_do_not_run_at_calls_do_not_count():
    module = nn.Conv2d(1, 1, 1)
    module.register_state_dict_post_hook(lambda *_: None)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    assert not _compat.has_hooks(module)


def test_every_private_name_of_torch_is_in_one_file():
    """`torch._C`, `module._forward_hooks` and the like occur nowhere else in the package."""
    package = Path(_compat.__file__).parent
    private = re.compile(r"\b(torch|forward_ad)\._[a-zA-Z]|\._(forward|backward)(_pre)?_hooks\b|\._has_any_global")
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "_compat.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert not found


def test_calls_of_an_autograd_function_ask_for_types_in_the_package_of_the_transforms(monkeypatch):
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    asked_by = set()
    of_python = isinstance

    def recorded(value, kind):
        asked_by.add(sys._getframe(1).f_globals["__name__"])
        return of_python(value, kind)

    monkeypatch.setattr("builtins.isinstance", recorded)
    Identity.apply(torch.ones(1))
    monkeypatch.undo()
    assert any(name.startswith(_compat.FUNCTION_TRANSFORMS) for name in asked_by)


class Doubled(nn.Conv2d):
    def _conv_forward(self, *arguments):
        return 2 * super()._conv_forward(*arguments)


def test_a_convolution_with_a_replaced_step_is_not_plain():
    assert _compat.is_plain_convolution(nn.Conv2d(4, 4, 3))
    assert not _compat.is_plain_convolution(Doubled(4, 4, 3))


def test_a_block_runs_the_replaced_step_of_its_convolution():
    dw, pw = Doubled(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)
    block = fusedsep.DepthwiseSeparableBlock.from_modules(dw, None, "relu", pw).eval()
    x = torch.randn(2, 4, 7, 7)
    expected = pw(dw(x).relu())
    torch.testing.assert_close(block(x), expected)
    model = nn.Sequential(dw, nn.ReLU(), pw).eval()
    assert fusedsep.fusion_report(model).fused == []
    torch.testing.assert_close(fusedsep.freeze(model)(x), expected)
