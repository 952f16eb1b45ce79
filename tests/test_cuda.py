# SPDX-License-Identifier: BSD-3-Clause
"""On a GPU: the kernels for inference against float64 and ATen, and ATen's kernels for everything else.

Run them all: FAIL_WITHOUT_CUDA=1 FAIL_WITHOUT_CUDA_BUILD=1 pytest tests/test_cuda.py
"""

from __future__ import annotations

import cases
import pytest
import tolerance
import torch
from cases import ACTIVATION_CODES, Case
from cuda_emulated import TYPES, rounded, within_bound
from emulated_gpu import each_case

import fusedsep
from fusedsep import _cuda, _ops

pytestmark = [pytest.mark.needs_cuda, pytest.mark.needs_cuda_build]

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(case, operands, channels_last, type_name="float32"):
    """The operators, as a float32 NumPy array."""
    dtype = getattr(torch, type_name)

    def on_gpu(array):
        return torch.from_numpy(array).cuda()

    x = on_gpu(operands.x).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    packed = _ops.pack(
        on_gpu(operands.dw_weight)[:, None].to(dtype),
        None,
        on_gpu(operands.dw_bias),
        on_gpu(operands.pw_weight)[:, :, None, None].to(dtype),
        None,
        on_gpu(operands.pw_bias),
        channels_last,
    )
    y = _ops.separable_conv2d(
        x,
        packed,
        case.out_channels,
        case.stride,
        case.dilation,
        *case.pads,
        ACTIVATION_CODES[case.activation],
        ACTIVATION_CODES[case.pointwise_activation],
        channels_last,
        _cuda.allows_tf32(),
    )
    assert y.dtype == dtype
    return y.float().cpu().numpy()


@FORMATS
@pytest.mark.parametrize("type_name", TYPES)
@each_case(cases.ALL)
def test_error_is_within_its_bound(case, type_name, channels_last):
    operands = rounded(cases.operands(case), type_name)
    y = run(case, operands, channels_last, type_name)
    within_bound(y, case, operands, type_name, cases.reference(case, operands))


@FORMATS
@each_case(cases.LAYERS)
def test_tf32_where_it_is_allowed(case, channels_last, monkeypatch):
    operands = cases.operands(case)
    expected = cases.reference(case, operands)
    exact = run(case, operands, channels_last)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    y = run(case, operands, channels_last)
    within_bound(y, case, operands, "float32", expected, allow_tf32=True)
    assert abs(y - expected).max() > 4 * abs(exact - expected).max()


@FORMATS
@each_case(cases.LAYERS)
def test_error_is_that_of_aten(case, channels_last):
    operands = cases.operands(case)
    expected = cases.reference(case, operands)
    block = blocks(case)[1].cuda()
    with torch.no_grad():
        for name, value in (("dw", operands.dw_weight[:, None]), ("pw", operands.pw_weight[:, :, None, None])):
            getattr(block, name).weight.copy_(torch.from_numpy(value))
        for norm, bias in ((block.bn1, operands.dw_bias), (block.bn2, operands.pw_bias)):
            norm.reset_parameters()
            norm.running_var.fill_(1 - norm.eps)
            norm.bias.copy_(torch.from_numpy(bias))
        theirs = abs(block(torch.from_numpy(operands.x).cuda()).cpu().numpy() - expected).max()
    ours = abs(run(case, operands, channels_last) - expected).max()
    assert ours <= tolerance.FACTOR_TO_TORCH * theirs + tolerance.one_rounding(expected, "float32")


CASE = Case(24, 40, 13, 11, 2, batch=3, activation="relu6")


def blocks(case=CASE):
    """A fused block in eval with statistics of its own, and its unfused twin."""
    torch.manual_seed(0)
    arguments = {
        "padding": case.pads,
        "dilation": case.dilation,
        "activation": case.activation,
        "pointwise_activation": case.pointwise_activation,
    }
    block, twin = (
        cls(case.in_channels, case.out_channels, case.stride, **arguments)
        for cls in (fusedsep.DepthwiseSeparableBlock, fusedsep.reference.DepthwiseSeparableBlock)
    )
    for norm in (block.bn1, block.bn2):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
    twin.load_state_dict(block.state_dict())
    return block.eval(), twin.eval()


def assert_near(actual, expected, eps=1e-4):
    assert (actual.double() - expected.double()).abs().max() <= eps * expected.double().abs().max()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_block_runs_the_kernels(kernel_calls, dtype, channels_last):
    block, twin = blocks()
    x = torch.randn(3, 24, 13, 11)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected = twin.double()(x.to(dtype).double())
    with torch.no_grad():
        y = block.to("cuda", dtype)(x.to("cuda", dtype))
    assert len(kernel_calls) == (channels_last or dtype == torch.float32)  # ATen is faster for NCHW of 16 bits
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_near(y.cpu(), expected, 16 * torch.finfo(dtype).eps)


