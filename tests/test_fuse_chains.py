# SPDX-License-Identifier: BSD-3-Clause
"""Consecutive layers of a fused model run as one call in eval mode, and every change of the model is noticed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn as nn
from chain_layers import rows_of
from chain_models import HEADS, Plain, PoolFlatten
from copies import WAYS, copied
from randomize import randomized
from torch.utils.flop_counter import FlopCounterMode
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep import _C, reference
from fusedsep._ops import DEPTHWISE, MEANS, PATCHES, PATCHES_OF_NCHW, PIXELS

ALL = [PATCHES_OF_NCHW, DEPTHWISE, DEPTHWISE, DEPTHWISE, MEANS]


def fused_and_input():
    torch.manual_seed(0)
    model = randomized(PoolFlatten()).eval()
    return model, fusedsep.fuse(model), torch.randn(2, 3, 24, 24)


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_whole_network_is_one_call(model_class, memory_format, chain_calls, kernel_calls):
    model = randomized(model_class()).eval().to(memory_format=memory_format)
    fused = fusedsep.fuse(model)
    x = torch.randn(3, 3, 33, 30).contiguous(memory_format=memory_format)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = fused(x)
            assert_as_close_to_float64(lambda x, y=y: y, model, x)
            assert y.stride() == model(x).stride()
    first = PATCHES if memory_format is torch.channels_last else PATCHES_OF_NCHW
    assert rows_of(chain_calls) == 2 * [[first, *ALL[1:], *(model.products - 1) * [PIXELS]]]
    assert chain_calls[0][1] is chain_calls[1][1]  # packed once
    assert not kernel_calls


@pytest.mark.parametrize("make", [fusedsep.MobileNetV1, reference.MobileNetV1])
def test_mobilenets_are_one_call(make, isa, chain_calls):
    model = randomized(make(7, 0.25, activation="relu6")).eval()
    fused = fusedsep.fuse(model)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(2, 3, 47, 64, dtype=dtype)
            assert_as_close_to_float64(fused.to(dtype), model.to(dtype), x)
    assert rows_of(chain_calls) == 2 * [[PATCHES_OF_NCHW] + 13 * [DEPTHWISE] + [MEANS]]


def test_what_a_frozen_model_gives():
    model, fused, x = fused_and_input()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), fusedsep.freeze(model)(x), rtol=1e-5, atol=1e-5)


def test_chains_resume_when_all_is_as_it_was(chain_calls):
    _, fused, x = fused_and_input()
    with torch.no_grad():
        expected = fused(x)
        handle = fused.blocks[0].register_forward_hook(lambda *arguments: None)
        fused(x)
        handle.remove()
        fused.stem[1].train()
        fused.stem[1].eval()
        assert torch.equal(fused(x), expected)
    assert len(chain_calls) == 2


def test_every_byte_is_looked_at(chain_calls):
    _, fused, x = fused_and_input()
    tensors = [tensor for tensor in fused.state_dict().values() if tensor.dim()]  # not the counters of batches
    with torch.no_grad():
        fused(x)
        for tensor in tensors:
            tensor.view(-1).view(torch.int32)[-1] ^= 1
            fused(x)
    assert len({id(call[1]) for call in chain_calls}) == 1 + len(tensors)  # packed again each time


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("name", ["stem.0", "blocks", "blocks.1", "blocks.1.0.0", "pool", "classifier"])
def test_hooks_fire(register, name, chain_calls):
    _, fused, x = fused_and_input()
    fired = []
    getattr(fused.get_submodule(name), f"register_{register}_hook")(lambda *arguments: fired.append(1))
    fused(x).sum().backward()
    assert fired == [1]
    with torch.no_grad():
        fused(x)
    assert not chain_calls


def test_global_hooks_fire(chain_calls):
    _, fused, x = fused_and_input()
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        with torch.no_grad():
            fused(x)
    finally:
        handle.remove()
    assert {"Conv2d", "BatchNorm2d", "ReLU6", "Linear", "PoolFlatten"} <= set(names)
    assert not chain_calls


# ------------------------------------------------------------------------------------------------------- other ways out


def test_gradients_go_through_the_sites(chain_calls):
    model, fused, x = fused_and_input()
    x.requires_grad_()
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    found = torch.autograd.grad(fused(x).square().sum(), [x, *fused.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item() + 1e-5)
    assert not chain_calls
    fused.requires_grad_(False)
    fused(x.detach())
    assert len(chain_calls) == 1


def test_training_mode_goes_through_the_sites(chain_calls, training_calls):
    _, fused, x = fused_and_input()
    fused.train()(x)
    assert len(training_calls) == 3
    assert not chain_calls


def test_other_types_shapes_and_modes(chain_calls):
    model, fused, x = fused_and_input()
    with torch.no_grad():
        assert fused(x[:0]).shape == (0, 5)
        assert len(chain_calls) == 1
        assert copy.deepcopy(fused).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            fused(x)
        assert counter.get_total_flops() > 0
        torch.testing.assert_close(torch.func.vmap(fused)(x[:, None]), torch.func.vmap(model)(x[:, None]))
        tangent = torch.func.jvp(fused, (x,), (x,))[1]
        torch.testing.assert_close(tangent, torch.func.jvp(model, (x,), (x,))[1], rtol=1e-3, atol=1e-4)
        for wrong in (torch.randn(2, 4, 24, 24), x.double(), torch.randn(3, 24, 24)):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                fused(wrong)
        for net in (model, fused):
            with pytest.raises(TypeError):
                net(x, x)
    assert len(chain_calls) == 1


def test_traces(chain_calls):
    model, fused, x = fused_and_input()
    with torch.no_grad():
        expected = model(x)
        traced = torch.jit.trace(fused, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(fused, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
        torch.compiler.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    assert not chain_calls


def test_functional_call_uses_the_given_parameters(chain_calls):
    model, fused, x = fused_and_input()
    other = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = fused(x)
        y = torch.func.functional_call(fused, other, (x,))
        torch.testing.assert_close(y, torch.func.functional_call(model, other, (x,)), rtol=1e-4, atol=1e-3)
        assert torch.equal(fused(x), before)
    assert len(chain_calls) == 3


@pytest.mark.parametrize("how", WAYS)
def test_copies_run_their_own_layers(how, chain_calls):
    _, fused, x = fused_and_input()
    with torch.no_grad():
        expected = fused(x)
        twin = copied(fused, how)
        assert torch.equal(twin(x), expected)
        twin.classifier.bias.add_(1)
        torch.testing.assert_close(twin(x), expected + 1)
        assert torch.equal(fused(x), expected)
        twin.blocks[0].register_forward_hook(lambda *arguments: None)
        chain_calls.clear()
        fused(x)
        twin(x)
    assert len(chain_calls) == 1


def test_defuse_and_fuse_again(chain_calls):
    model, fused, x = fused_and_input()
    with torch.no_grad():
        expected = fused(x)
        for again in (fusedsep.fuse(fused), fusedsep.fuse(fusedsep.defuse(copy.deepcopy(fused)))):
            assert torch.equal(again(x), expected)
        assert len(chain_calls) == 3
        assert torch.equal(fusedsep.freeze(fused)(x), fusedsep.freeze(model)(x))
        chain_calls.clear()
        assert torch.equal(fusedsep.defuse(fused)(x), model(x))
    assert not any("forward" in vars(module) for module in fused.modules())
    assert not chain_calls


def test_a_change_of_isa_is_noticed(chain_calls):
    _, fused, x = fused_and_input()
    with torch.no_grad():
        for isa in (*fusedsep.supported_isas(), "portable16", *fusedsep.supported_isas()):
            fusedsep.use_isa(isa)
            torch.testing.assert_close(fused(x), fusedsep.defuse(copy.deepcopy(fused))(x), rtol=1e-4, atol=1e-4)
    assert len(chain_calls) == 2 * len(fusedsep.supported_isas()) + 1


def test_several_threads_at_once():
    _, fused, _ = fused_and_input()
    inputs = [torch.randn(2, 3, 20 + i, 24) for i in range(4)]
    with torch.no_grad():
        expected = [fused(x) for x in inputs]
    fused = copy.deepcopy(fused)  # nothing is packed yet
    results = [[] for _ in inputs]

    def run(i):
        with torch.no_grad():
            results[i] += [fused(inputs[i]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, right in zip(results, expected, strict=True):
        assert len(found) == 20
        assert all(torch.equal(y, right) for y in found)


def test_same_fingerprint_for_every_thread_count_and_isa():
    tensors = {str(i): torch.randn(size) for i, size in enumerate((0, 1, 100_000, 3, 300_000, 65_536))}
    places = tuple(part for name in tensors for part in ({"kept": tensors}, "kept", name))
    found = set()
    for isa in _C.supported_isas():
        fusedsep.use_isa(isa)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.add(_C.fingerprint_of(places, torch.Tensor, nn.Parameter))
    assert len(found) == 1
    assert None not in found


def test_without_a_way_to_tell_single_sites_run(chain_calls, kernel_calls):
    """A tensor with gaps; the same happens where torch has no exchange interface of DLPack."""
    model, fused, x = fused_and_input()
    wide = torch.zeros(5, 80)
    wide[:, ::2] = model.classifier.weight.detach()
    fused.classifier.weight.data = wide[:, ::2]
    with torch.no_grad():
        assert_as_close_to_float64(fused, model, x)
    assert not chain_calls
    assert len(kernel_calls) == 3


class Halves(Plain):
    """Python that cannot be traced around two parts that can."""

    def forward(self, x):
        x = self.stem(x) if x.sum() != 0 else x
        return self.head(self.blocks(x))


def test_parts_of_what_cannot_be_traced_are_chains(chain_calls):
    for make in (fusedsep.fuse, fusedsep.freeze):
        model = randomized(Halves()).eval()
        chain_calls.clear()
        with torch.no_grad():
            assert_as_close_to_float64(make(model), model, torch.randn(2, 3, 24, 24))
        assert rows_of(chain_calls) == [[PATCHES_OF_NCHW], 3 * [DEPTHWISE]]
