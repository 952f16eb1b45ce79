# SPDX-License-Identifier: BSD-3-Clause
"""A pointwise convolution, its BN and its activation, trained as one operation."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from cases import Case
from fused_pairs import assert_same, assert_trains_alike, pair
from models import BatchNormAct2d, MobileNetV2, depthwise, pointwise
from randomize import randomized
from test_kept_input import every_input_kept, kept_maps
from test_training_kernels import assert_bits_equal
from test_training_ops import assert_fakes_are_alike, assert_transforms
from torch.autograd import forward_ad
from training_pairs import in_format, step
from training_reference import arguments, assert_near, outcome, outcome_of_torch, run, settings, shared_arguments
from twins import random

import fusedsep
from fusedsep import _ops, _pointwise
from fusedsep._pointwise import PointwiseConv

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MODES = pytest.mark.parametrize("mode", [_ops.NO_NORM, _ops.FIXED_STATISTICS, _ops.BATCH_STATISTICS])
ACTIVATIONS = ("none", "relu", "relu6", "hardswish")

#: Channels around lanes and register tiles, then maps around them, then several tiles and groups of tiles; weights that
#: are added up in parts, and larger ones.
CASES = [
    *(Case(n, 9, 5, 7, batch=2) for n in (1, 3, 4, 5, 8, 15, 16, 17, 33)),
    *(Case(6, n, 5, 7, batch=2, pointwise_activation="relu6") for n in (1, 4, 6, 7, 8, 13, 14, 15, 16, 17, 32, 33)),
    *(Case(3, 5, 1, n, batch=b) for n, b in ((1, 3), (2, 2), (3, 1), (7, 1), (31, 2), (32, 1), (33, 2), (65, 1))),
    Case(24, 40, 33, 31, batch=3, pointwise_activation="relu6"),
    Case(40, 24, 35, 37, batch=2, pointwise_activation="hardswish"),
]
LARGE = [
    Case(130, 70, 15, 17, batch=3, pointwise_activation="relu"),
    Case(136, 140, 13, 33, batch=2, pointwise_activation="relu6"),
    Case(16, 32, 190, 180, batch=2),  # maps that are stored past the caches
]


def call_of(mode=2, *, channels=(5, 7), size=(6, 9), batch=2, dtype=torch.double, channels_last=False, grad=False):
    """Arguments of the operator."""
    given = arguments(Case(*channels, *size, batch=batch, pointwise_activation="hardswish"), (mode,), bias=True)
    tensors = [in_format(given.x, channels_last), *given.operands]
    tensors = [None if t is None else t.to(dtype).requires_grad_(grad and i < 5) for i, t in enumerate(tensors)]
    return *tensors, *settings(given, channels_last)


def backward_call_of(call, wanted):
    """Arguments of the backward operator for those of the forward one."""
    y, p, mean, var, _ = _ops.pointwise_conv2d_training(*call)
    x, *operands, mode, eps, activation, channels_last = call
    if mode == _ops.BATCH_STATISTICS:
        operands[4:] = mean, var
    grad_y = random(*y.shape, seed=7, dtype=y.dtype)
    return grad_y, x, None, p, *operands, mode, eps, activation, channels_last, wanted


# ------------------------------------------------------------------------------------------------------------- kernels


@DTYPES
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_every_shape(isa, case, dtype):
    values = case.batch * case.height * case.width
    if dtype == torch.float32 and values <= 2:
        dtype = torch.float64  # BN of two values has no gradient at all: what float32 leaves of it is rounding
    distance = 1e-9 if dtype == torch.float64 else min(3e-7 if case in LARGE else 1e-4, 1 / (40 * values))
    given = shared_arguments(case, (2,), distance=distance)
    assert_near(given, dtype, *(outcome(given, dtype, channels_last) for channels_last in (False, True)))


@FORMATS
@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_mode(isa, mode, activation, bias, channels_last):
    given = shared_arguments(Case(9, 17, 7, 39, batch=2, pointwise_activation=activation), (mode,), bias, seed=3)
    expected = outcome_of_torch(given)
    for ours, exact in zip(outcome(given, torch.double, channels_last), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@FORMATS
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_do_not_depend_on_threads_or_run(isa, case, channels_last):
    given = shared_arguments(case, (2,), distance=0)
    torch.set_num_threads(1)
    expected = list(itertools.chain(*run(given, torch.float32, channels_last)))
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_bits_equal(itertools.chain(*run(given, torch.float32, channels_last)), expected)


@FORMATS
def test_only_what_is_wanted(isa, channels_last):
    given = shared_arguments(Case(9, 17, 7, 35, batch=2), (1,), bias=True)
    _, everything = run(given, channels_last=channels_last)
    for wanted in [*(1 << bit for bit in range(5)), 0, 0b00011, 0b11100]:
        _, some = run(given, channels_last=channels_last, wanted=wanted)
        for bit, (ours, expected) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(ours, expected if wanted >> bit & 1 else expected.new_empty(0))


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_pixel(isa, value, channels_last):
    given = arguments(Case(9, 17, 7, 35, batch=2), (1,))
    finite, gradients = run(given, channels_last=channels_last)
    given.x[1, 4, 3, 20] = value
    outputs, changed = run(given, channels_last=channels_last)
    assert not outputs[0][1, :, 3, 20].isfinite().all()
    outputs[0][1, :, 3, 20] = finite[0][1, :, 3, 20]
    assert torch.equal(outputs[0], finite[0])
    assert torch.equal(changed[0][0], gradients[0][0])


# ------------------------------------------------------------------------------------------------------------ operator


@DTYPES
@FORMATS
@MODES
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype, channels_last, mode, grad):
    call = call_of(mode, dtype=dtype, channels_last=channels_last, grad=grad)
    torch.library.opcheck(_ops.pointwise_conv2d_training, call)
    if not grad:
        for wanted in (0, 0b11111, 0b00101):
            torch.library.opcheck(_ops.pointwise_conv2d_training_backward, backward_call_of(call, wanted))


@FORMATS
@pytest.mark.parametrize("channels", [(1, 1), (5, 1), (1, 7)])
@pytest.mark.parametrize("size", [(1, 2), (1, 40), (6, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_fake_outputs_are_those_of_the_operator(channels_last, channels, size, batch):
    call = call_of(channels=channels, size=size, batch=batch, channels_last=channels_last)
    assert_fakes_are_alike(_ops.pointwise_conv2d_training, call)
    assert_fakes_are_alike(_ops.pointwise_conv2d_training_backward, backward_call_of(call, 0b11111))


@FORMATS
@MODES
def test_all_outputs_and_gradients_equal_the_composite(channels_last, mode):
    """The composite is what runs under transforms: what the operator returns must not depend on that."""
    call = call_of(mode, channels_last=channels_last, grad=True)
    leaves = [a for a in call if isinstance(a, torch.Tensor) and a.requires_grad]
    with forward_ad.dual_level():
        expected = _ops.pointwise_conv2d_training(*call)
    ours = _ops.pointwise_conv2d_training(*call)
    assert_same([t.detach() for t in ours], [t.detach() for t in expected])
    assert not any(output.requires_grad for output in ours[1:])
    grad_y = random(*ours[0].shape, seed=9)
    assert_same(torch.autograd.grad(ours[0], leaves, grad_y), torch.autograd.grad(expected[0], leaves, grad_y))


@FORMATS
@MODES
def test_second_derivatives(channels_last, mode):
    x, *rest = call_of(mode, channels_last=channels_last, grad=True)
    leaves = [x, *(a for a in rest if isinstance(a, torch.Tensor) and a.requires_grad)]

    def function(*leaves):
        values = iter(leaves[1:])
        operands = [next(values) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in rest]
        return _ops.pointwise_conv2d_training(leaves[0], *operands)[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_transforms():
    assert_transforms(_ops.pointwise_conv2d_training, *call_of())


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, random(2, 5, 6), r"x must be a CPU tensor of shape \[N, C, H, W\]"),
        (0, random(2, 5, 6, 9).half(), "x must be float32 or float64"),
        (0, random(2, 5, 9, 6).mT, "x must be contiguous in NCHW memory format"),
        (1, random(7, 4, 1, 1), r"pw_weight must be a contiguous CPU tensor of shape \[N, 5, 1, 1\]"),
        (1, random(7, 5, 1, 1).float(), "pw_weight must be .* the dtype of x"),
        (2, random(6), "bias must be a contiguous CPU tensor of 7 elements"),
        (3, random(7).float(), "bn_weight must be .* the dtype of x"),
        (7, 3, "bn_mode must be"),
        (9, 4, "activation must be"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    call = list(call_of())
    call[index] = wrong
    with pytest.raises((RuntimeError, ValueError), match=message):
        _ops.pointwise_conv2d_training(*call)


# ------------------------------------------------------------------------------------------------------ fused networks


@pytest.fixture
def small_maps(monkeypatch):
    """Maps of any size are worth a call."""
    monkeypatch.setattr(_pointwise, "LEAST_NUMBERS", 0)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expansions_train_in_one_operation(channels_last, dtype, pointwise_calls, training_calls, small_maps):
    model = randomized(MobileNetV2()).train().to(dtype)
    model.classifier[0].p = 0.0
    fused = fusedsep.fuse(model)
    x = in_format(random(4, 3, 32, 32, dtype=dtype), channels_last)
    if dtype == torch.float64:
        assert_same(step(fused, x), step(model, x))
    else:
        exact = step(copy.deepcopy(model).double(), x.double())
        for ours, theirs, expected in zip(step(fused, x), step(model, x), exact, strict=True):
            error, allowed = (ours - expected).abs().max(), (theirs - expected).abs().max()
            assert error <= 3 * allowed + 1e-6 * expected.abs().max().clamp(min=1)
    assert len(pointwise_calls) == len(training_calls) == 3
    assert len(pointwise_calls) == 3


def test_no_map_of_an_expansion_is_kept_but_its_product(small_maps):
    model = randomized(MobileNetV2()).train().double()
    model.classifier[0].p = 0.0
    fused, other = fusedsep.fuse(model), fusedsep.fuse(model)
    x = random(2, 3, 40, 40)
    maps, y = kept_maps(fused, x)
    wide = [tuple(t.shape) for t in maps.values() if t.shape[1] in (30, 42)]
    assert sorted(wide) == [(2, 30, 20, 20), (2, 42, 10, 10)]
    y.sum().backward()
    with every_input_kept():
        other(x).sum().backward()
    for ours, theirs in zip(fused.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_second_derivatives_through_a_network(small_maps):
    model = nn.Sequential(
        *(pointwise(3, 6), nn.BatchNorm2d(6), nn.ReLU6()),
        *(depthwise(6), nn.BatchNorm2d(6), nn.ReLU6(), pointwise(6, 4), nn.BatchNorm2d(4)),
        *(pointwise(4, 5), nn.BatchNorm2d(5), nn.Hardswish()),
    )
    model, fused = pair(model)
    x = random(2, 3, 6, 5)
    results = []
    for network in (model, fused):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [leaf, *network.parameters()]))
    assert_same(*results)


def with_expansion(bn=None, activation=None):
    """An expansion and a site behind it."""
    first = [pointwise(4, 6), bn or nn.BatchNorm2d(6), activation or nn.ReLU6()]
    site = [depthwise(6), nn.BatchNorm2d(6), nn.ReLU6(), pointwise(6, 4), nn.BatchNorm2d(4)]
    return nn.Sequential(nn.Sequential(*first), nn.Sequential(*site))


def test_modes_of_the_batch_norm(pointwise_calls, small_maps):
    model, fused = pair(with_expansion())
    x = random(2, 4, 8, 7)
    for network in (model, fused):
        network[0][1].eval()
    assert_trains_alike(model, fused, x, steps=2)
    assert len(pointwise_calls) == 2
    with torch.no_grad():
        assert_same([fused(x)], [model(x)])
    assert len(pointwise_calls) == 2  # nothing to be gained
    for network in (model, fused):
        network.eval()
    assert_same(step(fused, x), step(model, x))
    assert len(pointwise_calls) == 2


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_statistics_follow_without_gradients(momentum, pointwise_calls, small_maps):
    model, fused = pair(with_expansion(nn.BatchNorm2d(6, momentum=momentum)))
    with torch.no_grad():
        for x in (random(2, 4, 8, 7), random(1, 4, 5, 6)):
            assert_same([fused(x)], [model(x)])
    assert_same(list(fused.buffers()), list(model.buffers()))
    assert len(pointwise_calls) == 2


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("path", ["0", "0.0", "0.1", "0.2"])
def test_hooks_see_what_they_always_saw(path, pointwise_calls, small_maps):
    model, fused = pair(with_expansion())
    seen = {}
    for network in (model, fused):
        seen[network] = []
        network.get_submodule(path).register_forward_hook(lambda *_, seen=seen[network]: seen.append(_[2].detach()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert_same(seen[fused], seen[model])
    assert len(pointwise_calls) == (2 if path == "0" else 0)


@pytest.mark.parametrize("what", ["replaced", "autocast", "one pixel", "three dimensions"])
def test_what_it_leaves_to_the_modules(what, pointwise_calls, small_maps):
    model, fused = pair(with_expansion())
    x = random(2, 4, 8, 7)
    if what == "replaced":
        for network in (model, fused):
            network[0][2] = nn.SiLU()
        assert_trains_alike(model, fused, x)
    elif what == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same([fused.float()(x.float()).float()], [model.float()(x.float()).float()])
    else:
        x, error = (x[:1, :, :1, :1], "more than 1 value per channel") if what == "one pixel" else (x[0], "4D input")
        for network in (model, fused):
            with pytest.raises(ValueError, match=error):
                network(x)
    assert not pointwise_calls


def test_an_activation_inside_the_batch_norm(pointwise_calls, training_calls, small_maps):
    model, fused = pair(with_expansion(BatchNormAct2d(6), nn.Identity()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=2)
    assert len(pointwise_calls) == len(training_calls) == 2


def test_the_turns_of_a_shared_batch_norm(pointwise_calls, small_maps):
    class TakesTurns(nn.Module):
        """Two convolutions with one BN: the one that starts first is not the first to update it."""

        def __init__(self, swap):
            super().__init__()
            self.a, self.b, self.bn, self.swap = pointwise(4, 6), pointwise(4, 6), nn.BatchNorm2d(6), swap
            self.site = nn.Sequential(depthwise(6), nn.ReLU(), pointwise(6, 4))

        def forward(self, x):
            maps = self.a(x), self.b(x)
            maps = maps[::-1] if self.swap else maps
            first, second = [F.relu(self.bn(h)) for h in maps]
            return self.site(first - second)

    for swap, calls in [(False, 2), (True, 1)]:
        pointwise_calls.clear()
        model, fused = pair(TakesTurns(swap))
        assert_trains_alike(model, fused, random(2, 4, 8, 7), steps=1)
        assert len(pointwise_calls) == calls


def test_networks_without_a_depthwise_convolution_stay_as_they_are(pointwise_calls, small_maps):
    model, fused = pair(nn.Sequential(pointwise(4, 6), nn.BatchNorm2d(6), nn.ReLU()))
    assert_trains_alike(model, fused, random(2, 4, 8, 7))
    assert not pointwise_calls


def test_compiled(pointwise_calls, small_maps):
    torch._dynamo.reset()
    model, fused = pair(with_expansion())
    x = random(2, 4, 8, 7)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, x), step(model, x))
    assert pointwise_calls


@pytest.mark.parametrize(("size", "calls"), [((2, 4, 73, 74), 0), ((2, 4, 73, 75), 1)])
def test_maps_too_small_to_be_worth_it(size, calls, pointwise_calls):
    model, fused = pair(with_expansion())
    assert_same(step(fused, random(*size)), step(model, random(*size)))
    assert 6 * 2 * 73 * 74 < _pointwise.LEAST_NUMBERS <= 6 * 2 * 73 * 75
    assert len(pointwise_calls) == calls


def test_its_repr_tells_the_activation():
    assert repr(PointwiseConv("relu6")) == "PointwiseConv(relu6)"
