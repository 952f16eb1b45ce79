# SPDX-License-Identifier: BSD-3-Clause
"""Training on a GPU: the kernels against float64 and ATen, and ATen for what they do not cover.

Run them all: FAIL_WITHOUT_CUDA=1 FAIL_WITHOUT_CUDA_BUILD=1 pytest tests/test_cuda_training.py
"""

from __future__ import annotations

import itertools

import emulated_gpu
import pytest
import torch
import torch.nn as nn
from cases import Case
from emulated_gpu import each_case
from tolerance import FACTOR_TO_TORCH
from torch.utils.checkpoint import checkpoint_sequential
from training_pairs import in_format, pair, step
from training_reference import (
    CASES,
    LARGE,
    MODES,
    arguments,
    assert_near,
    inherent_errors,
    outcome,
    outcome_of_torch,
    run,
)

import fusedsep
from fusedsep import _cuda, reference

pytestmark = [pytest.mark.needs_cuda, pytest.mark.needs_cuda_build]

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
#: BN of two values has no gradient at all: what float32 leaves of it is rounding.
SHAPES = [*(case for case in CASES if case.batch * case.out_shape[2] * case.out_shape[3] > 2), *LARGE]
SMALL = Case(16, 24, 20, 20, batch=2, pointwise_activation="relu")


@pytest.fixture(autouse=True)
def _training_kernels(monkeypatch):
    """In use, and beside them ATen's without TF32."""
    monkeypatch.setattr(_cuda, "_trains", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# ------------------------------------------------------------------------------------------------------ the operators


@each_case(SHAPES)
def test_every_shape(case):
    distance = min(3e-7 if case in LARGE else 1e-4, 1.0 / (40 * torch.Size(case.out_shape).numel()))
    given = arguments(case, distance=distance)
    runs = (outcome(given, torch.float32, channels_last, device="cuda") for channels_last in (False, True))
    assert_near(given, torch.float32, *runs)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_mixture_of_batch_norms(modes, bias):
    case = Case(9, 17, 7, 9, 2, batch=2, activation="hardswish", pointwise_activation="relu6")
    given = arguments(case, modes, bias, seed=3)
    runs = (outcome(given, torch.float32, channels_last, device="cuda") for channels_last in (False, True))
    assert_near(given, torch.float32, *runs)


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_large_mean_does_not_cancel(mean):
    case = Case(12, 20, 30, 31, batch=2, pads=(0, 0, 0, 0), activation="none", pointwise_activation="none")
    given = arguments(case, mean=mean)
    runs = (outcome(given, torch.float32, channels_last, device="cuda") for channels_last in (False, True))
    assert_near(given, torch.float32, *runs)


@FORMATS
@each_case([SMALL, *LARGE])
def test_error_is_that_of_aten_on_the_device(case, channels_last):
    given = arguments(case, distance=0)
    ours = outcome(given, torch.float32, channels_last, device="cuda")
    theirs, expected = (outcome_of_torch(given, dtype, device="cuda") for dtype in (torch.float32, torch.float64))
    inherent = inherent_errors(given, torch.float32, [tensor.cpu() for tensor in expected])
    for one, other, exact, moved in zip(ours, theirs, expected, inherent, strict=True):
        # In the mean: where a number is next to a kink, rounding decides about its derivative.
        error, allowed = ((result.double() - exact).square().mean().sqrt() for result in (one, other))
        assert error <= FACTOR_TO_TORCH * allowed + moved


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_case([SMALL, *LARGE])
def test_16_bit_types(case, dtype, channels_last):
    given = arguments(case, bias=True, distance=0)
    operands = tuple(None if t is None else t.to(dtype).double() for t in given.operands)
    given = given._replace(x=given.x.to(dtype).double(), operands=operands, grad_y=given.grad_y.to(dtype).double())
    ours = outcome(given, dtype, channels_last, device="cuda")
    theirs, expected = (outcome_of_torch(given, own, device="cuda") for own in (dtype, torch.float64))
    for one, other, exact in zip(ours, theirs, expected, strict=True):
        error, allowed = ((result.double() - exact).square().mean().sqrt() for result in (one, other))
        assert error <= FACTOR_TO_TORCH * allowed + torch.finfo(dtype).eps * exact.abs().max()


@FORMATS
@DTYPES
@each_case([SMALL, *LARGE])
def test_same_bits_every_time(case, dtype, channels_last):
    given = arguments(case, distance=0)
    expected = [tensor.clone() for tensor in itertools.chain(*run(given, dtype, channels_last, device="cuda"))]
    for _ in range(2 if emulated_gpu.IS_WANTED else 10):
        actual = itertools.chain(*run(given, dtype, channels_last, device="cuda"))
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@FORMATS
def test_only_what_is_wanted(channels_last):
    given = arguments(Case(9, 17, 7, 9, batch=2), (1, 1), bias=True)
    _, everything = run(given, torch.float32, channels_last, device="cuda")
    for wanted in [*(1 << bit for bit in range(9)), 0, 0b000100001, 0b111000000]:
        _, gradients = run(given, torch.float32, channels_last, wanted, device="cuda")
        for bit, (gradient, full) in enumerate(zip(gradients, everything, strict=True)):
            assert torch.equal(gradient, full) if wanted >> bit & 1 else gradient.shape == (0,)


@FORMATS
def test_every_element_is_written(channels_last):
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    for case in (
        *LARGE[: 1 if emulated_gpu.IS_WANTED else None],
        Case(3, 5, 7, 6, 2, (0, 0, 0, 0), batch=2),
        Case(5, 6, 9, 9, dilation=3, batch=2),
    ):
        outputs, gradients = run(arguments(case, distance=0), torch.float32, channels_last, device="cuda")
        assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *gradients))


