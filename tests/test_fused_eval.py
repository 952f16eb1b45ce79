# SPDX-License-Identifier: BSD-3-Clause
"""The block in eval mode: the kernels run where they may, see every change, and step aside where they must."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from randomize import randomized
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fusedsep
from fusedsep import DepthwiseSeparableBlock, reference


def twins(*args, dtype=torch.double, **kwargs):
    """A block with random BNs and its unfused twin with the same numbers, both in eval mode."""
    block = randomized(DepthwiseSeparableBlock(*args, dtype=dtype, **kwargs)).eval()
    twin = reference.DepthwiseSeparableBlock(*args, dtype=dtype, **kwargs).eval()
    twin.load_state_dict(block.state_dict())
    return block, twin


def random(*shape, seed=0, dtype=torch.double):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_close(actual, expected):
    single = actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4 if single else 1e-10, atol=1e-5 if single else 1e-12)


# ------------------------------------------------------------------------------------------------ the kernels do run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_kernels_run_in_the_plain_case(isa, kernel_calls, dtype, mode):
    block, twin = twins(5, 7, dtype=dtype)
    with mode():
        x = random(2, 5, 6, 9, dtype=dtype)
        assert_close(block(x), twin(x))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), (3, 0, 1, 2), "same"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_kernels_run_for_every_geometry(kernel_calls, stride, padding, dilation):
    block, twin = twins(5, 7, stride, padding=padding, dilation=dilation, activation="hardswish")
    x = random(2, 5, 8, 9)
    with torch.no_grad():
        assert_close(block(x), twin(x))
    assert len(kernel_calls) == 1


def test_kernels_run_without_a_batch_dimension_and_for_no_image(kernel_calls):
    block, twin = twins(5, 7)
    x = random(3, 5, 6, 9)
    with torch.no_grad():
        assert_close(block(x[1]), twin(x)[1])
        assert block(x[:0]).shape == (0, 7, 6, 9)
    assert len(kernel_calls) == 2


def test_inference_mode_then_normal_mode(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()  # with weights that were packed in inference mode
    twin(x).sum().backward()
    assert_close(block.dw.weight.grad, twin.dw.weight.grad)
    assert len(kernel_calls) == 2


def test_weights_are_packed_once(kernel_calls):
    block, _ = twins(5, 7)
    with torch.no_grad():
        for _ in range(3):
            block(random(2, 5, 6, 9))
    assert len({id(call[1]) for call in kernel_calls}) == 1


# ------------------------------------------------------------------------------------------ every change is noticed


def in_place_without_grad(model):
    with torch.no_grad():
        model.pw.weight[3, 2] += 1


def data_edit(model):
    model.bn1.weight.data[1] = -3


def through_numpy(model):
    model.dw.weight.detach().numpy()[0, 0, 1, 1] = 5


def replaced_data(model):
    model.dw.weight.data = model.dw.weight.data.flip(0)


def buffer_edit(model):
    model.bn2.running_var.mul_(4)


def last_bit(model):
    model.pw.weight.data.view(torch.int64)[-1, -1] ^= 1


def eps(model):
    model.bn1.eps = 0.5


def second_eps(model):
    model.bn2.eps = 0.5


def replaced_parameter(model):
    model.pw.weight = nn.Parameter(model.pw.weight.detach() * 2)


def removed_affine(model):
    model.bn2.weight = None
    model.bn2.bias = None


def added_bias(model):
    model.dw.bias = nn.Parameter(torch.ones_like(model.bn1.bias))


def replaced_module(model):
    model.bn1 = randomized(nn.BatchNorm2d(5, dtype=torch.double), seed=9).eval()


def loaded(model):
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(random(2, 5, 6, 9)).square().mean().backward()
    optimizer.step()


def training_step(model):
    model.train()
    model(random(2, 5, 6, 9))
    model.eval()


def channels_last_weights(model):
    model.to(memory_format=torch.channels_last)
    model.pw.weight.data *= 2


def pruned(model):
    prune.l1_unstructured(model.pw, "weight", 0.5)
    prune.remove(model.pw, "weight")


def stride_of_the_module(model):
    model.dw.stride = (2, 2)


CHANGES = [
    in_place_without_grad,
    data_edit,
    through_numpy,
    replaced_data,
    buffer_edit,
    eps,
    second_eps,
    replaced_parameter,
    removed_affine,
    added_bias,
    replaced_module,
    loaded,
    assigned,
    optimizer_step,
    training_step,
    channels_last_weights,
    pruned,
    stride_of_the_module,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(kernel_calls, change):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        before = block(x)
    for model in (block, twin):
        change(model)
    kernel_calls.clear()
    with torch.no_grad():
        after = block(x)
        assert_close(after, twin(x))
    assert kernel_calls
    assert after.shape != before.shape or not torch.equal(after, before)


def test_the_last_bit_of_a_weight_is_noticed(kernel_calls):
    block, _ = twins(5, 7)
    with torch.no_grad():
        block(random(2, 5, 6, 9))
        last_bit(block)
        block(random(2, 5, 6, 9))
    first, second = (call[1] for call in kernel_calls)
    assert first is not second  # packed again, though folding may have rounded the bit away


def test_a_change_of_type_is_noticed(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.float64):
            assert_close(block.to(dtype)(x.to(dtype)), twin.to(dtype)(x.to(dtype)))
    assert len(kernel_calls) == 3


def test_a_change_of_isa_is_noticed(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        for isa in (*fusedsep.supported_isas(), "portable16", *fusedsep.supported_isas()):
            fusedsep.use_isa(isa)
            assert_close(block(x), twin(x))
    assert len(kernel_calls) == 2 * len(fusedsep.supported_isas()) + 1


def test_a_change_of_format_is_noticed(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
            assert_close(block(x.contiguous(memory_format=memory_format)), twin(x))
    assert [call[-1] for call in kernel_calls] == [False, True, False]


def test_functional_call_uses_the_given_parameters(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    other = {name: parameter.detach() * 2 for name, parameter in block.named_parameters()}
    with torch.no_grad():
        before = block(x)
        assert_close(torch.func.functional_call(block, other, (x,)), torch.func.functional_call(twin, other, (x,)))
        assert torch.equal(block(x), before)
    assert len(kernel_calls) == 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_do_not_share_packed_weights(kernel_calls, duplicate):
    block, _ = twins(5, 7)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        expected = block(x)
        copied = duplicate(block)
        in_place_without_grad(block)
        assert torch.equal(copied(x), expected)
        assert not torch.equal(block(x), expected)
    assert len(kernel_calls) == 3


# ------------------------------------------------------------------------------------------- where torch must run it


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


@pytest.mark.parametrize("child", ["bn1", "bn2"])
def test_one_bn_in_training_mode_uses_the_batch(kernel_calls, child):
    block, twin = twins(5, 7)
    for model in (block, twin):
        model.get_submodule(child).train()
    x = random(2, 5, 6, 9)
    assert_runs_through_torch(block, x, kernel_calls, twin(x))
    torch.testing.assert_close(dict(block.named_buffers()), dict(twin.named_buffers()))


def test_a_bn_without_running_statistics_uses_the_batch(kernel_calls):
    block, twin = twins(5, 7)
    for model in (block, twin):
        model.bn1 = nn.BatchNorm2d(5, track_running_stats=False, dtype=torch.double).eval()
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


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_equal_the_reference(kernel_calls, activation, memory_format):
    block, twin = twins(5, 7, 2, padding="same", activation=activation, pointwise_activation=activation)
    grads = []
    for model in (block, twin):
        x = (3 * random(2, 5, 8, 7)).contiguous(memory_format=memory_format).requires_grad_()
        y = model(x)
        y.backward(random(*y.shape, seed=1))
        grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("wanted", ["x", "dw.weight", "bn1.bias", "pw.weight", "bn2.weight"])
def test_only_the_wanted_gradient(kernel_calls, wanted):
    block, twin = twins(5, 7)
    results = []
    for model in (block, twin):
        model.requires_grad_(False)
        x = random(2, 5, 6, 9)
        target = x if wanted == "x" else model.get_parameter(wanted)
        target.requires_grad_()
        model(x).square().sum().backward()
        results.append(target.grad)
        assert [p.grad is None for p in model.parameters()].count(False) == (wanted != "x")
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert len(kernel_calls) == 1


def test_no_graph_without_a_wanted_gradient(kernel_calls):
    block, _ = twins(5, 7)
    block.requires_grad_(False)
    assert block(random(2, 5, 6, 9)).grad_fn is None
    assert len(kernel_calls) == 1


def test_expanded_gradient(kernel_calls):
    block, twin = twins(5, 7)
    x = random(2, 5, 6, 9)
    for model in (block, twin):
        model(x).sum().backward()  # hands a gradient of stride 0 to the block
    assert_close(block.pw.weight.grad, twin.pw.weight.grad)
    assert kernel_calls


def test_numerical_derivatives(kernel_calls):
    """First and second ones, with hardswish in the middle, which has curvature; inputs stay away from its kinks."""
    block, _ = twins(2, 2, activation="hardswish", pointwise_activation="none")
    x = 0.1 * random(1, 2, 3, 2)
    parameters = dict(block.named_parameters())

    def function(x, *tensors):
        return torch.func.functional_call(block, dict(zip(parameters, tensors, strict=True)), (x,))

    inputs = [tensor.detach().requires_grad_() for tensor in (x, *parameters.values())]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert kernel_calls


def test_a_parameter_changed_before_backward_is_an_error(kernel_calls):
    block, _ = twins(5, 7)
    y = block(random(2, 5, 6, 9)).sum()
    in_place_without_grad(block)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    assert kernel_calls


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, r"x must be a torch\.Tensor, got NoneType"),
        ([[1.0]], TypeError, r"x must be a torch\.Tensor, got list"),
        (torch.zeros(2, 6, 6, 9), ValueError, r"x must have 5 channels, got 6 in shape \[2, 6, 6, 9\]"),
        (torch.zeros(6, 6, 9), ValueError, r"x must have 5 channels, got 6 in shape \[6, 6, 9\]"),
        (torch.zeros(2, 0, 6, 9), ValueError, "x must have 5 channels, got 0"),
        (torch.zeros(5, 9), ValueError, r"x must have shape \[N, C, H, W\] or \[C, H, W\], got \[5, 9\]"),
        (torch.zeros(1, 2, 5, 6, 9), ValueError, r"x must have shape .* got \[1, 2, 5, 6, 9\]"),
        (torch.tensor(1.0), ValueError, r"x must have shape .* got \[\]"),
        (torch.zeros(2, 5, 6, 9).double(), TypeError, r"x must have the dtype of the weights, .*32, got torch\.float64"),
        (torch.zeros(2, 5, 6, 9).half(), TypeError, r"x must have the dtype of the weights, .*32, got torch\.float16"),
        (torch.zeros(2, 5, 6, 9).int(), TypeError, r"x must be a floating-point tensor, got torch\.int32"),
        (torch.zeros(2, 5, 6, 9).cfloat(), TypeError, r"x must be a floating-point tensor, got torch\.complex64"),
        (torch.zeros(2, 5, 6, 9, device="meta"), ValueError, "x must be on the device of the weights, cpu, got meta"),
        (torch.zeros(2, 5, 0, 9), ValueError, "x must hold the 3x3 kernel .* 0 x 9"),
        (torch.zeros(2, 5, 6, 0), ValueError, "x must hold the 3x3 kernel .* 6 x 0"),
    ],
    ids=lambda value: None if isinstance(value, (str, type)) else getattr(value, "shape", type(value).__name__),
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_bad_input_is_named(x, error, message, mode):
    block, _ = twins(5, 7, dtype=torch.float32)
    with mode(), pytest.raises(error, match=message):
        block(x)


def test_a_map_smaller_than_the_kernel_is_named():
    block, _ = twins(5, 7, padding=(0, 1, 0, 0), dilation=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dilation 2: a map of 4 x 9 with padding \(0, 1, 0, 0\)"):
        block(torch.zeros(2, 5, 4, 9))


@pytest.mark.parametrize("name", ["dw.weight", "pw.weight", "bn1.weight", "bn1.running_mean", "bn2.running_var"])
def test_a_parameter_without_memory_is_not_read(name):
    """What comes is an error or what unfused torch gives; the process goes on."""
    block, twin = twins(5, 7)
    for model in (block, twin):
        child, attribute = name.split(".")
        meta = getattr(model.get_submodule(child), attribute).detach().to("meta")
        setattr(model.get_submodule(child), attribute, nn.Parameter(meta) if "running" not in name else meta)
    x = random(2, 5, 6, 9)
    with torch.no_grad():
        try:
            y = block(x)
        except (ValueError, RuntimeError) as error:
            assert "meta" in str(error) or "device" in str(error)
        else:
            assert y.device == twin(x).device


@pytest.mark.parametrize("name", ["bn1.weight", "bn2.running_mean", "pw.weight"])
def test_a_parameter_of_another_type_is_the_error_of_torch(name):
    block, twin = twins(5, 7)
    for model in (block, twin):
        child, attribute = name.split(".")
        tensor = getattr(model.get_submodule(child), attribute).detach().float()
        setattr(model.get_submodule(child), attribute, nn.Parameter(tensor) if "running" not in name else tensor)
    for model in (block, twin):
        with torch.no_grad(), pytest.raises(RuntimeError, match="type|dtype"):
            model(random(2, 5, 6, 9))
