# SPDX-License-Identifier: BSD-3-Clause
"""The eval path sees every change of parameters, buffers, modules, type, format and ISA."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from randomize import randomized
from torch.nn.utils import prune
from twins import assert_close, random, twins

import fusedsep
from fusedsep._kernel_path import PackedCache


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


def test_packed_weights_belong_to_one_fingerprint_whatever_is_stored_between():
    cache, old, new = PackedCache(), torch.zeros(1), torch.ones(1)
    cache.store("avx2", "before", old)
    cache.store("portable", "after", new)  # another thread saw the parameters change meanwhile
    cache.store("avx2", "before", old)
    assert cache.lookup("avx2", "after") is None
    assert cache.lookup("avx2", "before") is old
    assert cache.lookup("portable", "after") is new