def test_bad_arguments():
    given = arguments(Case(9, 17, 7, 9, batch=2))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        run(given, torch.float64, device="cuda")
    elsewhere = given.grad_y.float()
    with pytest.raises(RuntimeError, match=r"grad_y must be a CUDA tensor of shape \[2, 17, 7, 9\]"):
        run(given, torch.float32, grad_y=elsewhere, device="cuda")


# ---------------------------------------------------------------------------------------------------------- the blocks

LAYERS = [(24, 40, 1), (40, 48, 2), (48, 33, 1), (33, 33, 1)]


def networks(dtype=torch.float32):
    """Blocks one after the other, so that each keeps the product of the one before for its input; and their twins."""
    torch.manual_seed(0)
    blocks, twins = (
        nn.Sequential(*(cls(*layer, pointwise_activation="hardswish") for layer in LAYERS)).to("cuda", dtype)
        for cls in (fusedsep.DepthwiseSeparableBlock, reference.DepthwiseSeparableBlock)
    )
    twins.load_state_dict(blocks.state_dict())
    return blocks, twins


def gpu_step(model, x):
    return step(model, x, torch.ones_like)


def close_in_the_mean(ours, theirs, eps, absolute=None):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        one, other = one.double(), other.double()
        assert (one - other).square().mean().sqrt() <= eps * other.abs().max() + (absolute or eps)


def maps(channels_last, dtype=torch.float32, size=11):
    torch.manual_seed(1)
    return in_format(torch.randn(4, 24, size, size, device="cuda", dtype=dtype), channels_last)


@FORMATS
@DTYPES
def test_a_step_of_blocks(training_calls, backward_calls, dtype, channels_last):
    blocks, twins = networks(dtype)
    x = maps(channels_last, dtype)
    ours, theirs = (gpu_step(model, x) for model in (blocks, twins))
    covered = channels_last or dtype == torch.float32
    assert len(training_calls) == len(backward_calls) == (len(LAYERS) if covered else 0)
    close_in_the_mean(ours, theirs, 64 * torch.finfo(dtype).eps)


def test_switched_off(monkeypatch, training_calls):
    monkeypatch.setattr(_cuda, "_trains", False)
    blocks, twins = networks()
    ours, theirs = (gpu_step(model, maps(False)) for model in (blocks, twins))
    assert not training_calls
    close_in_the_mean(ours, theirs, 1e-5)


@FORMATS
@pytest.mark.parametrize("norms", [("frozen", "frozen"), ("training", "none"), ("none", "untracked")], ids=str)
def test_frozen_and_absent_batch_norms(backward_calls, norms, channels_last):
    block, twin = (module.cuda() for module in pair(*norms, bias=True, dtype=torch.float32))
    x = in_format(torch.randn(3, 5, 13, 11, device="cuda"), channels_last)
    ours, theirs = (gpu_step(module, x) for module in (block, twin))
    assert len(backward_calls) == 1
    # A bias in front of a BN of the batch has no gradient; ATen's is what rounding leaves of its sums.
    close_in_the_mean(ours, theirs, 1e-5, absolute=1e-3)


