# SPDX-License-Identifier: BSD-3-Clause
"""A fused model notices what the regenerated forwards did not foresee: hooks, edits, other arguments, odd Python."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import (
    Branching,
    DropPath,
    FunctionalBlock,
    PaddedBlock,
    TimmBlock,
    WithDefaults,
    chain,
    depthwise,
    pointwise,
)
from randomize import randomized
from subprocesses import run_code
from torch.utils.checkpoint import checkpoint
from zoo import assert_as_close_to_float64

import fusedsep


def hooked(model, path):
    """How often a forward hook on the module at ``path`` fires in one eval call of the fused model."""
    fused = fusedsep.fuse(model)
    fired = []
    fused.get_submodule(path).register_forward_hook(lambda *_: fired.append(path))
    fused(torch.randn(1, 4, 8, 8))
    return len(fired)


@pytest.mark.parametrize("path", ["0", "0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "1", "2"])
def test_forward_hooks_fire_everywhere(path):
    model = nn.Sequential(chain(nn.Dropout(), nn.ReLU()), nn.ReLU(), nn.Identity()).eval()
    assert hooked(model, path) == 1


@pytest.mark.parametrize("path", ["bn1.act", "bn1.drop", "bn1", "se", "drop_path"])
def test_forward_hooks_fire_inside_a_bn_with_activation(path):
    assert hooked(TimmBlock(4, 4).eval(), path) == 1


def test_forward_hook_fires_on_a_module_that_passes_its_input_on():
    assert hooked(nn.Sequential(*chain(nn.ReLU(), DropPath())).eval(), "3") == 1


def test_forward_hook_fires_on_padding():
    assert hooked(PaddedBlock(4, nn.ZeroPad2d(1)).eval(), "pad") == 1


def test_pre_hook_changes_what_the_pointwise_convolution_sees():
    model = randomized(chain(nn.ReLU())).eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    for network in (model, fused):
        network[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    torch.testing.assert_close(fused(x), model(x))


def test_hook_for_all_modules_fires():
    fused = fusedsep.fuse(chain(nn.ReLU()).eval())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fused(torch.randn(1, 4, 8, 8))
    finally:
        handle.remove()
    assert seen == [*fused, fused]


def test_backward_hook_on_the_activation_fires():
    fused = fusedsep.fuse(chain(nn.ReLU()).eval())
    fired = []
    fused[2].register_full_backward_hook(lambda *_: fired.append(1))
    fused(torch.randn(1, 4, 8, 8)).sum().backward()
    assert fired == [1]


def test_sites_resume_when_a_hook_is_removed(kernel_calls):
    fused = fusedsep.fuse(chain(nn.ReLU()).eval())
    handle = fused[2].register_forward_hook(lambda *_: None)
    fused(torch.randn(1, 4, 8, 8))
    assert not kernel_calls
    handle.remove()
    fused(torch.randn(1, 4, 8, 8))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize(
    "index, other",
    [(0, depthwise(4, kernel=5)), (1, nn.Identity()), (2, nn.LeakyReLU(0.2)), (3, pointwise(4, 6, bias=True))],
    ids=["depthwise", "BN", "activation", "pointwise"],
)
def test_replaced_children_are_noticed(index, other):
    model = randomized(chain(nn.ReLU())).eval()
    fused = fusedsep.fuse(model)
    model[index] = fused[index] = other
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(fused(x), model(x))


def test_a_replaced_list_of_children_is_noticed(kernel_calls):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(randomized(chain(nn.ReLU())))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Listed().eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    fused(x)
    assert len(kernel_calls) == 1
    model.layers = fused.layers = nn.ModuleList(randomized(chain(nn.ReLU6()), seed=1)).eval()
    assert torch.equal(fused(x), model(x))


def test_changed_parameters_buffers_and_dtype_are_noticed():
    model = randomized(chain(nn.ReLU())).eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        fused(x)
        for network in (model, fused):
            network[0].weight.mul_(2)
            network[1].running_mean.add_(1)
            network[4].eps = 0.5
        assert_as_close_to_float64(fused, model, x)
        torch.testing.assert_close(fused.double()(x.double()), model.double()(x.double()))


def test_changed_setting_of_the_forward_is_noticed():
    class Switch(FunctionalBlock):
        twice = False

        def __init__(self):
            super().__init__(F.relu)
            self.scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = Switch().eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 5, 8, 8)
    model.scale = fused.scale = 3.0
    torch.testing.assert_close(fused(x), model(x))


def test_part_of_an_eval_model_in_training_mode():
    model = randomized(nn.Sequential(*chain(nn.ReLU(), nn.Dropout(0.5)))).eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    for network in (model, fused):
        network[3].train()
    outputs = []
    for network in (model, fused):
        torch.manual_seed(0)
        outputs.append(network(x))
    torch.testing.assert_close(*outputs)


def test_arguments_other_than_the_defaults(kernel_calls):
    model = randomized(WithDefaults()).eval()
    fused = fusedsep.fuse(model)
    x, mask = torch.randn(1, 3, 8, 8), torch.rand(1, 1, 8, 8)
    for args, kwargs, runs_site in [
        ((x,), {}, True),
        ((x, None), {}, True),
        ((), {"x": x, "return_features": False}, True),
        ((x,), {"return_features": True}, False),
        ((x, mask), {}, False),
        ((x, mask, True), {}, False),
    ]:
        kernel_calls.clear()
        torch.testing.assert_close(fused(*args, **kwargs), model(*args, **kwargs))
        assert bool(kernel_calls) == runs_site
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        fused(x, masks=mask)


def test_arguments_that_the_caller_gives_to_the_owner(kernel_calls):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(nn.ReLU())

        def forward(self, x, skips, size=None, *, scale=True):
            x = torch.cat([x, skips[0]], dim=1)
            x = self.body[4](self.body[3](self.body[2](self.body[1](self.body[0](x)))))
            return x * 2 if scale else F.interpolate(x, size)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def forward(self, x):
            return self.decoder(x, [x, x], x.shape[-2:], scale=False)

    model = Net().eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(fused(x), model(x))
    assert len(kernel_calls) == 1


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain(nn.ReLU())
        self.last = None

    def forward(self, x):
        self.last = x
        return self.body(x)


class DependsOnType(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain(nn.ReLU())

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x[0]
        return self.body[3](self.body[2](self.body[1](self.body[0](x))))


class MakesATensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain(nn.ReLU())

    def forward(self, x):
        return self.body(x) + torch.rand(1) * 0 + torch.ones(1)


class WithoutGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain(nn.ReLU())

    def forward(self, x):
        with torch.no_grad():
            return self.body(x)


@pytest.mark.parametrize("kind", [Remembers, DependsOnType, MakesATensor, WithoutGrad])
@pytest.mark.parametrize("wrap", [False, True], ids=["root", "child"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_python_that_a_trace_would_lose_keeps_working(kind, wrap, mode, kernel_calls):
    model = randomized(kind()).eval()
    model = nn.Sequential(nn.ReLU(), model) if wrap else model
    fused = copy.deepcopy(model)
    with mode():
        fusedsep.fuse(fused, inplace=True)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    ours, theirs = fused(x), model(x)
    torch.testing.assert_close(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad
    assert len(kernel_calls) == 1
    inner = fused[1] if wrap else fused
    assert getattr(inner, "last", None) is None or isinstance(inner.last, torch.Tensor)
    assert (kind is Remembers) == hasattr(inner, "last")
    if kind is Remembers:
        assert inner.last is not None


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return -grad_output


#: Calls that end in C++, which must never take a symbolic value for a tensor.
PAST_PYTHON = {
    "autograd.Function": Reversal.apply,
    "checkpoint": lambda x: checkpoint(torch.cos, x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(torch.cos, x, use_reentrant=True),
    "torch.func": lambda x: torch.func.grad(lambda y: y.sin().sum())(x),
    "as_tensor": lambda x: torch.as_tensor(x) * 2,
    "dlpack": lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())) + x,
    "data": lambda x: setattr(x.clone(), "data", x) or x * 2,
    "pybind11": lambda x: x * (1 + torch._C._functorch.is_batchedtensor(x)),
}


@pytest.mark.parametrize("name", PAST_PYTHON)
def test_calls_that_python_does_not_see(name, kernel_calls):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(nn.ReLU())

        def forward(self, x):
            return self.body(PAST_PYTHON[name](x))

    model = randomized(Calls()).double().eval()
    fused = fusedsep.fuse(model)
    results = []
    for network in (model, fused):
        x = torch.randn(1, 4, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = network(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results)
    assert len(kernel_calls) == 1


def test_a_forward_that_collects_maps():
    class Collects(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.maps = chain(nn.ReLU()), []

        def forward(self, x):
            x = self.body(x)
            self.maps.append(x)
            return x

    fused = fusedsep.fuse(Collects().eval())
    assert fused.maps == []
    y = fused(torch.randn(1, 4, 8, 8))
    assert len(fused.maps) == 1
    assert fused.maps[0] is y


def test_a_list_in_place_of_the_tensor(kernel_calls):
    model = DependsOnType().eval()
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(fused([x]), model([x]))
    assert not kernel_calls


def test_forward_that_a_user_replaced_is_kept():
    model = Branching(chain(nn.ReLU())).eval()
    model.body.forward = lambda x: x * 2
    fused = fusedsep.fuse(model)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(fused(x), x * 2)
    fusedsep.defuse(fused)
    assert torch.equal(fused(x), x * 2)


def test_threads_that_fuse_at_once_leave_python_as_it_was():
    finished = run_code(
        """
        import builtins
        from concurrent.futures import ThreadPoolExecutor
        import fusedsep
        before = builtins.isinstance
        models = [fusedsep.MobileNetV1(10, 0.25) for _ in range(2)] + [
            fusedsep.reference.MobileNetV1(10, 0.25) for _ in range(6)
        ]
        with ThreadPoolExecutor(8) as pool:
            fused = list(pool.map(fusedsep.fuse, models))
        assert builtins.isinstance is before
        assert [len(fusedsep.fusion_report(model).fused) for model in fused] == [13] * 8
        """
    )
    assert finished.returncode == 0, finished.stderr
