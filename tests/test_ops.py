# SPDX-License-Identifier: BSD-3-Clause
"""The operators `torch.ops.fusedsep.*`: what torch expects of an operator, layouts, threads, and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from randomize import randomized
from subprocesses import run_code

import fusedsep
from fusedsep import DepthwiseSeparableBlock, _ops, reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def in_format(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def weights(in_channels, out_channels, dtype=torch.float32):
    """The arguments of `pack` but the last."""
    double = torch.double
    return (
        random(in_channels, 1, 3, 3, dtype=dtype, seed=1),
        random(in_channels, dtype=double, seed=2),
        random(in_channels, dtype=double, seed=3),
        random(out_channels, in_channels, 1, 1, dtype=dtype, seed=4),
        random(out_channels, dtype=double, seed=5),
        random(out_channels, dtype=double, seed=6),
    )


def arguments(in_channels=5, out_channels=7, size=(6, 9), batch=2, dtype=torch.float32, channels_last=False, stride=1):
    """The arguments of `separable_conv2d`."""
    x = in_format(random(batch, in_channels, *size, dtype=dtype), channels_last)
    packed = _ops.pack(*weights(in_channels, out_channels, dtype), channels_last)
    return x, packed, out_channels, stride, 1, 1, 1, 1, 1, 1, 0, channels_last


def plain(*args, **kwargs):
    """A block with random BNs in eval mode, its unfused twin with the same numbers."""
    block = randomized(DepthwiseSeparableBlock(*args, **kwargs)).eval()
    twin = reference.DepthwiseSeparableBlock(*args, **kwargs).eval()
    twin.load_state_dict(block.state_dict())
    return block, twin


# --------------------------------------------------------------------------------------------- what torch expects


@DTYPES
@FORMATS
def test_opcheck_of_separable_conv2d(dtype, channels_last):
    torch.library.opcheck(_ops.separable_conv2d, arguments(dtype=dtype, channels_last=channels_last, stride=2))


@DTYPES
@FORMATS
def test_opcheck_of_pack(dtype, channels_last):
    torch.library.opcheck(_ops.pack, (*weights(5, 7, dtype), channels_last))
    dw_weight, _, _, pw_weight, _, _ = weights(1, 1, dtype)
    torch.library.opcheck(_ops.pack, (dw_weight, None, None, pw_weight, None, None, channels_last))


@FORMATS
@pytest.mark.parametrize("in_channels", [1, 5])
@pytest.mark.parametrize("out_channels", [1, 7])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 9)])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_fake_output_has_the_strides_of_the_real_one(channels_last, in_channels, out_channels, size, batch):
    """Exactly, also where a dimension is 1 and its stride means nothing: compiled code allocates by them."""
    call = arguments(in_channels, out_channels, size, batch, channels_last=channels_last)
    y = _ops.separable_conv2d(*call)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = _ops.separable_conv2d(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in call))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (y.shape, y.stride(), y.dtype, y.device)


def test_fake_packed_weights_have_the_real_size(isa):
    for channels_last in (False, True):
        call = (*weights(5, 7), channels_last)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = _ops.pack(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in call))
        assert fake.shape == _ops.pack(*call).shape


def test_every_output_byte_is_written(isa):
    torch.use_deterministic_algorithms(True)  # fills what `empty` gives with NaN
    for channels_last in (False, True):
        for size in ((1, 1), (6, 9), (50, 47)):
            call = arguments(9, 17, size, channels_last=channels_last)
            assert call[1].isfinite().all()
            assert _ops.separable_conv2d(*call).isfinite().all()


# -------------------------------------------------------------------------------------------------------- layouts


@FORMATS
def test_output_is_dense_in_the_format_of_the_input(channels_last):
    x, *rest = arguments(channels_last=channels_last)
    y = _ops.separable_conv2d(x, *rest)
    assert y.shape == (2, 7, 6, 9)
    assert y.stride() == ((378, 1, 63, 7) if channels_last else (378, 54, 9, 1))


@pytest.mark.parametrize("size", [(6, 9), (1, 1), (1, 6)])
@pytest.mark.parametrize("channels", [1, 5])
@FORMATS
def test_memory_format_of_a_block_is_that_of_unfused_torch(channels, size, channels_last):
    block, twin = plain(channels, 6, padding=2)
    x = in_format(random(2, channels, *size), channels_last)
    with torch.no_grad():
        assert block(x).stride() == twin(x).stride()


def strange_layouts():
    """Name -> float32 tensors of shape [2, 5, 6, 9] that are no plain dense batch."""
    base = random(4, 10, 12, 18)
    last = in_format(base, True)
    return {
        "slice of a batch": base[1:3, :5, :6, :9],
        "every other channel": base[:2, ::2, 3:9, 2:11],
        "every other pixel": base[:2, 5:, ::2, ::2],
        "slice of channels_last channels": last[:2, 3:8, :6, :9],
        "slice of channels_last rows": last[:2, :5, 4:10, 5:14],
        "transposed": base[:2, :5, :9, :6].transpose(2, 3),
        "permuted": random(9, 6, 5, 2).permute(3, 2, 1, 0),
        "one image for all": base[:1, :5, :6, :9].expand(2, -1, -1, -1),
        "one channel for all": base[:2, :1, :6, :9].expand(-1, 5, -1, -1),
        "one pixel for all": base[:2, :5, :1, :1].expand(-1, -1, 6, 9),
        "one row for all": base[:2, :5, :1, :9].expand(-1, -1, 6, -1),
        "overlapping windows": base.as_strided((2, 5, 6, 9), (40, 7, 3, 1)),
        "offset by one": random(541)[1:].view(2, 5, 6, 9),
        "offset by one, channels_last": random(541)[1:].view(2, 6, 9, 5).permute(0, 3, 1, 2),
        "imaginary part of a conjugate, a negated view": torch.complex(base, base).conj().imag[:2, :5, :6, :9],
    }


@pytest.mark.parametrize("layout", strange_layouts())
def test_any_layout_of_the_input(isa, layout, kernel_calls):
    block, twin = plain(5, 7)
    x = strange_layouts()[layout]
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(block(x), twin(x), rtol=1e-5, atol=1e-5)
    assert kernel_calls
    assert torch.equal(x, before)


WEIGHT_LAYOUTS = {
    "channels_last": lambda weight: in_format(weight, True),
    "every other number": lambda weight: weight.repeat(1, 1, 1, 2)[..., ::2],
    "one channel for all": lambda weight: weight[:1].expand_as(weight),
}


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_any_layout_of_the_weights(isa, layout, kernel_calls):
    block, twin = plain(8, 8)
    for model in (block, twin):
        model.dw.weight = nn.Parameter(WEIGHT_LAYOUTS[layout](model.dw.weight.detach()))
        model.pw.weight = nn.Parameter(WEIGHT_LAYOUTS[layout](model.pw.weight.detach()))
    x = random(2, 8, 6, 9)
    with torch.no_grad():
        torch.testing.assert_close(block(x), twin(x), rtol=1e-5, atol=1e-5)
    assert (
        kernel_calls or layout != "channels_last"
    )  # what `model.to(memory_format=torch.channels_last)` gives is covered


# -------------------------------------------------------------------------------------------------------- threads


@DTYPES
@FORMATS
def test_same_bits_for_every_thread_count(isa, dtype, channels_last):
    for in_channels, out_channels, size, batch in ((600, 70, (7, 7), 1), (9, 17, (31, 33), 2), (33, 65, (5, 3), 5)):
        call = arguments(in_channels, out_channels, size, batch, dtype=dtype, channels_last=channels_last)
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(_ops.separable_conv2d(*call))
        assert all(torch.equal(result, results[0]) for result in results)


def test_same_bits_from_run_to_run():
    call = arguments(33, 65, (14, 14))
    assert all(torch.equal(_ops.separable_conv2d(*call), _ops.separable_conv2d(*call)) for _ in range(5))


def test_eight_python_threads_at_once():
    result = run_code(
        """
        import copy, threading, torch, fusedsep
        from randomize import randomized

        torch.set_num_threads(2)
        block = randomized(fusedsep.DepthwiseSeparableBlock(33, 65)).eval()
        images = [torch.randn(1, 33, 5 + i, 9, generator=torch.Generator().manual_seed(i)) for i in range(8)]
        formats = (torch.contiguous_format, torch.channels_last)
        calls = [[image.contiguous(memory_format=f) for f in formats] for image in images]
        with torch.no_grad():
            expected = [[block(x) for x in pair] for pair in calls]

        for attempt in range(10):
            shared = copy.deepcopy(block)  # has packed nothing yet: the threads race to be the first
            start = threading.Barrier(8)
            right = [False] * 8

            def work(i):
                start.wait()
                with torch.no_grad():
                    right[i] = all(torch.equal(shared(x), y) for _ in range(5) for x, y in zip(calls[i], expected[i]))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(right), right
        print("right")
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "right\n"


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 6, 9), r"x must be a CPU tensor of shape \[N, C, H, W\]"),
        (0, torch.zeros(2, 0, 6, 9), r"x must be a CPU tensor of shape \[N, C, H, W\]"),
        (0, torch.zeros(2, 5, 6, 18)[..., ::2], "x must be contiguous in NCHW memory format"),
        (0, in_format(torch.zeros(2, 5, 6, 9), True), "x must be contiguous in NCHW memory format"),
        (0, torch.zeros(2, 5, 6, 9, dtype=torch.float16), "x must be float32 or float64"),
        (0, torch.zeros(2, 5, 6, 9, dtype=torch.int64), "x must be float32 or float64"),
        (
            0,
            torch.zeros(2, 5, 6, 9, dtype=torch.double),
            "packed must be what fusedsep::pack returned, of the dtype of x",
        ),
        (0, torch.zeros(2, 6, 6, 9), "packed must have been packed for isa .*6 -> 7 channels"),
        (1, torch.zeros(3), "packed must be what fusedsep::pack returned"),
        (1, torch.zeros(100000), "packed must have been packed for isa"),
        (1, torch.zeros(2, 3), "packed must be what fusedsep::pack returned"),
        (2, 8, "packed must have been packed for isa .*5 -> 8 channels"),
        (2, 0, "out_channels must be from 1 to .*, got 0"),
        (2, 2**62, "out_channels must be from 1 to .*, got 4611686018427387904"),
        (3, 3, "stride must be from 1 to 2, got 3"),
        (4, 0, "dilation must be from 1 to .*, got 0"),
        (4, 5, "x is too small: height 6 with padding 1 and 1 does not hold a 3x3 kernel of dilation 5"),
        (5, -1, "pad_left must be from 0 to .*, got -1"),
        (8, 2**40, "pad_bottom must be from 0 to .*, got 1099511627776"),
        (9, 4, "activation must be from 0 to 3, got 4"),
        (10, -1, "pointwise_activation must be from 0 to 3, got -1"),
        (11, True, "x must be contiguous in channels_last memory format"),
    ],
)
def test_separable_conv2d_names_what_does_not_fit(position, value, message):
    call = list(arguments())
    call[position] = value
    with pytest.raises((ValueError, RuntimeError), match=message):
        _ops.separable_conv2d(*call)