def test_a_changed_parameter_is_noticed(kernel_calls):
    block, _ = blocks()
    block, x = block.cuda(), torch.randn(3, 24, 13, 11, device="cuda")
    with torch.no_grad():
        before = block(x)
        block.pw.weight.data.neg_()
        block.bn2.bias.data.zero_()
        block.bn2.running_mean.data.zero_()
        after = block(x)
    assert len(kernel_calls) == 2
    assert not torch.equal(before, after)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_and_statistics_are_those_of_aten(kernel_calls, training_calls, train):
    block, twin = (module.cuda().train(train) for module in blocks())
    x = torch.randn(3, 24, 13, 11, device="cuda")
    for module in (block, twin):
        module(x).square().sum().backward()
    assert not kernel_calls and not training_calls
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad)
    for ours, theirs in zip(block.buffers(), twin.buffers(), strict=True):
        assert_near(ours, theirs)


def test_gradcheck():
    block = fusedsep.DepthwiseSeparableBlock(2, 3, activation="hardswish", pointwise_activation="none").cuda().double()
    x = torch.randn(2, 2, 4, 3, dtype=torch.double, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), nondet_tol=1e-12)  # ATen may add up in any order


def test_autocast_is_that_of_aten():
    block, twin = (module.cuda() for module in blocks())
    x = torch.randn(3, 24, 13, 11, device="cuda")
    with torch.no_grad(), torch.autocast("cuda"):
        y, expected = block(x), twin(x)
    assert y.dtype == expected.dtype
    assert_near(y, expected, 1e-2)


def test_a_frozen_network_and_a_fused_one(kernel_calls):
    model = fusedsep.reference.MobileNetV1(10, 0.25).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model.double()(x.double())
    model = model.float().cuda()
    with torch.no_grad():
        assert_near(fusedsep.fuse(model)(x.cuda()).cpu(), expected)
        fused_calls = len(kernel_calls)
        assert_near(fusedsep.freeze(model)(x.cuda()).cpu(), expected)
    assert fused_calls == 13
    assert len(kernel_calls) == 26


def test_same_bits_every_time():
    block, _ = blocks()
    block, x = block.cuda(), torch.randn(3, 24, 13, 11, device="cuda")
    with torch.no_grad():
        y = block(x)
        assert all(torch.equal(block(x), y) for _ in range(20))
        assert torch.equal(block(x[1:2]), y[1:2])


@pytest.mark.needs_gpu
def test_graph_capture():
    block, _ = blocks()
    block, x = block.cuda(), torch.randn(3, 24, 13, 11, device="cuda")
    with torch.no_grad():
        block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, block(x))


def test_the_current_stream_is_used():
    """What a stream is still to write is read after it was written."""
    block, _ = blocks()
    block, x = block.cuda(), torch.zeros(3, 24, 13, 11, device="cuda")
    value = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(value)
        y = block(x)
    stream.synchronize()
    with torch.no_grad():
        assert torch.equal(y, block(value))


def test_every_device():
    for device in range(torch.cuda.device_count()):
        block, twin = (module.to(f"cuda:{device}") for module in blocks())
        x = torch.randn(3, 24, 13, 11, device=f"cuda:{device}")
        with torch.no_grad(), torch.cuda.device(0):
            y = block(x)
            assert y.device == x.device
            assert_near(y, twin(x))


@pytest.mark.needs_gpu
def test_compile(kernel_calls):
    block, twin = (module.cuda() for module in blocks())
    x = torch.randn(3, 24, 13, 11, device="cuda")
    with torch.no_grad():
        assert_near(torch.compile(block, fullgraph=True)(x), twin(x))


@pytest.mark.needs_gpu
@FORMATS
def test_more_than_two_to_the_31_elements(channels_last):
    shape = (3, 64, 3400, 3400)
    assert torch.Size(shape).numel() > 2**31
    dtype = torch.float16 if channels_last else torch.float32  # what the kernels take
    needed = 4 * dtype.itemsize * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"peak memory: {needed / 2**30:.0f} GiB of GPU memory are not free")
    block = fusedsep.DepthwiseSeparableBlock(64, 64).eval().to("cuda", dtype)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, device="cuda", dtype=dtype, memory_format=fmt).normal_()
    with torch.no_grad():
        y = block(x)
        for image, row, column in ((0, 0, 0), (1, 1700, 1700), (2, 3380, 3380)):
            window = x[image : image + 1, :, row : row + 20, column : column + 20].contiguous(memory_format=fmt)
            # All but the border, which sees what is around the window.
            expected = block(window)[..., 1:-1, 1:-1]
            assert torch.equal(y[image : image + 1, :, row + 1 : row + 19, column + 1 : column + 19], expected)


def test_bad_arguments():
    block, _ = blocks()
    with pytest.raises(ValueError, match="x must be on the device of the weights, cuda:0, got cpu"):
        block.cuda()(torch.randn(3, 24, 13, 11))
    x = torch.randn(1, 24, 8, 8, device="cuda")
    with pytest.raises(RuntimeError, match="packed must be what fusedsep::pack returned on the device of x"):
        _ops.separable_conv2d(x, torch.zeros(8, device="cuda"), 40, 1, 1, 1, 1, 1, 1, 0, 0, False)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        _ops.separable_conv2d(
            x.double(), torch.zeros(_cuda.packed_size(24, 40, 4), device="cuda"), 40, 1, 1, 1, 1, 1, 1, 0, 0, False
        )
    with pytest.raises(RuntimeError, match=r"fewer than 2\^30 images, rows and columns"):
        _ops.separable_conv2d(x, torch.zeros(8, device="cuda"), 40, 1, 1, 1, 1, 1 << 30, 1, 0, 0, False)
