# SPDX-License-Identifier: BSD-3-Clause
"""Memory that a training step of one block takes for a while, besides what it returns: counted by torch's profiler."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusedsep

BATCH, SIZE = 2, 40  # maps wide enough to run in either memory format


def peak_bytes(run):
    """The most bytes of tensors that ``run`` holds at a time beyond those that were there before, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most, result


def map_bytes(channels, size):
    return 4 * BATCH * channels * size * size


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(32, 48), (48, 32)])
def test_a_step_holds_few_maps_at_a_time(in_channels, out_channels, stride, channels_last):
    block = fusedsep.DepthwiseSeparableBlock(in_channels, out_channels, stride)
    x = torch.randn(BATCH, in_channels, SIZE, SIZE)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    small = 4 * sum(p.numel() for p in block.parameters()) + 64 * 1024  # gradients, values a channel
    out_size = SIZE // stride
    hidden, out = map_bytes(in_channels, out_size), map_bytes(out_channels, out_size)

    peak, y = peak_bytes(lambda: block(x))
    # y and p, which stay; the depthwise map lies in the memory of y if that is large enough.
    assert 2 * out <= peak <= 2 * out + (hidden if in_channels > out_channels else 0) + small

    gradient = torch.randn_like(y)
    peak, _ = peak_bytes(lambda: torch.autograd.grad(y, [x, *block.parameters()], gradient))
    # The gradient of x; that of the depthwise map lies in its memory if the two are of one size.
    grad_x = map_bytes(in_channels, SIZE)
    assert grad_x <= peak <= grad_x + (hidden if stride == 2 else 0) + small
