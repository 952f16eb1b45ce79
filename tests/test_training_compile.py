# SPDX-License-Identifier: BSD-3-Clause
"""``torch.compile`` makes one graph of a block, with the operators in it, for every size of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from randomize import randomized
from torch._dynamo.testing import CompileCounterWithBackend
from training_pairs import assert_same, in_format, pair, step
from twins import random, twins

import fusedsep
from fusedsep import MobileNetV1, reference

BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """``model`` compiled without a graph break, with a count of the compilations and the operators in the graphs."""

    def __init__(self, model, backend="aot_eager", **options):
        self.counter = CompileCounterWithBackend(backend)
        self.call = torch.compile(model, backend=self.counter, fullgraph=True, **options)

    def operators(self):
        """Names of our operators and of convolutions, in the order of their calls."""
        names = [str(getattr(node.target, "__name__", node.target)) for node in self.counter.graphs[-1].graph.nodes]
        ours = ("separable_conv2d_training.default", "separable_conv2d.default", "pack.default", "conv2d")
        return [name.removesuffix(".default") for name in names if name in ours]


def compiled_step(compiled, model, x):
    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return compiled.call(x)

    return step(Forward(), x)


@BACKENDS
@FORMATS
@pytest.mark.parametrize(
    ("norms", "options"),
    [
        (("training", "training"), {}),
        (("training", "training"), {"momentum": None, "bias": True}),
        (("frozen", "training"), {"affine": False}),
        (("frozen", "frozen"), {}),
        (("none", "untracked"), {"stride": 2}),
    ],
    ids=str,
)
def test_steps_of_every_batch_size_in_one_graph(backend, channels_last, norms, options):
    block, twin = pair(*norms, activation="hardswish", **options)
    compiled = Compiled(block, backend)
    for batch in (2, 3, 4, 7):  # the first size is taken for the only one, the second for one of many
        x = in_format(random(batch, 5, 8, 9, seed=batch), channels_last)
        assert_same(compiled_step(compiled, block, x), step(twin, x))
    assert compiled.counter.frame_count == 2
    assert compiled.operators() == ["separable_conv2d_training"]


@BACKENDS
@FORMATS
def test_eval_without_gradients(backend, channels_last):
    block, twin = twins(5, 7, 2, padding="same")
    compiled = Compiled(block, backend)
    with torch.no_grad():
        for batch in (2, 3, 4, 7):
            x = in_format(random(batch, 5, 8, 9, seed=batch), channels_last)
            y, expected = compiled.call(x), twin(x)
            assert_same([y], [expected])
            assert y.stride() == expected.stride()
        assert compiled.counter.frame_count == 2
        assert compiled.operators() == ["pack", "separable_conv2d"]
        for model in (block, twin):  # no weight is a constant of the graph
            model.pw.weight.mul_(2)
            model.bn1.running_var.mul_(3)
        assert_same([compiled.call(x)], [twin(x)])
    assert compiled.counter.frame_count == 2


def test_maps_of_every_size_in_one_graph():
    block, twin = pair(stride=2)
    compiled = Compiled(block, dynamic=True)
    counts = []
    for height, width in ((6, 9), (7, 8), (8, 11), (12, 5)):
        x = random(3, 5, height, width)
        assert_same(compiled_step(compiled, block, x), step(twin, x))
        counts.append(compiled.counter.frame_count)
    assert len(set(counts)) == 1
    assert compiled.operators() == ["separable_conv2d_training"]


def test_from_training_to_eval_and_back():
    block, twin = pair()
    compiled = Compiled(block)
    x = random(2, 5, 6, 9)
    for training in (True, False, True):
        block.train(training)
        twin.train(training)
        assert_same(compiled_step(compiled, block, x), step(twin, x))
    assert compiled.counter.frame_count == 2


def test_a_network_trains():
    """Every block in one graph; three steps of an optimizer."""
    torch.manual_seed(0)
    network = randomized(MobileNetV1(7, 0.25, dtype=torch.double)).train()
    twin = reference.MobileNetV1(7, 0.25, dtype=torch.double).train()
    twin.load_state_dict(network.state_dict())
    compiled = Compiled(network)
    for model, call in ((network, compiled.call), (twin, twin)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for seed in range(3):
            optimizer.zero_grad()
            call(random(3, 3, 48, 48, seed=seed)).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(network.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert compiled.operators() == ["conv2d", *13 * ["separable_conv2d_training"]]


@pytest.mark.parametrize("training", [True, False])
def test_the_function(training):
    weights = random(5, 1, 3, 3), random(7, 5, 1, 1)
    compiled_bn, bn = (nn.BatchNorm2d(5, momentum=None, dtype=torch.double) for _ in range(2))

    def function(bn):
        def call(x, dw_weight, pw_weight):
            return fusedsep.depthwise_separable_conv2d(x, dw_weight, bn, pw_weight, stride=2, training=training)

        return call

    compiled = Compiled(function(compiled_bn))
    for batch in (2, 3, 4, 7):
        results = []
        for call in (compiled.call, function(bn)):
            leaves = [t.clone().requires_grad_() for t in (random(batch, 5, 8, 9), *weights)]
            y = call(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        assert_same(*results)
        assert_same(list(compiled_bn.buffers()), list(bn.buffers()))
    assert compiled.counter.frame_count == 2
    assert compiled.operators() == ["separable_conv2d_training"]


def test_a_frozen_model():
    block, _ = twins(5, 7)
    frozen = fusedsep.freeze(block)
    compiled = Compiled(frozen)
    x = random(2, 5, 6, 9)
    assert_same([compiled.call(x)], [frozen(x)])
    assert compiled.operators() == ["pack", "separable_conv2d"]


def test_what_kernels_do_not_cover_is_compiled_from_the_modules():
    block, twin = pair()
    block.bn1.register_forward_hook(lambda module, inputs, output: output + 1)
    compiled = Compiled(block)
    x = random(2, 5, 6, 9)
    assert_same([compiled.call(x)], [twin[3:](twin[2](twin[1](twin[0](x)) + 1))])
    assert compiled.operators() == ["conv2d", "conv2d"]


def test_autocast_is_compiled_from_the_modules():
    block, twin = pair(dtype=torch.float32)
    compiled = Compiled(block)
    x = random(2, 5, 6, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled.call(x), twin(x))
    assert compiled.operators() == ["conv2d", "conv2d"]


def test_transforms_are_compiled_from_the_modules():
    block, _ = pair("untracked", "frozen")
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, (x,)).square().mean()

    x = random(2, 5, 6, 9)
    compiled = Compiled(torch.func.grad(loss))
    assert_same(list(compiled.call(parameters, x).values()), list(torch.func.grad(loss)(parameters, x).values()))
    assert "separable_conv2d_training" not in compiled.operators()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_needs_no_operator_of_ours(strict, training):
    block, twin = pair()
    block.train(training)
    twin.train(training)
    x = random(2, 5, 6, 9)
    program = torch.export.export(block, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not [node for node in program.graph.nodes if "fusedsep" in str(node.target)]
    x = random(3, 5, 6, 9)
    assert_same([program.module()(x)], [twin(x)])
