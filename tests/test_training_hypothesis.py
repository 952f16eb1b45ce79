# SPDX-License-Identifier: BSD-3-Clause
"""Any geometry: the training operators equal autograd of the unfused functions."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import torch
from cases import Case
from hypothesis import assume, given, settings
from training_reference import arguments, outcome, outcome_of_passes, outcome_of_torch

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=bool(os.environ.get("CI")))

activations = st.sampled_from(["relu", "relu6", "hardswish", "none"])
channels = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 129]))
modes = st.sampled_from([0, 1, 2])


@st.composite
def any_case(draw):
    dilation = draw(st.integers(1, 3))
    case = Case(
        in_channels=draw(channels),
        out_channels=draw(channels),
        height=draw(st.integers(1, 24)),
        width=draw(st.integers(1, 40)),
        stride=draw(st.integers(1, 2)),
        pads=tuple(draw(st.integers(0, 5)) for _ in range(4)),
        dilation=dilation,
        activation=draw(activations),
        pointwise_activation=draw(activations),
        batch=draw(st.integers(1, 3)),
    )
    assume(min(case.out_shape[2:]) >= 1 and case.batch * case.out_shape[2] * case.out_shape[3] > 2)
    return case


@EXAMPLES
@given(
    case=any_case(),
    modes=st.tuples(modes, modes),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_geometry(case, modes, bias, channels_last, seed):
    exact = arguments(case, modes, bias, seed, distance=1e-9)
    # BN of nearly equal values divides by a small number, whose rounding is the result's.
    expected_ones = outcome_of_torch(exact)
    for run in (outcome, outcome_of_passes):
        for ours, expected in zip(run(exact, torch.double, channels_last), expected_ones, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9 * max(1.0, expected.abs().max().item()))
