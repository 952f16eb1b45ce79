# SPDX-License-Identifier: BSD-3-Clause
"""Networks whose BatchNorms do something: a fresh one is the identity and would hide a wrong fold."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn as nn

Model = TypeVar("Model", bound=nn.Module)


def randomized(model: Model, seed: int = 0) -> Model:
    """``model`` with random BN parameters and statistics, negative gammas among them; in place."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.double) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, -0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
                uniform(module.running_mean, -0.2, 0.2)
                uniform(module.running_var, 0.5, 1.5)
    return model
