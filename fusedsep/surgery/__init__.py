# SPDX-License-Identifier: BSD-3-Clause
"""Fusing the sites of an existing model: find them, regenerate the forwards that hold them, fold them, report."""

from .freeze import freeze
from .fuse import defuse, fuse
from .report import FusionReport, Site, fusion_report

__all__ = ["FusionReport", "Site", "defuse", "freeze", "fuse", "fusion_report"]
