# SPDX-License-Identifier: BSD-3-Clause
"""The activations that the kernels apply in their epilogues, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

#: Name -> code in ``csrc/kernels/separable.h`` (``enum class Activation``).
ACTIVATION_CODES: dict[str, int] = {"none": 0, "relu": 1, "relu6": 2, "hardswish": 3}
#: The same of what the training operators of one convolution apply besides (:mod:`fusedsep._convolution`).
CONVOLUTION_ACTIVATION_CODES = {**ACTIVATION_CODES, "silu": 4}
#: And of what the layers of a chain do (:mod:`fusedsep._chain_elements`).
LAYER_ACTIVATION_CODES = {**CONVOLUTION_ACTIVATION_CODES, "sigmoid": 5, "hardsigmoid": 6, "gelu": 7}
#: Code -> name.
ACTIVATION_NAMES = {code: name for name, code in LAYER_ACTIVATION_CODES.items()}

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
}

_MODULES: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
}


def check_activation(name: object, argument: str = "activation") -> str:
    """Return ``name`` if it is a known activation, otherwise raise ``ValueError`` naming ``argument``."""
    if not isinstance(name, str) or name not in ACTIVATION_CODES:
        known = ", ".join(repr(known) for known in ACTIVATION_CODES)
        raise ValueError(f"{argument} must be one of {known}, got {name!r}")
    return name


def apply_activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """The ATen equivalent of the activation ``name``; never in place."""
    return _FUNCTIONS[name](x)


def activation_module(name: str, argument: str = "activation") -> nn.Module:
    """The torch module that is the activation ``name``."""
    return _MODULES[check_activation(name, argument)]()
