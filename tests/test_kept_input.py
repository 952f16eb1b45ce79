# SPDX-License-Identifier: BSD-3-Clause
"""A block that follows another keeps the other's raw product in the place of its input, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from training_pairs import assert_same, in_format, step
from twins import random

from fusedsep import DepthwiseSeparableBlock, _kept_input, _ops, reference

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
#: in channels, out channels, stride, and what else a block is made with
LAYERS = [
    (5, 18, 1, {"pointwise_activation": "relu6"}),
    (18, 33, 2, {"padding": "same", "pointwise_activation": "hardswish"}),
    (33, 33, 1, {"padding": 2, "dilation": 2, "pointwise_activation": "none"}),
    (33, 7, 2, {"padding": 0}),
    (7, 7, 1, {}),
]


def networks(dtype=torch.double, layers=LAYERS):
    """Blocks one after the other, and their unfused twins."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(DepthwiseSeparableBlock(i, o, s, dtype=dtype, **more) for i, o, s, more in layers))
    twins = nn.Sequential(
        *(reference.DepthwiseSeparableBlock(i, o, s, dtype=dtype, **more) for i, o, s, more in layers)
    )
    with torch.no_grad():
        for block in blocks:
            for bn in (block.bn1, block.bn2):
                bn.weight.copy_(random(bn.num_features, seed=1))
                bn.bias.copy_(random(bn.num_features, seed=2))
    twins.load_state_dict(blocks.state_dict())
    return blocks, twins


def kept_maps(model, x):
    """Maps that the backward keeps, each once, by address; and the output."""
    maps = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == x.shape[0]:
            maps[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return maps, y


@contextmanager
def every_input_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kept_input, "kept_for_backward", lambda x: (x, None))
        yield


# ------------------------------------------------------------------------------------------------------------- memory


@FORMATS
def test_products_and_the_first_input_are_all_that_is_kept(channels_last):
    blocks, _ = networks()
    x = in_format(random(2, 5, 40, 37), channels_last)
    maps, _ = kept_maps(blocks, x)
    outputs = [x]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    assert sorted(t.nbytes for t in maps.values()) == sorted(t.nbytes for t in outputs)
    assert x.data_ptr() in maps
    with every_input_kept():
        assert len(kept_maps(blocks, x)[0]) == 2 * len(blocks)


def test_compiled_networks_keep_no_more():
    torch._dynamo.reset()
    blocks, _ = networks(torch.float32, [(8, 8, 1, {})] * 3)
    maps, y = kept_maps(torch.compile(blocks, backend="aot_eager"), random(2, 8, 20, 20, dtype=torch.float32))
    assert len(maps) == 4
    y.sum().backward()


def test_a_product_is_freed_with_its_graph_even_if_the_output_lives_on():
    blocks, _ = networks()
    y = blocks[0](random(2, 5, 20, 20))
    product = weakref.ref(y._fusedsep_product.p)
    y.sum().backward()
    gc.collect()
    assert product() is None
    assert y.shape == (2, 18, 20, 20)


def test_an_output_that_is_saved_to_a_file_is_saved_alone():
    blocks, _ = networks()
    y = blocks[0](random(2, 5, 40, 40))
    file = io.BytesIO()
    torch.save(y, file)
    assert len(file.getvalue()) < 1.1 * y.nbytes + 4096
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False), y)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@FORMATS
def test_the_same_bits_as_with_the_input_itself(isa, channels_last, dtype):
    blocks, _ = networks(dtype)
    # Widths on both sides of that below which NCHW maps run in channels_last.
    for size in ((70, 66), (33, 40), (9, 11)):
        x = in_format(random(3, 5, *size, dtype=dtype), channels_last)
        ours = step(copy.deepcopy(blocks), x)
        with every_input_kept():
            expected = step(copy.deepcopy(blocks), x)
        for actual, exact in zip(ours, expected, strict=True):
            assert torch.equal(actual, exact)


@FORMATS
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_against_the_unfused_network(channels_last, threads):
    torch.set_num_threads(threads)
    x = in_format(random(2, 5, 41, 37), channels_last)
    assert_same(*(step(model, x) for model in networks()))


class Readers(nn.Module):
    """Maps between blocks that others read, change or cut off."""

    def __init__(self, blocks, between):
        super().__init__()
        self.blocks, self.between = blocks, between

    def forward(self, x):
        first, second, third = self.blocks
        return self.between(first, second, third, x)


def residual(first, second, third, x):
    y = first(x)
    return third(second(y) + y)


def second_reader(first, second, third, x):
    y = first(x)
    return third(second(y)) + second(y.relu()) * y


def two_blocks_read(first, second, third, x):
    y = first(x)
    return second(y) + third(y)


def changed_in_place(first, second, third, x):
    y = first(x)
    y.mul_(1.5)
    return third(second(y))


def changed_through_a_view(first, second, third, x):
    y = first(x)
    y[:, 1].add_(1)
    return third(second(y))


def replaced(first, second, third, x):
    y = first(x)
    y.data = 1.5 * y.data
    return third(second(y))


def cut_off(first, second, third, x):
    return third(second(first(x).detach()))


def cut_off_in_place(first, second, third, x):
    y = first(x)
    y.detach_()
    return third(second(y))


