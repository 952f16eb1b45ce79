# SPDX-License-Identifier: BSD-3-Clause
"""Shapes, as data: 1, vector lanes and register tiles and cache blocks each with its neighbours, and real layers.

Lanes are 4, 8 and 16; register tiles are 4, 6 and 14 rows by 4, 8, 16 and 32 columns; the product is cut every 128 or
256 input channels, and the map into tiles of at most 2048 pixels (csrc/kernels/layout-inl.h, separable.h).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import reference_numpy

#: Name -> code in csrc/kernels/separable.h.
ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2, "hardswish": 3}


class Case(NamedTuple):
    in_channels: int = 8
    out_channels: int = 9
    height: int = 5
    width: int = 6
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    dilation: int = 1
    activation: str = "relu"
    pointwise_activation: str = "none"
    batch: int = 1
    kernel: int = 3

    def __str__(self) -> str:
        """What differs from the plain case: the name of the test."""
        changed = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return ",".join(f"{name}={value}".replace(" ", "") for name, value in changed.items()) or "plain"

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        left, right, top, bottom = self.pads
        reach = (self.kernel - 1) * self.dilation + 1
        return (
            self.batch,
            self.out_channels,
            (self.height + top + bottom - reach) // self.stride + 1,
            (self.width + left + right - reach) // self.stride + 1,
        )


class Operands(NamedTuple):
    x: np.ndarray  # (N, C, H, W)
    dw_weight: np.ndarray  # (C, 3, 3)
    dw_bias: np.ndarray  # (C,), float64
    pw_weight: np.ndarray  # (O, C)
    pw_bias: np.ndarray  # (O,), float64


_AROUND_LANES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
_AROUND_TILES = (1, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 31, 32, 33, 65)

CHANNELS = [Case(in_channels=n) for n in _AROUND_LANES] + [Case(out_channels=n) for n in _AROUND_TILES]
WIDTHS = [
    Case(in_channels=3, height=3, width=width, stride=stride)
    for stride, width in itertools.product((1, 2), (*_AROUND_LANES, 63, 64, 65))
]
MAPS = [
    Case(in_channels=3, out_channels=5, height=height, width=width, stride=stride)
    for stride, (height, width) in itertools.product(
        (1, 2), [(1, 1), (2, 2), (3, 3), (1, 40), (40, 1), (2, 7), (46, 47)]
    )
]
DEPTHS = [
    Case(in_channels=n, out_channels=5, height=3, width=3)
    for n in (127, 128, 129, 255, 256, 257, 511, 512, 513, 1024, 1100)
]
#: Products of one row, whose panels are taken several at once: one pixel (channels_last), one output channel (NCHW).
ROWS = [
    *(Case(9, n, 1, 1, pointwise_activation="hardswish") for n in (31, 32, 63, 64, 96, 129, 200)),
    Case(130, 129, 1, 1),
    Case(257, 65, 1, 1),
    Case(130, 1, 9, 20),
]
PADDINGS = [
    Case(height=height, width=width, stride=stride, pads=pads, dilation=dilation)
    for stride, (height, width, pads, dilation) in itertools.product(
        (1, 2),
        [
            (5, 6, (0, 0, 0, 0), 1),
            (5, 6, (0, 1, 0, 1), 1),  # TensorFlow's SAME at stride 2
            (6, 20, (1, 0, 1, 0), 1),
            (6, 20, (3, 0, 2, 1), 1),
            (2, 3, (7, 5, 4, 9), 1),  # wider than the map: some outputs see zeros alone
            (1, 1, (2, 2, 2, 2), 2),
            (9, 20, (2, 2, 2, 2), 2),
            (9, 35, (3, 0, 0, 3), 3),
            (12, 11, (0, 0, 0, 0), 5),
            (3, 4, (20, 20, 20, 20), 18),  # dilation beyond the map: one tap at a time
        ],
    )
]
ACTIVATIONS = [
    Case(activation=first, pointwise_activation=second)
    for first, second in itertools.product(ACTIVATION_CODES, repeat=2)
]
BATCHES = [Case(batch=batch) for batch in (0, 2, 3)]
#: Layers of MobileNetV1 and V2 on small maps: what varies with the size of the map is covered above.
LAYERS = [
    Case(32, 64, 14, 14, activation="relu", pointwise_activation="relu"),
    Case(64, 128, 14, 14, 2, activation="relu", pointwise_activation="relu"),
    Case(512, 512, 7, 7, activation="relu6", pointwise_activation="relu6"),
    Case(1024, 1024, 4, 4, activation="relu", pointwise_activation="relu"),
    Case(144, 24, 14, 14, activation="relu6"),
    Case(96, 24, 15, 15, 2, (0, 1, 0, 1), activation="relu6"),
    Case(960, 320, 7, 7, activation="hardswish"),
]

ALL = [*CHANNELS, *WIDTHS, *MAPS, *DEPTHS, *ROWS, *PADDINGS, *ACTIVATIONS, *BATCHES, *LAYERS]


def operands(case: Case, dtype: type = np.float32, seed: int = 0) -> Operands:
    """Random numbers of the size that trained networks have; activations see both sides of each of their kinks."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(dtype)

    c, o = case.in_channels, case.out_channels
    return Operands(
        normal(case.batch, c, case.height, case.width, scale=2.0),
        normal(c, 3, 3, scale=0.7),
        normal(c, scale=0.5).astype(np.float64),
        normal(o, c, scale=2.0 / np.sqrt(c)),
        normal(o, scale=0.5).astype(np.float64),
    )


def reference(case: Case, operands: Operands) -> np.ndarray:
    """The float64 result, (N, O, Ho, Wo)."""
    return reference_numpy.separable_conv2d(
        *operands, case.pads, case.stride, case.dilation, case.activation, case.pointwise_activation
    )
