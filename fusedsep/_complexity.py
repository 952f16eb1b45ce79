# SPDX-License-Identifier: BSD-3-Clause
"""Mult-Adds and parameters of a network, per kind of layer, as the MobileNet paper counts them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ._checks import check_positive_int


@dataclass(frozen=True)
class Layer:
    """One convolution or fully connected layer.

    ``standard_mult_adds`` and ``standard_parameters`` are those of the same convolution without groups.
    """

    name: str
    kind: str
    mult_adds: int
    parameters: int
    standard_mult_adds: int
    standard_parameters: int


@dataclass(frozen=True)
class Kind:
    """All layers of one kind; the shares are fractions of the network's totals."""

    kind: str
    layers: int
    mult_adds: int
    mult_adds_share: float
    parameters: int
    parameters_share: float


@dataclass(frozen=True)
class SeparablePair:
    """A depthwise convolution and the 1x1 convolution behind it, beside the one standard convolution they stand for."""

    depthwise: str
    pointwise: str
    mult_adds: int
    standard_mult_adds: int
    parameters: int
    standard_parameters: int

    @property
    def reduction(self) -> float:
        """Mult-Adds as a fraction of the standard convolution's: 1/N + 1/9 for N output channels and a 3x3 kernel."""
        return self.mult_adds / self.standard_mult_adds


