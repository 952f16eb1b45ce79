# SPDX-License-Identifier: BSD-3-Clause
"""Fused depthwise-separable convolutions for PyTorch on ordinary processors."""

import torch as _torch  # noqa: F401  (the extension needs its libraries loaded)

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the compiled extension of fusedsep cannot be loaded from {__path__[0]} ({error}). In a source tree, "
        "`pip install .` builds it and Python must then be started elsewhere; `pip install -e .` builds it in place."
    ) from error

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
