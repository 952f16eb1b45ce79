# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of the training operators for a :class:`cases.Case`, and what torch computes from them.

With one mode instead of two they are those of one convolution alone.

``outcome`` is always: y, batch mean and variance of either BN where it has them, gradients of x (unless it is the image
of a whole convolution) and of each parameter that there is.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import cases
import torch
import torch.nn.functional as F
from cases import ACTIVATION_CODES, Case
from tolerance import FACTOR_TO_TORCH

from fusedsep import _ops

EPS = (1e-5, 1e-3)
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
#: Those of one convolution alone.
CONVOLUTION_ACTIVATION_CODES = {**ACTIVATION_CODES, "silu": 4}
#: Where each activation has no derivative.
KINKS = {"none": (), "relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "silu": ()}
#: The convolutions.
DEPTHWISE, POINTWISE, WHOLE = 0, 1, 2

#: One value a channel has no variance.
CASES = [
    case
    for case in dict.fromkeys(cases.ALL)
    if case.batch > 0 and case.batch * case.out_shape[2] * case.out_shape[3] > 1
]
#: Several tiles, several groups of tiles, several channel groups; tiles that end within rows and images.
LARGE = [
    Case(24, 40, 33, 31, batch=3, pointwise_activation="relu"),
    Case(130, 70, 15, 17, 2, batch=3, activation="relu6", pointwise_activation="hardswish"),
    Case(8, 8, 90, 97, batch=2),
    Case(300, 20, 9, 9, batch=5, activation="hardswish"),
    Case(16, 32, 190, 180, activation="none", batch=2),  # maps that are stored past the caches
]
MODES = list(itertools.product((0, 1, 2), repeat=2))


class Arguments(NamedTuple):
    """Everything in float64; ``modes`` are those of the operator, for each BN."""

    case: Case
    modes: tuple[int, ...]
    x: torch.Tensor
    operands: tuple[torch.Tensor | None, ...]
    grad_y: torch.Tensor
    #: Which convolutions take part.
    levels: tuple[int, ...]

    @property
    def reads_an_image(self) -> bool:
        """Whether x has no gradient."""
        return self.levels == (WHOLE,)

    @property
    def activations(self) -> list[str]:
        """What follows each of them."""
        return [self.case.activation, self.case.pointwise_activation][-len(self.levels) :]


def arguments(case: Case, modes=(2, 2), bias=False, seed=0, mean=0.0, distance=1e-4, level=POINTWISE) -> Arguments:
    """Random arguments of the size that networks have; ``level`` is the one convolution where there is one mode.

    No activation sees a number within ``distance`` of a kink, where rounding would decide about the derivative.
    """
    levels = (level,) if len(modes) == 1 else (DEPTHWISE, POINTWISE)
    for attempt in range(200):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)

        def normal(*shape, scale=1.0, generator=generator):
            # Rounded, so that the same numbers can be given in float32.
            return (torch.randn(shape, generator=generator) * scale).double()

        c, o = case.in_channels, case.out_channels
        operands = []
        k = case.kernel
        weights = [normal(c, 1, k, k, scale=2.1 / k), normal(o, c, 1, 1, scale=1.5 / c**0.5)]
        if levels == (WHOLE,):
            weights.append(normal(o, c, 3, 3, scale=0.5 / c**0.5))
        for mode, level in zip(modes, levels, strict=True):
            weight, channels = weights[level], o if level else c
            operands += [weight, normal(channels, scale=0.5) if bias else None]
            operands += [normal(channels), normal(channels, scale=0.5)] if mode else [None, None]
            operands += [normal(channels, scale=0.2), normal(channels).abs() + 0.5] if mode == 1 else [None, None]
        x = normal(case.batch, c, case.height, case.width) + mean
        shape = (case.batch, o, case.height, case.width) if levels == (POINTWISE,) else case.out_shape
        given = Arguments(case, modes, x, tuple(operands), normal(*shape), levels)
        if _distance_from_kinks(given) > distance:
            return given
    raise AssertionError(f"no arguments away from the kinks of {case}")


