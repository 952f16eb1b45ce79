# SPDX-License-Identifier: BSD-3-Clause
"""Any geometry: the block equals its unfused twin, through the kernels."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from randomize import randomized

import fusedsep
from fusedsep import _C, DepthwiseSeparableBlock, reference

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the counter of kernel calls is reset by each example
)

activations = st.sampled_from(["relu", "relu6", "hardswish", "none"])
channels = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 257, 300]))
pads = st.integers(0, 5)
paddings = st.one_of(pads, st.tuples(pads, pads), st.tuples(pads, pads, pads, pads), st.just("same"))


@st.composite
def blocks_and_inputs(draw):
    """Arguments of a block, the shape of an input that its kernel fits into, and how that input lies in memory."""
    dilation = draw(st.integers(1, 3))
    arguments = {
        "in_channels": draw(channels),
        "out_channels": draw(channels),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(paddings),
        "dilation": dilation,
        "activation": draw(activations),
        "pointwise_activation": draw(activations),
    }
    reach = 2 * dilation + 1
    least = 1 if arguments["padding"] == "same" else reach
    shape = (
        draw(st.integers(0, 3)),
        arguments["in_channels"],
        draw(st.integers(least, 24)),
        draw(st.integers(least, 40)),
    )
    layout = draw(st.sampled_from(["nchw", "channels_last", "slice", "channels_last slice", "unbatched"]))
    return arguments, shape, layout


def image(shape, layout, dtype, seed):
    batch, in_channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, in_channels + 3, height + 2, width + 5, generator=generator, dtype=torch.double)
    wide = (2 * wide).to(dtype)
    if layout.startswith("channels_last"):
        wide = wide.contiguous(memory_format=torch.channels_last)
    x = wide[:, 2 : in_channels + 2, 1 : height + 1, 4 : width + 4]
    if layout in ("nchw", "channels_last"):
        x = x.clone()
    return x[0] if layout == "unbatched" and batch else x


@EXAMPLES
@given(
    drawn=blocks_and_inputs(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    isa=st.sampled_from(_C.supported_isas()),
    seed=st.integers(0, 2**16),
)
def test_any_block_equals_its_twin_in_float64(kernel_calls, drawn, dtype, isa, seed):
    arguments, shape, layout = drawn
    torch.manual_seed(seed)
    block = randomized(DepthwiseSeparableBlock(**arguments), seed).eval()
    exact = reference.DepthwiseSeparableBlock(**arguments, dtype=torch.double).eval()
    exact.load_state_dict(block.state_dict())
    block = block.to(dtype)
    x = image(shape, layout, dtype, seed)
    kernel_calls.clear()
    torch.set_num_threads(1)
    with torch.no_grad(), fusedsep.use_isa(isa):
        y = block(x)
        batched = x.double() if x.dim() == 4 else x.double().unsqueeze(0)
        expected = exact(batched).reshape(y.shape)
    assert len(kernel_calls) == 1
    assert y.dtype == dtype
    # Weights are scaled to keep maps near 1, so that a few hundred units in the last place of 1 are room enough.
    tolerance = 400 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