def test_momentum_none_and_16_bits():
    block, twin = (module.cuda() for module in pair(dtype=torch.bfloat16, momentum=None))
    x = maps(True, torch.bfloat16)[:, :5].contiguous(memory_format=torch.channels_last)
    ours, theirs = (gpu_step(module, x) for module in (block, twin))
    close_in_the_mean(ours, theirs, 0.05)


def test_gradcheck():
    """In float64, which ATen runs: that the way there is open and right."""
    block = fusedsep.DepthwiseSeparableBlock(2, 3, activation="hardswish", pointwise_activation="none").cuda().double()
    x = torch.randn(2, 2, 4, 3, dtype=torch.double, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), nondet_tol=1e-12)  # ATen may add up in any order


def test_the_gradient_of_a_gradient_is_that_of_aten():
    blocks, twins = networks()
    results = []
    for model in (blocks, twins):
        x = maps(False).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    close_in_the_mean(*results, 1e-4)


def test_autocast_is_that_of_aten(training_calls):
    blocks, twins = networks()
    results = []
    for model in (blocks, twins):
        scaler = torch.amp.GradScaler("cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x = maps(True).requires_grad_()
        with torch.autocast("cuda", dtype=torch.float16):
            y = model(x)
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append([y, x.grad, *model.parameters()])
    assert not training_calls
    close_in_the_mean(*results, 1e-2)


def test_checkpointing():
    blocks, _ = networks()
    x = maps(True).requires_grad_()
    y = checkpoint_sequential(blocks, 2, x, use_reentrant=False)
    y.backward(torch.ones_like(y))
    again, _ = networks()
    plain = gpu_step(again, x)
    assert torch.equal(y, plain[0])
    assert torch.equal(x.grad, plain[1])


def whole_step(model, x, optimizer):
    optimizer.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.needs_gpu
@FORMATS
def test_graph_capture_of_a_training_step(channels_last):
    blocks, _ = networks()
    eager, _ = networks()
    x = maps(channels_last)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (blocks, eager)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            whole_step(blocks, x, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        whole_step(blocks, x, optimizers[0])
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        whole_step(eager, x, optimizers[1])
    for one, other in zip(blocks.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_current_stream_is_used():
    """What a stream is still to write is read after it was written."""
    blocks, _ = networks()
    again, _ = networks()
    value, x = maps(True), torch.zeros_like(maps(True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(value)
        late = gpu_step(blocks, x)
    stream.synchronize()
    for one, other in zip(late, gpu_step(again, value), strict=True):
        assert torch.equal(one, other)


def test_every_device():
    for device in range(torch.cuda.device_count()):
        blocks, twins = (model.to(f"cuda:{device}") for model in networks())
        x = maps(True).to(f"cuda:{device}")
        with torch.cuda.device(0):
            ours, theirs = (gpu_step(model, x) for model in (blocks, twins))
        assert all(tensor.device == x.device for tensor in ours)
        close_in_the_mean(ours, theirs, 1e-5)


@pytest.mark.needs_gpu
def test_compile(training_calls):
    blocks, twins = networks()
    compiled = torch.compile(blocks, fullgraph=True)
    x = maps(True)
    ours = gpu_step(compiled, x)
    theirs = gpu_step(twins, x)
    close_in_the_mean(ours, theirs, 1e-5)


@pytest.mark.needs_gpu
@FORMATS
def test_maps_of_more_than_two_to_the_31_elements(channels_last):
    dtype = torch.float16 if channels_last else torch.float32  # what the kernels take
    shape = torch.Size((3, 64, 3400, 3400))
    assert shape.numel() > 2**31
    needed = 9 * dtype.itemsize * shape.numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"peak memory: {needed / 2**30:.0f} GiB of GPU memory are not free")
    block = fusedsep.DepthwiseSeparableBlock(64, 64).to("cuda", dtype)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, device="cuda", dtype=dtype, memory_format=fmt).normal_()
    y = block(x)
    y[2, :, 3300:, 3300:].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in block.parameters())
    # Channels of y are normalized, up to ReLU: half of its numbers are positive, with this mean.
    assert abs(y[2, :, 3000:, 3000:].float().mean() - 0.4) < 0.1