#: The same for tests that run once for each ISA and leave the tensors alone: found once.
shared_arguments = functools.cache(arguments)


def _forward(given: Arguments, x, operands, rounding=lambda x: x):
    """y, and what either BN normalizes and either activation sees; every map goes through ``rounding``."""
    case = given.case
    maps, seen = [], []
    value = x
    for i, (level, activation) in enumerate(zip(given.levels, given.activations, strict=True)):
        weight, bias, gamma, beta, mean, variance = operands[6 * i : 6 * i + 6]
        if level == DEPTHWISE:
            value = F.pad(value, case.pads)
            value = F.conv2d(value, weight, bias, case.stride, 0, case.dilation, groups=case.in_channels)
        elif level == POINTWISE:
            value = F.conv2d(value, weight, bias)
        else:
            value = F.conv2d(F.pad(value, case.pads), weight, bias, case.stride, 0, case.dilation)
        value = rounding(value)
        maps.append(value)
        if given.modes[i]:
            value = F.batch_norm(value, mean, variance, gamma, beta, given.modes[i] == 2, 0.0, EPS[level > 0])
            value = rounding(value)
        seen.append(value)
        value = ACTIVATIONS[activation](value)
    return value, maps, seen


def _distance_from_kinks(given: Arguments) -> float:
    """Of the numbers next to them: where padding is all that a tap sees, everyone finds the kink itself."""
    _, _, seen = _forward(given, given.x, given.operands)
    distances = [
        (value - kink)[value != kink].abs()
        for value, activation in zip(seen, given.activations, strict=True)
        for kink in KINKS[activation]
    ]
    return min((distance.min().item() for distance in distances if distance.numel()), default=float("inf"))


def _is_parameter(index: int) -> bool:
    return index % 6 < 4


def outcome_of_torch(given: Arguments, dtype=torch.double, rounding=lambda x: x, device="cpu") -> list[torch.Tensor]:
    """By the unfused functions and autograd."""

    def leaf(tensor, requires_grad):
        return None if tensor is None else tensor.to(device, dtype).requires_grad_(requires_grad)

    x = leaf(given.x.detach().clone(), not given.reads_an_image)
    operands = [leaf(None if t is None else t.clone(), _is_parameter(i)) for i, t in enumerate(given.operands)]
    y, maps, _ = _forward(given, x, operands, rounding)
    wanted = [] if given.reads_an_image else [x]
    wanted += [t for i, t in enumerate(operands) if t is not None and _is_parameter(i)]
    gradients = torch.autograd.grad(y, wanted, given.grad_y.to(device, dtype))
    statistics = []
    for mode, value in zip(given.modes, maps, strict=True):
        if mode == 2:
            variance, mean = torch.var_mean(value.detach(), (0, 2, 3), correction=0)
            statistics += [mean, variance]
    return [y.detach(), *statistics, *gradients]


class _Disturbed(torch.autograd.Function):
    """Every number, and every gradient on its way back, moved at random by up to ``eps`` of its size."""

    @staticmethod
    def forward(ctx, x, eps, generator):
        ctx.eps, ctx.generator = eps, generator
        return _disturbed(x, eps, generator)

    @staticmethod
    def backward(ctx, grad):
        return _disturbed(grad, ctx.eps, ctx.generator), None, None


def _disturbed(x, eps, generator):
    return x * (1 + eps * (2 * torch.rand(x.shape, generator=generator, dtype=torch.double) - 1))


def inherent_errors(given: Arguments, dtype, expected: list[torch.Tensor]) -> list[float]:
    """How far each result of the float64 reference moves when every map and its gradient is rounded to ``dtype``.

    The largest of a few tries: what unfused layers cannot do without, whatever their sums are worth.
    """
    largest = [0.0] * len(expected)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)

        def disturb(x, generator=generator):
            return _Disturbed.apply(x, torch.finfo(dtype).eps, generator)

        for index, (result, exact) in enumerate(zip(outcome_of_torch(given, rounding=disturb), expected, strict=True)):
            if exact.numel():
                largest[index] = max(largest[index], (result - exact).abs().max().item())
    return largest


