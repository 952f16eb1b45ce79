# SPDX-License-Identifier: BSD-3-Clause
"""The parts of a frozen network, each timed alone on the map that it gets in the network, and what bounds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn as nn

from .. import _ops
from .._chain import LayerChain
from .._chain_convolutions import Convolution
from .._chain_layers import tensors_at
from .._chain_linear import ChannelLinear
from .._chain_products import Classifier, Gate, GatedConvolution
from .._frozen import FrozenSeparable
from ._limits import Limits
from ._measure import Times, time_interleaved

SEPARABLE, WHOLE, POINTWISE, CLASSIFIER = "depthwise-separable", "3x3 convolution", "1x1 convolution", "classifier"
DEPTHWISE, OTHER = "depthwise convolution", "other"
GATE, GATED = "squeeze-and-excitation", "squeeze-and-excitation, 1x1 convolution"


@dataclass(frozen=True)
class Part:
    """A site, a whole 3x3 convolution, a 1x1 one, perhaps behind a gate, a depthwise one by itself, a classifier.

    Attributes:
        kind: one of the above.
        mult_adds: of a call.
        moved_bytes: of the map that it reads, the map that it writes and the weights, each once.
        scratch_bytes: of the map between the two convolutions of a site, which is written to the second-level cache
            and read from there, tile by tile.
    """

    name: str
    kind: str
    mult_adds: int
    moved_bytes: int
    scratch_bytes: int
    call: Callable[[], torch.Tensor]


def parts_of(frozen: nn.Module, x: torch.Tensor) -> list[Part]:
    """The parts in the order in which ``frozen(x)`` runs them; layers without weights and others are left out."""
    parts: list[Part] = []

    def noting(method: Callable[..., torch.Tensor], make: Callable[..., Part]) -> Callable[..., torch.Tensor]:
        def call(layer: Any, x: torch.Tensor) -> torch.Tensor:
            count = len(parts)
            y = method(layer, x)
            del parts[count:]  # layers inside this one
            parts.append(make(count, layer, x, y))
            return y

        return call

    with (
        torch.inference_mode(),
        mock.patch.object(LayerChain, "_run", lambda chain, x: None),  # layer by layer
        mock.patch.object(FrozenSeparable, "forward", noting(FrozenSeparable.forward, _site)),
        mock.patch.object(Convolution, "__call__", noting(Convolution.__call__, _layer)),
        mock.patch.object(ChannelLinear, "__call__", noting(ChannelLinear.__call__, _layer)),
        mock.patch.object(Gate, "__call__", noting(Gate.__call__, _layer)),
        mock.patch.object(GatedConvolution, "__call__", noting(GatedConvolution.__call__, _layer)),
        mock.patch.object(Classifier, "__call__", noting(Classifier.__call__, _layer)),
    ):
        frozen(x)
    return parts


def measure_parts(frozen: nn.Module, x: torch.Tensor, repeats: int, limits: Limits) -> dict[str, Any]:
    """Time the whole, and each part by itself; as it goes into the JSON, times in milliseconds.

    A part finds in the caches what its last call left there, much as it finds the map of the layer before it in a
    network. ``sum_ms`` of the parts is more than ``whole_ms`` where each call alone pays Python and a new map, and less
    where layers remain that are no parts.
    """
    rows = [_row(part, _time(part.call, repeats), limits) for part in parts_of(frozen, x)]
    whole, total = _time(lambda: frozen(x), repeats).median, sum(row["ms"] for row in rows)
    kinds: dict[str, float] = {}
    for row in rows:
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["ms"]
    kinds[OTHER] = kinds.get(OTHER, 0.0) + max(whole - total, 0.0)
    return {
        "whole_ms": whole,
        "sum_ms": total,
        "kinds_ms": kinds,
        "parts": rows,
    }


def _time(call: Callable[[], torch.Tensor], repeats: int) -> Times:
    return time_interleaved({"": call}, repeats)[""]


def _row(part: Part, times: Times, limits: Limits) -> dict[str, Any]:
    """How long the arithmetic and the movement of bytes would take by themselves."""
    flop, ms = 2 * part.mult_adds, times.median
    level, scratch_level = limits.level_for(part.moved_bytes), limits.levels[0]
    return {
        "name": part.name,
        "kind": part.kind,
        "ms": ms,
        "spread_ms": times.spread,
        "gflop": 1e-9 * flop,
        "gflops": 1e-6 * flop / ms,
        "share_of_peak": 1e-6 * flop / ms / limits.fma_gflops,
        "moved_bytes": part.moved_bytes,
        "scratch_bytes": part.scratch_bytes,
        "intensity": flop / part.moved_bytes,
        "level": level.name,
        "level_gbs": level.gbs,
        "arithmetic_ms": 1e-6 * flop / limits.fma_gflops,
        "moved_ms": 1e-6 * part.moved_bytes / level.gbs,
        "scratch_ms": 1e-6 * 2 * part.scratch_bytes / scratch_level.gbs,
    }


def _site(index: int, site: FrozenSeparable, x: torch.Tensor, y: torch.Tensor) -> Part:
    in_channels, out_channels = site.dw_weight.shape[0], site.pw_weight.shape[0]
    pixels = y.numel() // out_channels
    name = f"{in_channels} -> {out_channels}, {x.shape[-2]}x{x.shape[-1]}" + (" /2" if site.stride == 2 else "")
    return Part(
        f"{index}: {name}",
        SEPARABLE,
        pixels * in_channels * (9 + out_channels),
        _nbytes(x, y, *site.buffers()),
        pixels * in_channels * x.element_size(),
        functools.partial(site, x),
    )


def _layer(
    index: int, layer: Convolution | ChannelLinear | Gate | Classifier, x: torch.Tensor, y: torch.Tensor
) -> Part:
    kind = _kind_of(layer)
    is_first = index == 0 and kind == WHOLE and layer.reads_images  # others read what a chain holds, channels_last
    nchw = is_first and not x.is_contiguous(memory_format=torch.channels_last)
    layers, _, _ = layer.layers(*x.shape[-2:], nchw)
    if not nchw:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = [tensor for tensor in tensors_at(layer.places()) if tensor is not None]
    products = [tensor for tensor in weights if tensor.dim() > 1]  # the last one of every pixel, the others of means
    if isinstance(layer, ChannelLinear):
        products = [layer.layer.weight]
    if kind == GATE:
        of_pixels = y.numel()
    else:
        product = products.pop()
        of_pixels = product.numel() * (y.numel() // product.shape[0])
    return Part(
        f"{index}: {kind}, {x.shape[-2]}x{x.shape[-1]}",
        kind,
        of_pixels + x.shape[0] * sum(tensor.numel() for tensor in products),
        _nbytes(x, y, *weights),
        0,
        functools.partial(_ops.chain, x, layer.pack(nchw), _ops.text_of(layers)),
    )


def _kind_of(layer: Convolution | ChannelLinear | Gate | Classifier) -> str:
    if isinstance(layer, Classifier):
        return CLASSIFIER
    if isinstance(layer, Gate):
        return GATED if isinstance(layer, GatedConvolution) else GATE
    if isinstance(layer, ChannelLinear):
        return POINTWISE
    return POINTWISE if layer.is_pointwise else DEPTHWISE if layer.is_depthwise else WHOLE


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
