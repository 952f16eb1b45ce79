# SPDX-License-Identifier: BSD-3-Clause
"""A training step through the kernels is that of the unfused modules: output, every gradient, every buffer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn as nn
from subprocesses import run_code
from training_pairs import NORMS, assert_same, in_format, pair, step
from twins import random

from fusedsep import DepthwiseSeparableBlock

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
ACTIVATIONS = ["relu", "relu6", "hardswish", "none"]


@pytest.fixture
def calls(kernel_calls, training_calls, backward_calls):
    """How often each operator ran: fixed statistics with packed weights, training, gradients."""
    return lambda: (len(kernel_calls), len(training_calls), len(backward_calls))


# ------------------------------------------------------------------------------------------------------------- a step


@FORMATS
@pytest.mark.parametrize(("norm1", "norm2"), list(itertools.product(NORMS, NORMS)))
def test_every_mixture_of_batch_norms(calls, norm1, norm2, channels_last):
    block, twin = pair(norm1, norm2, activation="hardswish")
    x = in_format(random(2, 5, 6, 9), channels_last)
    assert_same(step(block, x), step(twin, x))
    is_fixed = {norm1, norm2} <= {"none", "frozen"}
    assert calls() == ((1, 1, 1) if is_fixed else (0, 1, 1))


@FORMATS
@pytest.mark.parametrize("activations", list(itertools.product(ACTIVATIONS, ACTIVATIONS)))
def test_every_pair_of_activations(calls, activations, channels_last):
    block, twin = pair(activation=activations[0], pointwise_activation=activations[1])
    x = in_format(3 * random(2, 5, 6, 9), channels_last)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


@FORMATS
@pytest.mark.parametrize("padding", [0, 1, (2, 1), (3, 0)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_every_geometry(calls, stride, dilation, padding, channels_last):
    block, twin = pair(stride=stride, dilation=dilation, padding=padding)
    x = in_format(random(2, 5, 8, 7), channels_last)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


@FORMATS
@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "training"), ("none", "none")])
@pytest.mark.parametrize("options", [{"bias": True}, {"affine": False}, {"bias": True, "affine": False}], ids=str)
def test_biases_of_convolutions_and_norms_without_parameters(calls, norms, options, channels_last):
    block, twin = pair(*norms, **options)
    x = in_format(random(2, 5, 6, 9), channels_last)
    assert_same(step(block, x), step(twin, x))
    assert calls()[1:] == (1, 1)


@FORMATS
@pytest.mark.parametrize("channels", [(1, 1), (8, 16), (17, 9), (33, 70)])
def test_channels_around_the_width_of_vectors(calls, channels, channels_last):
    block, twin = pair(channels=channels)
    x = in_format(random(3, channels[0], 5, 11), channels_last)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


@pytest.mark.parametrize("padding", ["same", (0, 2, 1, 0)])
def test_padding_in_front(calls, padding):
    block = DepthwiseSeparableBlock(5, 7, 2, padding=padding, dtype=torch.double)
    pads = (0, 1, 0, 1) if padding == "same" else padding
    twin = nn.Sequential(nn.ZeroPad2d(pads), *pair(stride=2, padding=0)[1])
    ours, theirs = list(block.state_dict().values()), list(twin.state_dict().values())
    for mine, other in zip(ours, theirs, strict=True):
        other.copy_(mine)
    x = random(2, 5, 6, 8)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


def test_an_unbatched_map(calls):
    block, twin = pair()
    unbatched = nn.Sequential(nn.Unflatten(0, (1, 5)), *twin, nn.Flatten(0, 1))
    x = random(5, 6, 9)
    assert_same(step(block, x), step(unbatched, x))
    assert calls() == (0, 1, 1)


@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "frozen"), ("none", "training")])
def test_an_empty_batch(norms):
    """The modules count the batch and change nothing else."""
    block, twin = pair(*norms)
    x = random(0, 5, 6, 9)
    assert_same(step(block, x), step(twin, x))


# ------------------------------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
def test_running_statistics_over_several_steps(calls, momentum):
    block, twin = pair(momentum=momentum)
    for seed in range(4):
        x = 3 + random(2, 5, 6, 9, seed=seed)
        versions = [buffer._version for buffer in block.buffers()]
        assert_same(step(block, x), step(twin, x))
        assert all(buffer._version > before for buffer, before in zip(block.buffers(), versions, strict=True))
    assert calls() == (0, 4, 4)


def test_tracking_switched_off_and_buffers_taken_away(calls):
    block, twin = pair()
    for norms in ((block.bn1, block.bn2), (twin[1], twin[4])):
        norms[0].track_running_stats = False
        norms[1].num_batches_tracked = None
    x = random(2, 5, 6, 9)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


def test_one_norm_in_both_places(calls):
    block, twin = pair(channels=(5, 5))
    block.bn2, twin[4] = block.bn1, twin[1]
    x = random(2, 5, 6, 9)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


def test_statistics_move_without_gradients_too(calls):
    block, twin = pair()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            block(random(2, 5, 6, 9))
            twin(random(2, 5, 6, 9))
    torch.testing.assert_close(list(block.buffers()), list(twin.buffers()))
    assert calls() == (0, 2, 0)


def test_large_means():
    """A mean of 1000 with a deviation of 1: sums of squares would lose all digits of the variance in float32."""
    block, _ = pair(channels=(6, 8), dtype=torch.float32, padding=0)
    exact, single = pair(channels=(6, 8), padding=0)[1], pair(channels=(6, 8), dtype=torch.float32, padding=0)[1]
    exact.load_state_dict(single.state_dict())
    x = (1000 + random(4, 6, 20, 20)).float()
    ours, theirs, expected = step(block, x), step(single, x), step(exact, x.double())
    for mine, other, reference in zip(ours, theirs, expected, strict=True):
        error, allowed = ((value - reference).abs().max() for value in (mine, other))
        assert error <= 2 * allowed + 1e-6 * reference.abs().max()


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "frozen"), ("none", "none")])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 5), (0, 3), "all but x"])
def test_only_the_wanted_gradients(calls, norms, wanted):
    block, twin = pair(*norms, bias=True, activation="hardswish", pointwise_activation="none")
    results = []
    for model in (block, twin):
        x = random(2, 5, 6, 9)
        leaves = [x, *model.parameters()]
        chosen = [i for i in range(len(leaves)) if (i > 0 if wanted == "all but x" else i in wanted)]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in chosen)
        y = model(x)
        y.backward(random(*y.shape, seed=1))
        results.append([leaf.grad for leaf in leaves])
    assert [grad is None for grad in results[0]] == [grad is None for grad in results[1]]
    assert_same(*results)
    assert calls()[2] == 1


@FORMATS
@pytest.mark.parametrize("norms", [("training", "training"), ("frozen", "frozen")])
@pytest.mark.parametrize(
    "grad_y",
    [
        lambda y: torch.ones((), dtype=y.dtype).expand_as(y),
        lambda y: random(1, 7, 1, 1).expand_as(y),
        lambda y: in_format(random(*y.shape), True),
        lambda y: in_format(random(*y.shape), False),
        lambda y: random(*y.shape[:3], 2 * y.shape[3])[..., ::2],
        lambda y: random(*y.shape[::-1]).permute(3, 2, 1, 0),
    ],
    ids=["one number", "one number a channel", "channels_last", "nchw", "every other", "transposed"],
)
def test_any_layout_of_the_gradient(calls, norms, grad_y, channels_last):
    block, twin = pair(*norms)
    x = in_format(random(2, 5, 6, 9), channels_last)
    assert_same(step(block, x, grad_y), step(twin, x, grad_y))
    assert calls()[2] == 1


@FORMATS
def test_gradients_have_the_memory_format_of_their_tensor(channels_last):
    block, twin = pair(channels=(8, 16))
    x = in_format(random(2, 8, 6, 9), channels_last)
    for ours, theirs in zip(step(block, x), step(twin, x), strict=True):
        assert ours.stride() == theirs.stride()


def test_weights_of_a_model_in_channels_last(calls):
    block, twin = (model.to(memory_format=torch.channels_last) for model in pair(channels=(8, 16)))
    x = in_format(random(2, 8, 6, 9), True)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


def test_parameters_that_are_slices(calls):
    block, twin = pair()
    for model in (block, twin):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                wide = torch.stack([parameter.detach(), parameter.detach()], -1)
                setattr(module, name, nn.Parameter(wide[..., 0]))
    x = random(2, 5, 6, 18)[..., ::2]
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 1, 1)


def test_no_graph_without_a_wanted_gradient():
    block, _ = pair()
    assert block.requires_grad_(False)(random(2, 5, 6, 9)).grad_fn is None


def test_several_steps_of_an_optimizer(calls):
    block, twin = pair()
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for model in (block, twin)
    ]
    for seed in range(6):
        x, target = random(4, 5, 6, 9, seed=seed), random(4, 7, 6, 9, seed=seed + 100)
        for model, optimizer in zip((block, twin), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        for ours, theirs in zip(block.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        for ours, theirs in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-10)
    assert calls() == (1, 6, 6)


def test_every_number_is_written():
    block, _ = pair(channels=(9, 17), bias=True)
    x = random(2, 9, 7, 8)
    expected = step(block, x)
    torch.use_deterministic_algorithms(True)  # fills what `empty` gives with NaN
    again = step(pair(channels=(9, 17), bias=True)[0], x)
    assert all(torch.equal(*values) for values in zip(again, expected, strict=True))
    assert all(value.isfinite().all() for value in again)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("norms", [("training", "none"), ("none", "untracked"), ("eval without statistics", "frozen")])
@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (5, 1, 1)])
def test_one_value_per_channel(norms, shape):
    block, twin = pair(*norms)
    before = [buffer.clone() for buffer in block.buffers()]
    with pytest.raises(ValueError, match=r"x must give more than 1 value per channel when training.* one output pixel"):
        block(random(*shape))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twin(random(1, 5, 1, 1))
    assert all(torch.equal(*buffers) for buffers in zip(block.buffers(), before, strict=True))


def test_one_pixel_of_two_images_is_enough():
    block, twin = pair()
    x = random(2, 5, 1, 1)
    assert_same(step(block, x), step(twin, x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (random(2, 6, 6, 9), ValueError, "x must have 5 channels, got 6"),
        (random(2, 5, 6, 9).float(), TypeError, r"x must have the dtype of the weights, torch\.float64, got .*float32"),
        (random(2, 5, 0, 9), ValueError, "x must hold the 3x3 kernel"),
    ],
)
def test_names_what_does_not_fit(x, error, message):
    with pytest.raises(error, match=message):
        pair()[0](x)


# ------------------------------------------------------------------------------------------------- stepping aside


def with_hook(model):
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).register_forward_hook(
        lambda module, inputs, output: output * 2
    )


def with_a_norm_of_its_own(model):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = Doubled


def with_a_forward_on_the_instance(model):
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda x, original=module.forward: 2 * original(x)


@pytest.mark.parametrize("change", [with_hook, with_a_norm_of_its_own, with_a_forward_on_the_instance])
def test_what_is_not_known_trains_through_torch(calls, change):
    block, twin = pair()
    for model in (block, twin):
        change(model)
    x = random(2, 5, 6, 9)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 0, 0)


def test_norms_of_another_type_train_through_torch(calls):
    block, twin = pair(dtype=torch.bfloat16)
    for model in (block, twin):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    x = random(2, 5, 6, 9, dtype=torch.bfloat16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(block, x), step(twin, x), strict=True))
    assert calls() == (0, 0, 0)


def test_stride_three_trains_through_torch(calls):
    block, twin = pair(stride=3)
    x = random(2, 5, 8, 9)
    assert_same(step(block, x), step(twin, x))
    assert calls() == (0, 0, 0)


def test_autocast_trains_through_torch(calls):
    block, twin = pair(dtype=torch.float32)
    x = random(2, 5, 6, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model(x) for model in (block, twin))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    assert calls() == (0, 0, 0)


# ------------------------------------------------------------------------------------------------------------ threads


def test_eight_python_threads_train_at_once():
    result = run_code(
        """
        import threading, torch
        from training_pairs import pair, step
        from twins import random

        torch.set_num_threads(2)

        def train(i):
            block, _ = pair(channels=(9 + i, 17), norm1=("training", "frozen")[i % 2])
            return [value for seed in range(5) for value in step(block, random(2, 9 + i, 7, 8, seed=seed))]

        expected = [train(i) for i in range(8)]
        start = threading.Barrier(8)
        blocks = [None] * 8
        lock = threading.Lock()

        def work(i):
            with lock:  # the generator that fills new weights belongs to all
                block, _ = pair(channels=(9 + i, 17), norm1=("training", "frozen")[i % 2])
            start.wait()
            blocks[i] = [value for seed in range(5) for value in step(block, random(2, 9 + i, 7, 8, seed=seed))]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for got, wanted in zip(blocks, expected):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        print("right")
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "right\n"