@functools.cache
def _references(given: Arguments, dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """In float64, by unfused torch in ``dtype``, and inherent errors; once for tensors that are the same objects."""
    expected = outcome_of_torch(given)
    unfused = expected if dtype == torch.float64 else outcome_of_torch(given, dtype)
    return expected, unfused, inherent_errors(given, dtype, expected)


def assert_near(given: Arguments, dtype, *actual: list[torch.Tensor], factor=FACTOR_TO_TORCH) -> None:
    """Each outcome is at most ``factor`` times as far off as unfused torch, plus a few times what rounding does."""
    expected, unfused, inherent = _references(given, dtype)
    # Chains of sums round up to sixteen times; and the float64 reference has an error of its own.
    roundings = 64 if dtype == torch.float64 else 8
    for results in actual:
        for index, (ours, exact, theirs) in enumerate(zip(results, expected, unfused, strict=True)):
            assert ours.dtype == dtype
            assert ours.shape == exact.shape
            error, allowed = (ours.cpu().double() - exact).abs().max(), (theirs.double() - exact).abs().max()
            assert error <= factor * allowed + roundings * inherent[index], (
                f"{given.case}: result {index} is off by {error:.3g}, unfused torch by {allowed:.3g}, "
                f"and rounding every map changes it by {inherent[index]:.3g}"
            )


def settings(given: Arguments, channels_last: bool) -> tuple:
    case = given.case
    if len(given.levels) == 1:
        geometry = () if given.levels == (POINTWISE,) else (case.stride, case.dilation, *case.pads)
        activation = CONVOLUTION_ACTIVATION_CODES[case.pointwise_activation]
        return given.modes[0], EPS[given.levels[0] > 0], *geometry, activation, channels_last
    return (
        given.modes[0],
        EPS[0],
        given.modes[1],
        EPS[1],
        case.stride,
        case.dilation,
        *case.pads,
        ACTIVATION_CODES[case.activation],
        ACTIVATION_CODES[case.pointwise_activation],
        channels_last,
    )


def run(given: Arguments, dtype=torch.double, channels_last=False, wanted=None, grad_y=None, device="cpu"):
    """The gradients of the operators, and before them y, p and the statistics."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = given.x.to(device, dtype).contiguous(memory_format=memory_format)
    operands = [None if t is None else t.to(device, dtype) for t in given.operands]
    rest = settings(given, channels_last)
    forward, backward = operators(given)
    y, p, *statistics, _ = forward(x, *operands, *rest)
    operands = with_statistics(given, operands, statistics)
    if grad_y is None:
        grad_y = given.grad_y.to(device, dtype).contiguous(memory_format=memory_format)
    if wanted is None:
        wanted = all_wanted(given)
    inputs = (x,) if given.reads_an_image else (x, None)
    gradients = backward(grad_y, *inputs, p, *operands, *rest, wanted)
    return [y, p, *statistics], list(gradients)


def operators(given: Arguments) -> tuple:
    """The training operator and its backward."""
    return {
        (DEPTHWISE, POINTWISE): (_ops.separable_conv2d_training, _ops.separable_conv2d_training_backward),
        (DEPTHWISE,): (_ops.depthwise_conv2d_training, _ops.depthwise_conv2d_training_backward),
        (POINTWISE,): (_ops.pointwise_conv2d_training, _ops.pointwise_conv2d_training_backward),
        (WHOLE,): (_ops.conv2d_training, _ops.conv2d_training_backward),
    }[given.levels]


def with_statistics(given: Arguments, operands: list, statistics: list) -> list:
    """``operands`` for the backward operator: where a BN took those of the batch, with what it took."""
    operands = list(operands)
    for i, mode in enumerate(given.modes):
        if mode == 2:
            operands[6 * i + 4 : 6 * i + 6] = statistics[2 * i : 2 * i + 2]
    return operands


def all_wanted(given: Arguments) -> int:
    """The bits of x, where it has a gradient, and of the parameters that there are."""
    present = [] if given.reads_an_image else [True]
    present += [t is not None for i, t in enumerate(given.operands) if _is_parameter(i)]
    return sum(1 << bit for bit, there in enumerate(present) if there)


def outcome(given: Arguments, dtype=torch.double, channels_last=False, device="cpu") -> list[torch.Tensor]:
    """By the operators, in the order of :func:`outcome_of_torch`."""
    outputs, gradients = run(given, dtype, channels_last, device=device)
    wanted = all_wanted(given)
    statistics = [
        statistic for i, mode in enumerate(given.modes) if mode == 2 for statistic in outputs[2 + 2 * i : 4 + 2 * i]
    ]
    return [outputs[0], *statistics, *(g for bit, g in enumerate(gradients) if wanted >> bit & 1)]


def outcome_of_passes(given: Arguments, dtype=torch.double, channels_last=False) -> list[torch.Tensor]:
    """By the passes as operators, which run in the memory format that they are given; otherwise as :func:`outcome`."""
    case, count = given.case, given.case.batch * given.case.out_shape[2] * given.case.out_shape[3]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, grad_y = (t.to(dtype).contiguous(memory_format=memory_format) for t in (given.x, given.grad_y))
    dw_weight, pw_weight = given.operands[0].to(dtype), given.operands[6].to(dtype)
    geometry = (case.stride, case.dilation, *case.pads)
    act1, act2 = ACTIVATION_CODES[case.activation], ACTIVATION_CODES[case.pointwise_activation]

    def affine(level, statistics):
        """The three rows, the statistics with the bias, and 1 / sqrt(variance + eps)."""
        _, bias, gamma, beta, mean, variance = given.operands[6 * level : 6 * level + 6]
        zero = torch.zeros_like(statistics[0])
        bias, mode = zero if bias is None else bias, given.modes[level]
        if mode == 0:
            return torch.stack([-bias, zero + 1, zero]), None, zero + 1
        mean, variance = (statistics[0] + bias, statistics[1]) if mode == 2 else (mean, variance)
        inverse = torch.rsqrt(variance + EPS[level])
        return torch.stack([mean - bias, gamma * inverse, beta]), (mean, variance), inverse

    def correction(level, sums, inverse):
        if given.modes[level] != 2:
            return torch.zeros_like(sums)
        return torch.stack([inverse**2 * sums[1], sums[0]]) / count

    def gradients(level, weight, sums, rows, inverse):
        _, bias, gamma, *_ = given.operands[6 * level : 6 * level + 6]
        of_bias = torch.zeros_like(sums[0]) if given.modes[level] == 2 else rows[1] * sums[0]
        vectors = [] if bias is None else [of_bias]
        vectors += [] if gamma is None else [inverse * sums[1], sums[0]]
        return [weight, *(vector.to(dtype) for vector in vectors)]

    affine1, statistics1, inverse1 = affine(0, _ops.depthwise_statistics(x, dw_weight, *geometry, channels_last))
    p, statistics = _ops.separable_products(x, dw_weight, pw_weight, affine1, *geometry, act1, channels_last)
    affine2, statistics2, inverse2 = affine(1, statistics)
    y = _ops.normalize(p, affine2, act2, channels_last)
    sums2 = _ops.normalize_backward_reduce(grad_y, p, affine2, act2, channels_last)
    correction2 = correction(1, sums2, inverse2)
    maps, rest = (grad_y, x, p, dw_weight, pw_weight), (*geometry, act1, act2, channels_last, True, True)
    g1, grad_pw_weight, sums1 = _ops.pointwise_backward(*maps, affine1, affine2, correction2, *rest)
    correction1 = correction(0, sums1, inverse1)
    grad_x, grad_dw_weight = _ops.depthwise_backward(
        g1, x, dw_weight, affine1, correction1, *geometry, channels_last, True, True
    )
    statistics = [
        statistic.to(dtype)
        for mode, pair in zip(given.modes, (statistics1, statistics2), strict=True)
        if mode == 2
        for statistic in pair
    ]
    first = gradients(0, grad_dw_weight, sums1, affine1, inverse1)
    return [y, *statistics, grad_x, *first, *gradients(1, grad_pw_weight, sums2, affine2, inverse2)]
