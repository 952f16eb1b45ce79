# SPDX-License-Identifier: BSD-3-Clause
"""Fused depthwise-separable convolutions for PyTorch on ordinary processors."""

from . import reference
from ._backend import active_isa, backend_info, supported_isas, use_isa
from ._complexity import complexity
from ._version import __version__
from .block import DepthwiseSeparableBlock
from .functional import depthwise_separable_conv2d
from .mobilenet import MobileNetV1
from .surgery import FusionReport, defuse, freeze, fuse, fusion_report

__all__ = [
    "DepthwiseSeparableBlock",
    "FusionReport",
    "MobileNetV1",
    "__version__",
    "active_isa",
    "backend_info",
    "complexity",
    "defuse",
    "depthwise_separable_conv2d",
    "freeze",
    "fuse",
    "fusion_report",
    "reference",
    "supported_isas",
    "use_isa",
]