def test_channels_last_weights_are_refused_for_nchw():
    x, _, *rest = arguments(8, 8)
    packed = _ops.pack(*weights(8, 8), True)
    with pytest.raises(RuntimeError, match=r"packed must have been packed for .* this memory format"):
        _ops.separable_conv2d(x, packed, *rest)


def test_weights_of_another_isa_are_refused():
    fusedsep.use_isa("portable")
    call = arguments()
    fusedsep.use_isa("portable16")
    with pytest.raises(RuntimeError, match="packed must have been packed for isa portable16"):
        _ops.separable_conv2d(*call)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 3, 3), r"dw_weight must be a contiguous CPU tensor of shape \[C, 1, 3, 3\]"),
        (0, torch.zeros(0, 1, 3, 3), "dw_weight must be a contiguous CPU tensor"),
        (0, torch.zeros(5, 1, 3, 6)[..., ::2], "dw_weight must be a contiguous CPU tensor"),
        (0, torch.zeros(5, 1, 3, 3, dtype=torch.double), "pw_weight must have the dtype of dw_weight"),
        (1, torch.zeros(5), "dw_scale must be a contiguous float64 CPU tensor of 5 elements"),
        (2, torch.zeros(6, dtype=torch.double), "dw_bias must be a contiguous float64 CPU tensor of 5 elements"),
        (3, torch.zeros(7, 6, 1, 1), r"pw_weight must be a contiguous CPU tensor of shape \[N, 5, 1, 1\]"),
        (3, torch.zeros(7, 5), "pw_weight must be a contiguous CPU tensor"),
        (4, torch.zeros(14, dtype=torch.double)[::2], "pw_scale must be a contiguous float64 CPU tensor of 7"),
        (5, torch.zeros(1, 7, dtype=torch.double), "pw_bias must be a contiguous float64 CPU tensor of 7 elements"),
    ],
)
def test_pack_names_what_does_not_fit(position, value, message):
    call = [*weights(5, 7), False]
    call[position] = value
    with pytest.raises(RuntimeError, match=message):
        _ops.pack(*call)


def test_pack_refuses_half_precision():
    dw_weight, pw_weight = torch.zeros(5, 1, 3, 3, dtype=torch.half), torch.zeros(7, 5, 1, 1, dtype=torch.half)
    with pytest.raises(RuntimeError, match="dw_weight must be float32 or float64"):
        _ops.pack(dw_weight, None, None, pw_weight, None, None, False)


def test_an_output_beyond_all_memory_is_an_error():
    x, packed, out_channels, *_ = arguments()
    with pytest.raises(ValueError, match="more elements than memory can address"):
        _ops.separable_conv2d(x, packed, out_channels, 1, 1, 2**30, 2**30, 2**30, 2**30, 1, 1, False)