@dataclass(frozen=True)
class Complexity:
    """What :func:`complexity` returns; ``str()`` is a table.

    Attributes:
        layers: every counted layer, in the order of the first call.
        kinds: the same by kind, most Mult-Adds first.
        separable: the depthwise-separable pairs, in the order of the calls.
        other_parameters: biases, BN and all else that the paper leaves out of ``parameters``.
    """

    layers: tuple[Layer, ...]
    kinds: tuple[Kind, ...]
    separable: tuple[SeparablePair, ...]
    other_parameters: int

    @property
    def mult_adds(self) -> int:
        return sum(layer.mult_adds for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def standard_mult_adds(self) -> int:
        """Mult-Adds of the network with one standard convolution in place of each pair and without other groups."""
        in_pairs = {name for pair in self.separable for name in (pair.depthwise, pair.pointwise)}
        others = sum(layer.standard_mult_adds for layer in self.layers if layer.name not in in_pairs)
        return others + sum(pair.standard_mult_adds for pair in self.separable)

    def __str__(self) -> str:
        rows = [("layer kind", "layers", "Mult-Adds", "share", "parameters", "share")]
        for kind in self.kinds:
            rows.append(
                (
                    kind.kind,
                    f"{kind.layers}",
                    f"{kind.mult_adds:,}",
                    f"{kind.mult_adds_share:.2%}",
                    f"{kind.parameters:,}",
                    f"{kind.parameters_share:.2%}",
                )
            )
        rows.append(("total", str(len(self.layers)), f"{self.mult_adds:,}", "", f"{self.parameters:,}", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        lines.append(f"not counted: {self.other_parameters:,} parameters of biases, batch norms and other layers")
        if self.standard_mult_adds != self.mult_adds:
            lines.append(
                f"with standard convolutions: {self.standard_mult_adds:,} Mult-Adds, "
                f"{self.standard_mult_adds / self.mult_adds:.1f} times as many"
            )
        return "\n".join(lines)


def complexity(model: nn.Module, input_size: int | Sequence[int]) -> Complexity:
    """Count the Mult-Adds and the parameters of ``model`` per layer kind, as the MobileNet paper counts them.

    A convolution costs ``Dk * Dk * M / groups * N * Ho * Wo`` Mult-Adds and has ``Dk * Dk * M / groups * N`` parameters
    (kernel Dk x Dk, M channels in, N out, output map Ho x Wo); a fully connected layer costs and has ``M * N``. Biases,
    BN, activations and pooling are left out: only so do the paper's 4.2, 2.6, 1.3 and 0.5 million parameters have the
    shares that it prints. Its share of Mult-Adds for the first convolution, 1.19 %, is a misprint: 1.91 % by its own
    formula.

    Modules are counted, ``nn.Conv1d`` to ``nn.ConvTranspose3d`` and ``nn.Linear``, fused or not, but not what
    :func:`fusedsep.freeze` has packed. A module that is called twice costs twice and has its parameters once. A
    depthwise convolution and the 1x1 convolution that is called next on a map of its output's shape are a separable
    pair.

    The model is not touched: a copy without values runs once, in eval mode, on the meta device. Where that cannot be
    done (an ``if`` on a value, a tensor that is no buffer, an operation that has no meta form) a copy with values runs.

    Args:
        model: any module; its input is one floating-point tensor.
        input_size: ``(C, H, W)``, ``(N, C, H, W)`` or, unless it has three entries, any other shape that the model
            takes; a batch costs N times as much. An int n is ``(1, C, n, n)`` with the C channels of the model's first
            ``nn.Conv2d``.

    Returns:
        :class:`Complexity`.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``input_size`` neither an int nor a sequence of ints.
        ValueError: ``input_size`` has an entry below 1, or is an int and the model has no ``nn.Conv2d``.

    Source: A. Howard et al., "MobileNets", 2017, section 3.1 and tables 2, 6 and 7.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    shape = _input_shape(model, input_size)
    try:
        twin = _copy_without_values(model)
        calls = _record_calls(twin, shape)
    except Exception:  # whatever a foreign module raises on the meta device; a real fault is raised again below
        twin = copy.deepcopy(model)
        calls = _record_calls(twin, shape)
    layers = _layers(calls)
    return Complexity(
        layers=layers,
        kinds=_kinds(layers),
        separable=tuple(_pair(dw, pw) for dw, pw in itertools.pairwise(calls) if _is_pair(dw, pw)),
        other_parameters=sum(parameter.numel() for parameter in twin.parameters())
        - sum(layer.parameters for layer in layers),
    )


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    weight: torch.Tensor
    input_shape: torch.Size
    output_shape: torch.Size

    @property
    def mult_adds(self) -> int:
        if isinstance(self.module, nn.Linear):
            return math.prod(self.output_shape) * self.module.in_features
        # A transposed convolution multiplies every input pixel with the whole weight, any other every output pixel.
        if isinstance(self.module, _ConvTransposeNd):
            pixels = math.prod(self.input_shape) // self.module.in_channels
        else:
            pixels = math.prod(self.output_shape) // self.module.out_channels
        return pixels * self.weight.numel()


def _input_shape(model: nn.Module, input_size: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(input_size, int):
        size = check_positive_int(input_size, "input_size")
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None:
            raise ValueError(f"input_size must be a full shape for a model without nn.Conv2d, got {input_size}")
        return 1, first.in_channels, size, size
    if not isinstance(input_size, Sequence) or isinstance(input_size, str) or not input_size:
        raise TypeError(f"input_size must be an int, (C, H, W) or (N, C, H, W), got {input_size!r}")
    shape = tuple(check_positive_int(size, f"input_size[{i}]") for i, size in enumerate(input_size))
    return (1, *shape) if len(shape) == 3 else shape


def _copy_without_values(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device and take no memory."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, memo)


def _record_calls(model: nn.Module, shape: tuple[int, ...]) -> list[_Call]:
    """Run ``model``, which is a copy of the user's, and return what its convolutions and linear layers did."""
    calls: list[_Call] = []

    def record(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls.append(_Call(name, module, module.weight, inputs[0].shape, output.shape))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.register_forward_hook(record(name))
    example = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    x = torch.zeros(shape) if example is None else torch.zeros(shape, dtype=example.dtype, device=example.device)
    with torch.no_grad():
        model.eval()(x)
    return calls


def _layers(calls: list[_Call]) -> tuple[Layer, ...]:
    by_name: dict[str, list[_Call]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    layers = []
    counted_weights: set[int] = set()
    for name, own_calls in by_name.items():
        module, weight = own_calls[0].module, own_calls[0].weight
        groups = getattr(module, "groups", 1)
        mult_adds = sum(call.mult_adds for call in own_calls)
        parameters = 0 if id(weight) in counted_weights else weight.numel()
        counted_weights.add(id(weight))
        layers.append(Layer(name, _kind(module), mult_adds, parameters, groups * mult_adds, groups * parameters))
    return tuple(layers)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "fully connected"
    grouping = "dw " if _is_depthwise(module) else "grouped " if module.groups > 1 else ""
    transposed = "transposed " if isinstance(module, _ConvTransposeNd) else ""
    return f"conv {transposed}{grouping}" + "x".join(map(str, module.kernel_size))


def _kinds(layers: tuple[Layer, ...]) -> tuple[Kind, ...]:
    mult_adds = sum(layer.mult_adds for layer in layers)
    parameters = sum(layer.parameters for layer in layers)
    kinds = []
    for name in dict.fromkeys(layer.kind for layer in layers):
        own = [layer for layer in layers if layer.kind == name]
        own_mult_adds = sum(layer.mult_adds for layer in own)
        own_parameters = sum(layer.parameters for layer in own)
        kinds.append(
            Kind(name, len(own), own_mult_adds, own_mult_adds / mult_adds, own_parameters, own_parameters / parameters)
        )
    return tuple(sorted(kinds, key=lambda kind: -kind.mult_adds))


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _ConvNd)
        and module.groups == module.in_channels
        and (module.groups > 1 or module.out_channels == 1)
        and math.prod(module.kernel_size) > 1
    )


def _is_pair(first: _Call, second: _Call) -> bool:
    dw, pw = first.module, second.module
    return (
        _is_depthwise(dw)
        and isinstance(pw, _ConvNd)
        and math.prod(pw.kernel_size) == 1
        and pw.groups == 1
        and second.input_shape == first.output_shape
    )


def _pair(first: _Call, second: _Call) -> SeparablePair:
    dw, pw = first.module, second.module
    standard_parameters = math.prod(dw.kernel_size) * dw.in_channels * pw.out_channels
    pixels = math.prod(second.output_shape) // pw.out_channels
    return SeparablePair(
        depthwise=first.name,
        pointwise=second.name,
        mult_adds=first.mult_adds + second.mult_adds,
        standard_mult_adds=pixels * standard_parameters,
        parameters=first.weight.numel() + second.weight.numel(),
        standard_parameters=standard_parameters,
    )
