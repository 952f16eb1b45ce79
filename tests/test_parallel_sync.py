# SPDX-License-Identifier: BSD-3-Clause
"""nn.SyncBatchNorm in a block on the CPU: processes with a part of the batch each are one with the whole batch."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from processes import Ranks
from randomize import randomized
from torch.utils.checkpoint import checkpoint
from twins import random

from fusedsep import DepthwiseSeparableBlock, _sync
from fusedsep._activations import apply_activation
from fusedsep._padding import pad_map

_STEPS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def make_block(norms=("sync", "sync"), bias=False, **kwargs):
    """A random block with ``"sync"``, ``"local"``, ``"frozen"`` or no BN at either place."""
    torch.manual_seed(0)
    block = randomized(DepthwiseSeparableBlock(5, 7, dtype=torch.double, **kwargs)).train()
    if bias:
        for name, channels in (("dw", 5), ("pw", 7)):
            getattr(block, name).bias = nn.Parameter(torch.randn(channels, dtype=torch.double))
    for name, kind in zip(("bn1", "bn2"), norms, strict=True):
        bn = getattr(block, name)
        if kind == "sync":
            setattr(block, name, nn.SyncBatchNorm.convert_sync_batchnorm(bn))
        elif kind == "frozen":
            bn.eval()
        elif kind is None:
            setattr(block, name, None)
    return block


def make_parts(sizes, shape=(5, 6, 7), dtype=torch.double, memory_format=torch.contiguous_format, offset=0.0):
    """The batch of each rank."""
    x = (random(sum(sizes), *shape) + offset).to(dtype)
    return [part.contiguous(memory_format=memory_format) for part in x.split(sizes)]


def train(rank, block, parts, needs_grad=True):
    """Steps on this rank's part: output, gradients of the last, buffers; and how often the shared passes ran."""
    calls = []
    run = _sync.run
    _sync.run = lambda *arguments: calls.append(1) or run(*arguments)
    try:
        for _ in range(_STEPS):
            block.zero_grad()
            x = parts[rank].clone().requires_grad_(needs_grad)
            y = block(x)
            y.backward(gradient_of(y, rank))
    finally:
        _sync.run = run
    found = {"y": y.detach(), "grad x": x.grad}
    found |= {f"grad {name}": parameter.grad for name, parameter in block.named_parameters()}
    return found | dict(block.named_buffers()), len(calls)


def gradient_of(y, rank):
    return random(*y.shape, seed=99 + rank).to(y.dtype)


class Unfused:
    """What the processes compute together, in one process and through ATen."""

    def __init__(self, block, world_size):
        self.block = copy.deepcopy(block)
        # The parameters are one and the same on every rank; what a local BN tracks is not.
        self.buffers = [{name: b.clone() for name, b in self.block.named_buffers()} for _ in range(world_size)]

    def __call__(self, parts):
        block = self.block
        pre_pad, stride, dilation = block._separable.pre_pad, block.dw.stride[0], block.dw.dilation[0]
        h = self._norm("bn1", [block.dw(pad_map(part, pre_pad, stride, dilation)) for part in parts])
        y = self._norm("bn2", [block.pw(apply_activation(block.activation, part)) for part in h])
        return [apply_activation(block.pointwise_activation, part) for part in y]

    def _norm(self, name, parts):
        bn = getattr(self.block, name)
        if bn is None:
            return parts
        if isinstance(bn, nn.SyncBatchNorm) and bn.training:
            whole = self._batch_norm(name, torch.cat(parts), self.buffers[0])
            for buffers in self.buffers[1:]:
                buffers.update({key: b.clone() for key, b in self.buffers[0].items() if key.startswith(name)})
            return whole.split([len(part) for part in parts])
        return [self._batch_norm(name, part, buffers) for part, buffers in zip(parts, self.buffers, strict=True)]

    def _batch_norm(self, name, x, buffers):
        bn = getattr(self.block, name)
        mean, var = buffers.get(f"{name}.running_mean"), buffers.get(f"{name}.running_var")
        momentum = bn.momentum
        if bn.training and bn.track_running_stats:
            buffers[f"{name}.num_batches_tracked"] += 1
            momentum = 1 / float(buffers[f"{name}.num_batches_tracked"]) if momentum is None else momentum
        training = bn.training or mean is None
        return F.batch_norm(x, mean, var, bn.weight, bn.bias, training, momentum or 0.0, bn.eps)


def expected_of(block, parts):
    """As :func:`train`, for each rank; gradients of parameters are summed over the ranks."""
    unfused = Unfused(block, len(parts))
    for _ in range(_STEPS):
        unfused.block.zero_grad()
        xs = [part.clone().requires_grad_() for part in parts]
        ys = unfused(xs)
        torch.autograd.backward(ys, [gradient_of(y, rank) for rank, y in enumerate(ys)])
    grads = {f"grad {name}": parameter.grad for name, parameter in unfused.block.named_parameters()}
    return [
        {"y": y.detach(), "grad x": x.grad, **grads, **buffers}
        for x, y, buffers in zip(xs, ys, unfused.buffers, strict=True)
    ]