def another_memory_format(first, second, third, x):
    y = first(x)
    other = torch.contiguous_format if y.is_contiguous(memory_format=torch.channels_last) else torch.channels_last
    return third(second(y.contiguous(memory_format=other)))


def cut_out(first, second, third, x):
    return third(second(first(x)[:, :, 1:-1, 2:]))


def same_block_twice(first, second, third, x):
    return third(first(first(x)))


def checkpointed(use_reentrant, where):
    def between(first, second, third, x):
        if where == "first":
            return third(second(checkpoint(first, x, use_reentrant=use_reentrant)))
        if where == "second":
            return third(checkpoint(second, first(x), use_reentrant=use_reentrant))
        if where == "two":
            return third(checkpoint(nn.Sequential(first, second), x, use_reentrant=use_reentrant))
        return checkpoint(nn.Sequential(second, third), first(x), use_reentrant=use_reentrant)

    between.__name__ = f"checkpointed_{where}_{use_reentrant}"
    return between


BETWEEN = [
    residual,
    second_reader,
    two_blocks_read,
    changed_in_place,
    changed_through_a_view,
    replaced,
    cut_off,
    cut_off_in_place,
    another_memory_format,
    cut_out,
    same_block_twice,
    *(checkpointed(reentrant, where) for reentrant in (False, True) for where in ("first", "second", "two", "last")),
]


@FORMATS
@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
def test_other_readers_of_the_map_between(between, channels_last):
    layers = [(6, 6, 1, {"pointwise_activation": "relu6"})] * 3
    x = in_format(random(2, 6, 12, 11), channels_last)
    ours, theirs = (step(Readers(model, between), x) for model in networks(layers=layers))
    if "checkpointed" in between.__name__:  # the unfused BNs follow the batch twice as well, each in its own order
        count = 2 + len(list(networks(layers=layers)[0].parameters()))
        ours, theirs = ours[:count], theirs[:count]
    assert_same(ours, theirs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_blocks_with_fixed_statistics_among_others(frozen):
    pair = networks(layers=[(6, 6, 1, {})] * 3)
    for model in pair:
        for bn in (model[frozen].bn1, model[frozen].bn2):
            bn.eval()
    x = random(2, 6, 12, 11)
    assert_same(*(step(model, x) for model in pair))


@pytest.mark.parametrize("kept", [True, False])
def test_part_of_the_gradients(kept):
    """The first block wants none: neither a product nor a graph of it is there."""
    results = []
    for model in networks(layers=[(6, 6, 1, {})] * 3):
        model[0].requires_grad_(False)
        x = random(2, 6, 12, 11).requires_grad_(kept)
        y = model(x)
        wanted = [x] if kept else [model[1].dw.weight, model[2].pw.weight]
        results.append(torch.autograd.grad(y, wanted, random(*y.shape, seed=3)))
    assert_same(*results)


# ------------------------------------------------------------------------------------------------ of the second order


def test_second_numerical_derivatives_through_two_blocks():
    layers = [(2, 3, 1, {"pointwise_activation": "hardswish"}), (3, 2, 1, {"activation": "hardswish"})]
    blocks, _ = networks(layers=layers)
    names = [name for name, _ in blocks.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(blocks, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [tensor.detach().requires_grad_() for tensor in (random(2, 2, 3, 2), *blocks.parameters())]
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0)


@pytest.mark.parametrize(
    "between",
    [
        residual,
        two_blocks_read,
        cut_off_in_place,
        cut_off,
        same_block_twice,
        *(checkpointed(False, where) for where in ("first", "second", "two", "last")),
    ],
    ids=lambda between: between.__name__,
)
def test_a_gradient_penalty(between):
    """Gradients take part in the loss. Reentrant checkpoints refuse that, in torch too."""
    results = []
    for blocks in networks(layers=[(6, 6, 1, {"pointwise_activation": "hardswish", "activation": "hardswish"})] * 3):
        model = Readers(blocks, between)
        x = random(2, 6, 6, 5).requires_grad_()
        y = model(x)
        first = torch.autograd.grad(y.square().sum(), list(model.parameters()), create_graph=True, allow_unused=True)
        sum(gradient.square().sum() for gradient in first if gradient is not None).backward()
        results.append([p.grad for p in (x, *model.parameters()) if p.grad is not None])
    assert_same(*results)


def test_the_operator_refuses_another_normalization():
    x, grad_y = random(2, 3, 5, 5), random(2, 4, 5, 5)
    operands = [random(3, 1, 3, 3), *[None] * 5, random(4, 3, 1, 1), *[None] * 5]
    rest = (*operands, 0, 0.0, 0, 0.0, 1, 1, 1, 1, 1, 1, 0, 0, False, 1)
    backward = _ops.separable_conv2d_training_backward
    for wrong in (random(4, 4), random(3, 3), torch.zeros(4, 3), torch.zeros(3, 4).double().t()):
        with pytest.raises(RuntimeError, match=r"x_normalization must be .* \[4, 3\] and the dtype of x"):
            backward(grad_y, x, wrong, grad_y, *rest)
    with pytest.raises(RuntimeError, match="row 3 of x_normalization must hold the code of an activation, or -1"):
        backward(grad_y, x, torch.full((4, 3), 0.5).double(), grad_y, *rest)
