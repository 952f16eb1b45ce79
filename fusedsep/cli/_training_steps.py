# SPDX-License-Identifier: BSD-3-Clause
"""Training steps of one network in every engine, from the same start on the same batch."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import fusedsep

from ._arguments import make_model
from ._cases import Case, images_for
from ._measure import Accuracy, Times
from ._training_memory import saved_bytes

PHASES = ("forward", "backward", "optimizer")
_RATE, _MOMENTUM = 1e-4, 0.9
_WARM_UP = 2
#: Losses of this many first steps are compared with float64 eager's: the error may be 3 times that of float32 eager's,
#: plus 1e-3 and 2 % of how far the loss moves. A BN over few values and the kinks of activations amplify the last bit
#: from step to step in every engine; a gradient that is off by more than 2 % is seen.
COMPARED_STEPS = 3
_FACTOR, _SLACK, _SHARE = 3.0, 1e-3, 0.02

ENGINES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.memory_format]] = {
    "eager nchw": (lambda module: module, torch.contiguous_format),
    "eager channels_last": (lambda module: module, torch.channels_last),
    "compile": (lambda module: _compiled(module), torch.channels_last),
    "fused nchw": (fusedsep.fuse, torch.contiguous_format),
    "fused channels_last": (fusedsep.fuse, torch.channels_last),
}
OURS = ("fused nchw", "fused channels_last")
EAGER = ("eager nchw", "eager channels_last")


class Trainee:
    """One engine's copy of the network with its batch and its optimizer.

    Args:
        unfused: in any mode; it is not changed.
        images: in NCHW.
        labels: a class for each image, or ``None`` where the output is not one row of logits for each: the loss is the
            mean square of the output then.
    """

    def __init__(
        self,
        unfused: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        engine: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        make, memory_format = ENGINES[engine]
        self.module = make(copy.deepcopy(unfused).train().to(dtype=dtype, memory_format=memory_format))
        self.images = images.to(dtype).contiguous(memory_format=memory_format)
        self.labels = labels
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=_RATE, momentum=_MOMENTUM)

    def loss(self) -> torch.Tensor:
        output = self.module(self.images)
        return output.square().mean() if self.labels is None else F.cross_entropy(output, self.labels)

    def step(self) -> tuple[torch.Tensor, list[float]]:
        """The loss, and the milliseconds of each phase."""
        times = [time.perf_counter()]
        self._optimizer.zero_grad()
        loss = self.loss()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self._optimizer.step()
        times.append(time.perf_counter())
        return loss.detach(), [1e3 * (end - begin) for begin, end in itertools.pairwise(times)]

    def saved_bytes(self) -> int:
        """What autograd keeps for the backward, the batch included, besides parameters and buffers."""
        return saved_bytes(self.loss, [*self.module.parameters(), *self.module.buffers()])


def make_subject(case: Case) -> tuple[str, nn.Module, torch.Tensor, torch.Tensor | None]:
    """Name, unfused network, images and labels: the same numbers in every process."""
    torch.manual_seed(0)
    name, network = make_model(case.model, case.width, case.resolution)
    images = images_for(network, case)
    with torch.no_grad():
        output = copy.deepcopy(network).train()(images)
    return name, network, images, torch.randint(output.shape[1], (case.batch,)) if output.dim() == 2 else None


def first_losses(trainee: Trainee) -> torch.Tensor:
    """Of ``COMPARED_STEPS`` steps, in float64."""
    return torch.stack([trainee.step()[0].double() for _ in range(COMPARED_STEPS)])


def compare_losses(losses: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> Accuracy:
    """The largest difference from ``exact`` against what it may be; ``torchs`` are those of float32 eager."""
    error, torch_error = ((some - exact).abs().max().item() for some in (losses, torchs))
    moved = (exact - exact[0]).abs().max().item()
    return Accuracy(error, torch_error, _FACTOR * torch_error + _SLACK + _SHARE * moved)


def time_steps(trainees: dict[str, Trainee], repeats: int) -> dict[str, dict[str, Times]]:
    """Milliseconds of each phase and of the whole ``"step"``, the engines in turns."""
    samples: dict[str, dict[str, list[float]]] = {
        engine: {phase: [] for phase in (*PHASES, "step")} for engine in trainees
    }
    for trainee in trainees.values():
        for _ in range(_WARM_UP):
            trainee.step()
    for _ in range(repeats):
        for engine, trainee in trainees.items():
            _, phases = trainee.step()
            for phase, milliseconds in zip((*PHASES, "step"), (*phases, sum(phases)), strict=True):
                samples[engine][phase].append(milliseconds)
    return {
        engine: {phase: Times(tuple(values)) for phase, values in phases.items()} for engine, phases in samples.items()
    }


def _compiled(module: nn.Module) -> Any:
    torch.compiler.reset()  # Dynamo gives up on code that was compiled more than a few times
    module.compile()
    return module