def assert_equals_one_process(ranks, block, parts, rtol=1e-9, atol=1e-11):
    expected = expected_of(copy.deepcopy(block).double(), [part.double() for part in parts])
    answers = ranks.run(train, block, parts)
    results = [found for found, _ in answers]
    assert [calls for _, calls in answers] == [_STEPS] * len(parts)
    for name in list(results[0]):
        if name.startswith("grad ") and name != "grad x":
            total = sum(found[name] for found in results)
            for found in results:
                found[name] = total
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                actual[name].to(value.dtype),
                value,
                rtol=rtol,
                atol=atol,
                msg=lambda message, name=name: f"{name}: {message}",
            )
    return results


@pytest.mark.parametrize(
    "norms",
    [
        ("sync", "sync"),
        ("sync", "local"),
        ("local", "sync"),
        ("sync", "frozen"),
        ("frozen", "sync"),
        ("sync", None),
        (None, "sync"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)], ids=str)
def test_halves_and_unequal_parts(ranks, sizes, norms):
    assert_equals_one_process(ranks, make_block(norms, bias=True), make_parts(sizes))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2, "padding": "same", "activation": "relu6"},
        {"dilation": 2, "padding": (1, 2, 3, 0), "activation": "hardswish", "pointwise_activation": "none"},
    ],
    ids=str,
)
def test_geometry_and_memory_format(ranks, arguments, memory_format):
    results = assert_equals_one_process(
        ranks, make_block(**arguments), make_parts((2, 3), shape=(5, 9, 8), memory_format=memory_format)
    )
    for found in results:
        assert found["y"].is_contiguous(memory_format=memory_format)
        assert found["grad x"].is_contiguous(memory_format=memory_format)


def test_what_is_shared_is_the_same_to_the_last_bit(ranks):
    first, second = (found for found, _ in ranks.run(train, make_block(), make_parts((3, 2))))
    for name in first:
        if name.startswith("bn"):
            assert torch.equal(first[name], second[name]), name


