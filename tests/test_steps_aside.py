# SPDX-License-Identifier: BSD-3-Clause
"""Where the kernels would hide or miss something, the block is its five modules, run by torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode
from twins import assert_close, random, twins

from fusedsep import DepthwiseSeparableBlock


def assert_runs_through_torch(block, x, kernel_calls, expected):
    kernel_calls.clear()
    with torch.no_grad():
        assert_close(block(x), expected)
    assert not kernel_calls


@pytest.mark.parametrize("child", ["dw", "bn1", "pw", "bn2"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_children_fire(kernel_calls, child, register):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9).requires_grad_()
    fired = []
    handle = getattr(block.get_submodule(child), register)(lambda *_: fired.append(child))
    block(x).sum().backward()
    assert fired == [child]
    assert not kernel_calls
    handle.remove()
    assert_close(block(x), twin(x))
    assert len(kernel_calls) == 1


def test_a_hook_that_changes_a_map_changes_the_result(kernel_calls):
    block, twin = twins(5, 7)
    for model in (block, twin):
        model.bn1.register_forward_hook(lambda module, inputs, output: output + 1)
    x = random(2, 5, 6, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))


def test_global_hooks_fire(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    expected = twin(x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert_runs_through_torch(block, x, kernel_calls, expected)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, DepthwiseSeparableBlock]


def test_hooks_of_the_block_itself_do_not_need_torch(kernel_calls):
    block, _ = twins(5, 7)
    fired = []
    block.register_forward_hook(lambda *_: fired.append(True))
    with torch.no_grad():
        block(random(2, 5, 6, 9))
    assert fired == [True]
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("child", ["dw", "bn1", "pw", "bn2"])
def test_a_forward_put_on_a_child_runs(kernel_calls, child):
    block, twin = twins(5, 7)
    for model in (block, twin):
        module = model.get_submodule(child)
        module.forward = lambda x, original=module.forward: 2 * original(x)
    x = random(2, 5, 6, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))


def test_a_subclass_with_its_own_forward_runs(kernel_calls):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    block, twin = twins(5, 7)
    for model in (block, twin):
        pw = Doubled(5, 7, 1, bias=False, dtype=torch.double)
        pw.load_state_dict(model.pw.state_dict())
        model.pw = pw
    x = random(2, 5, 6, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))


def test_stride_three(kernel_calls):
    block, twin = twins(5, 7, 3)
    x = random(2, 5, 8, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kernel_calls, dtype):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9).to(dtype)
    block, twin = block.to(dtype), twin.to(dtype)
    with torch.no_grad():
        y = block(x)
    assert y.dtype == dtype
    assert torch.equal(y, twin(x))
    assert not kernel_calls


@pytest.mark.parametrize("of_block", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(kernel_calls, of_block):
    block, twin = twins(5, 7, dtype=torch.float32)
    x = random(2, 5, 6, 9, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", of_block if of_block == torch.bfloat16 else torch.float16):
        y, expected = block(x), twin(x)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert not kernel_calls


def test_functorch_transforms(kernel_calls):
    block, twin = twins(5, 7)
    parameters = dict(block.named_parameters())
    x = random(3, 2, 5, 6, 9)

    def per_image(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    torch.testing.assert_close(per_image(block), per_image(twin))
    assert_close(torch.func.vmap(block)(x), torch.func.vmap(twin)(x))
    tangent = random(2, 5, 6, 9, seed=1)
    torch.testing.assert_close(torch.func.jvp(block, (x[0],), (tangent,)), torch.func.jvp(twin, (x[0],), (tangent,)))
    assert not kernel_calls


def test_forward_mode_derivative(kernel_calls):
    block, twin = twins(5, 7)
    x, tangent = random(2, 5, 6, 9), random(2, 5, 6, 9, seed=1)
    with forward_ad.dual_level(), torch.no_grad():
        results = [forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))) for model in (block, twin)]
    assert_close(results[0].tangent, results[1].tangent)
    assert not kernel_calls


def test_a_dispatch_mode_sees_the_operations_it_knows(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    counts = []
    for model in (block, twin):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert not kernel_calls


def test_make_fx_does_not_freeze_the_parameters(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)

    def call(parameters, x):
        return torch.func.functional_call(block, parameters, (x,))

    with torch.no_grad():
        parameters = dict(block.named_parameters())
        traced = torch.fx.experimental.proxy_tensor.make_fx(call)(parameters, x)
        other = {name: parameter * 2 for name, parameter in parameters.items()}
        assert_close(traced(other, x), torch.func.functional_call(twin, other, (x,)))
    assert not kernel_calls


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as quantized and distributed weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrapped(value):
            return value.inner if isinstance(value, cls) else value

        result = function(*map(unwrapped, args), **{key: unwrapped(value) for key, value in (kwargs or {}).items()})
        return cls(result) if function is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("name", ["dw.weight", "pw.weight", "bn1.weight", "bn1.running_var", "bn2.bias"])
def test_tensor_subclasses_among_the_parameters(kernel_calls, name):
    block, twin = twins(5, 7)
    child, attribute = name.split(".")
    module = block.get_submodule(child)
    wrapped = Wrapper(getattr(module, attribute).detach())
    is_buffer = attribute.startswith("running")
    setattr(module, attribute, wrapped if is_buffer else nn.Parameter(wrapped, requires_grad=False))
    x = random(2, 5, 6, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))


def test_a_tensor_subclass_as_input(kernel_calls):
    class Named(torch.Tensor):
        pass

    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        y = block(x.as_subclass(Named))
        assert type(y) is Named
        assert_close(y.as_subclass(torch.Tensor), twin(x))
    assert not kernel_calls


def test_parametrized_weights(kernel_calls):
    block, twin = twins(5, 7)
    for model in (block, twin):
        torch.manual_seed(0)
        parametrizations.weight_norm(model.pw)
    x = random(2, 5, 6, 9)
    for step in range(2):
        assert_close(block(x), twin(x))
        for model in (block, twin):
            with torch.no_grad():
                model.pw.parametrizations.weight.original0.mul_(2 + step)
    assert len(kernel_calls) == 2


def test_spectral_norm_advances_as_in_unfused_training():
    block, twin = twins(5, 7)
    for model in (block, twin):
        torch.manual_seed(0)
        parametrizations.spectral_norm(model.dw)
        model.train()(random(2, 5, 6, 9))
    torch.testing.assert_close(dict(block.named_buffers()), dict(twin.named_buffers()))


def test_pruning_by_hooks(kernel_calls):
    block, twin = twins(5, 7)
    for model in (block, twin):
        prune.l1_unstructured(model.pw, "weight", 0.5)
    x = random(2, 5, 6, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))