def test_runs_repeat_to_the_last_bit(ranks):
    block, parts = make_block(), make_parts((3, 2))
    once, again = (ranks.run(train, block, parts) for _ in range(2))
    for (first, _), (second, _) in zip(once, again, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_pixel_on_each_rank_is_enough(ranks):
    parts = make_parts((1, 1), shape=(5, 1, 1))
    assert_equals_one_process(ranks, make_block(), parts)


@pytest.mark.parametrize("norms", [("sync", "sync"), ("sync", "local"), ("frozen", "sync")], ids=str)
def test_one_rank_without_images(ranks, norms):
    results = assert_equals_one_process(ranks, make_block(norms), make_parts((3, 0)))
    assert results[1]["y"].shape == (0, 7, 6, 7)


def test_single_precision_and_a_large_mean(ranks):
    """Against float64; E[x^2] - E[x]^2 would lose all digits here."""
    block = make_block().float()
    assert_equals_one_process(ranks, block, make_parts((3, 2), dtype=torch.float32, offset=1e3), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("change", ["no affine", "no running statistics", "average of all batches"])
def test_variants_of_the_norm(ranks, change):
    block = make_block()
    for name, channels in (("bn1", 5), ("bn2", 7)):
        if change == "no affine":
            bn = nn.SyncBatchNorm(channels, affine=False, dtype=torch.double)
        elif change == "no running statistics":
            bn = nn.SyncBatchNorm(channels, track_running_stats=False, dtype=torch.double)
        else:
            bn = nn.SyncBatchNorm(channels, momentum=None, dtype=torch.double)
        setattr(block, name, bn)
    assert_equals_one_process(ranks, block, make_parts((2, 3)))


@pytest.mark.parametrize("frozen", [["dw.weight"], ["dw.weight", "bn1.weight", "bn1.bias"], ["pw.weight"]], ids=str)
def test_an_input_without_gradient_and_frozen_parameters(ranks, frozen):
    block, parts = make_block(), make_parts((2, 1))
    expected = expected_of(block, parts)[0]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    results = [found for found, _ in ranks.run(train, block, parts, False)]
    assert all(found["grad x"] is None for found in results)
    for name, _ in block.named_parameters():
        if name in frozen:
            assert all(found[f"grad {name}"] is None for found in results)
        else:
            total = sum(found[f"grad {name}"] for found in results)
            torch.testing.assert_close(total, expected[f"grad {name}"], rtol=1e-9, atol=1e-11)


def train_from_a_checkpoint(rank, block, parts):
    plain = copy.deepcopy(block)
    block.forward = lambda x: checkpoint(type(block).forward, block, x, use_reentrant=False)
    return train(rank, plain, parts), train(rank, block, parts)


def test_a_checkpoint_exchanges_again(ranks):
    for (plain, calls), (checkpointed, again) in ranks.run(train_from_a_checkpoint, make_block(), make_parts((3, 2))):
        assert again == 2 * calls
        assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def one_value(rank, block):
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    with pytest.raises(ValueError) as raised:
        block(torch.ones(1 - rank, 5, 1, 1, dtype=torch.double))
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())
    return str(raised.value)


def test_one_value_over_all_ranks_is_an_error_on_each(ranks):
    for message in ranks.run(one_value, make_block()):
        assert "more than 1 value per channel when training" in message
        assert message.endswith("got one over all 2 processes")


def no_values(rank, block, size):
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    x = torch.ones(0, 5, size, size, dtype=torch.double, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.count_nonzero() == 0 for parameter in block.parameters())
    for name, buffer in block.named_buffers():
        assert torch.equal(buffer, before[name] + 1 if name.endswith("num_batches_tracked") else before[name])


def test_no_values_on_any_rank(ranks):
    """As ``nn.BatchNorm2d`` does it: counted, but nothing follows."""
    ranks.run(no_values, make_block(), 4)


def train_with_groups(rank, block, parts):
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    everyone = dist.new_group(timeout=datetime.timedelta(seconds=30))
    block.bn1.process_group, block.bn2.process_group = alone, everyone
    return train(rank, block, parts)


def test_each_norm_has_its_own_process_group(ranks):
    block, parts = make_block(), make_parts((2, 3))
    expected = expected_of(make_block(("local", "sync")), parts)
    for (actual, calls), wanted in zip(ranks.run(train_with_groups, block, parts), expected, strict=True):
        assert calls == _STEPS
        for name in ("y", "grad x", "bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
            torch.testing.assert_close(actual[name], wanted[name], rtol=1e-9, atol=1e-11)


def eval_outputs(rank, block, x):
    with torch.no_grad():
        return block.eval()(x if rank == 0 else x[:1])  # no rank waits for another


def test_eval_mode_asks_nobody(ranks):
    block, x = make_block(), random(3, 5, 6, 7)
    first, second = ranks.run(eval_outputs, block, x)
    expected = block.eval()(x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected[:1])


def call_with_hook(rank, block, x):
    block.bn1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError) as raised:
        block(x)
    return str(raised.value)


def test_what_the_kernels_do_not_cover_is_refused_by_torch(ranks):
    for message in ranks.run(call_with_hook, make_block(), random(2, 5, 6, 7)):
        assert "SyncBatchNorm expected input tensor to be on GPU" in message


def train_norm(rank, bn, parts):
    if bn.process_group == "of this rank":
        bn.process_group = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    x = parts[rank].clone().requires_grad_()
    y = _sync.batch_norm(bn, x)
    y.backward(gradient_of(y, rank))
    grads = [torch.zeros(5)] * 2 if bn.weight is None else [bn.weight.grad, bn.bias.grad]
    return y.detach(), x.grad, grads, dict(bn.named_buffers())


@pytest.mark.parametrize("sizes", [(2, 3), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"process_group": "of this rank"}],
    ids=str,
)
def test_a_norm_outside_of_the_operator(ranks, arguments, sizes):
    torch.manual_seed(0)
    shared = nn.SyncBatchNorm(5, dtype=torch.double, **arguments)
    plain = nn.BatchNorm2d(5, dtype=torch.double, **{k: v for k, v in arguments.items() if k != "process_group"})
    parts = make_parts(sizes)
    answers = ranks.run(train_norm, shared, parts)
    groups = [[0], [1]] if "process_group" in arguments else [[0, 1]]
    for group in groups:
        one = copy.deepcopy(plain)
        xs = [parts[rank].clone().requires_grad_() for rank in group]
        ys = one(torch.cat(xs)).split([len(x) for x in xs])
        torch.autograd.backward(ys, [gradient_of(y, rank) for rank, y in zip(group, ys, strict=True)])
        for rank, x, y in zip(group, xs, ys, strict=True):
            torch.testing.assert_close(answers[rank][0], y.detach())
            torch.testing.assert_close(answers[rank][1], x.grad)
            torch.testing.assert_close(answers[rank][3], dict(one.named_buffers()))
        if one.weight is not None:
            totals = [sum(answers[rank][2][i] for rank in group) for i in range(2)]
            torch.testing.assert_close(totals, [one.weight.grad, one.bias.grad])


def test_without_processes_it_is_a_batch_norm():
    assert not dist.is_initialized()
    block, (x,) = make_block(), make_parts((4,))
    expected = expected_of(block, [x])[0]
    for _ in range(_STEPS):
        block.zero_grad()
        ours = x.clone().requires_grad_()
        y = block(ours)
        y.backward(gradient_of(y, 0))
    torch.testing.assert_close(ours.grad, expected["grad x"], rtol=1e-9, atol=1e-11)
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-9, atol=1e-11)
