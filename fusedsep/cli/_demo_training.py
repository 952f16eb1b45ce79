# SPDX-License-Identifier: BSD-3-Clause
"""Two twins of one network trained side by side on the same batches: what ``demo --train`` finds out."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import fusedsep

from ..pretrained.digits import Digits
from ._training_memory import saved_bytes

TWINS = ("unfused", "fused")

#: What the run must keep to, for losses of the first steps and for the final accuracies.
FIRST_STEPS = 10
LOSS_TOLERANCE = 1e-3
ACCURACY_TOLERANCE = 0.02

_TEST_SHARE = 5  # every fifth digit of a class is for the test
_PAD = 2  # 28 x 28 to 32 x 32, which MobileNetV1 halves five times
_SHIFT = 2  # pixels, at random, in training
_PEAK_RATE, _WARM_UP_SHARE = 0.1, 0.3
_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch_size: int
    width_multiplier: float
    seed: int


@dataclass
class Twin:
    """One of the two, and how it fared."""

    network: nn.Module
    losses: list[float] = field(default_factory=list)  # a step
    milliseconds: list[float] = field(default_factory=list)  # a step: forward, loss, backward, optimizer
    accuracies: list[float] = field(default_factory=list)  # on the test digits, an epoch
    saved_bytes: int = 0  # for the backward of one step

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.SGD(
            self.network.parameters(), _PEAK_RATE, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True
        )

    def step(self, x: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        start = time.perf_counter_ns()
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.network(x), labels)
        loss.backward()
        self._optimizer.step()
        self.milliseconds.append((time.perf_counter_ns() - start) / 1e6)
        self.losses.append(loss.item())

    def count_saved_bytes(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        """Of the storages that autograd holds on to for one backward, besides parameters and the batch itself."""
        twin = copy.deepcopy(self.network)  # in its place: no running statistics move
        self.saved_bytes = saved_bytes(lambda: F.cross_entropy(twin(x), labels), (x, labels, *twin.parameters()))

    def test(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        self.network.eval()
        with torch.inference_mode():
            self.accuracies.append((self.network(x).argmax(1) == labels).double().mean().item())
        self.network.train()


class Diverged(Exception):
    """A loss is not a number."""


def train(digits: Digits, settings: Settings, after_step: Callable[[dict[str, Twin]], None]) -> dict[str, Twin]:
    """Train both twins from one seed, a step of one after a step of the other, so that their times compare.

    Same weights at the start, same batches, same rates: warmed up over the first 30 % of the steps, since BN over the
    few pixels of the last layers amplifies a difference in the last bit at high rates, then falling along a cosine.

    Raises:
        Diverged: a loss of either is infinite or not a number.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    training, test = _split(digits.labels, generator)
    mean, std = digits.images[training].mean(), digits.images[training].std()
    images = F.pad((digits.images - mean) / std, (_PAD,) * 4, value=(-mean / std).item())
    images = images.to(memory_format=torch.channels_last)

    twins = _make_twins(settings)
    per_epoch = len(training) // settings.batch_size
    steps = settings.epochs * per_epoch
    for step, batch in enumerate(_batches(training, settings, generator)):
        x, labels = _shifted(images[batch], generator), digits.labels[batch]
        for twin in twins.values():
            if step == 0:
                twin.count_saved_bytes(x, labels)
            twin.step(x, labels, _rate(step, steps))
        for name, twin in twins.items():
            if not math.isfinite(twin.losses[-1]):
                raise Diverged(f"the loss of the {name} network is {twin.losses[-1]} in step {step + 1}")
        if (step + 1) % per_epoch == 0:
            for twin in twins.values():
                twin.test(images[test], digits.labels[test])
        after_step(twins)
    return twins


def steps_of(digits: Digits, settings: Settings) -> int:
    """How many steps :func:`train` takes; 0 if the batch is larger than the training digits."""
    training, _ = _split(digits.labels, torch.Generator().manual_seed(settings.seed))
    return settings.epochs * (len(training) // settings.batch_size)


def summarise(twins: dict[str, Twin]) -> dict[str, Any]:
    """The figures under the curves, as they go into the JSON."""
    unfused, fused = (twins[name] for name in TWINS)
    first = [abs(a - b) for a, b in zip(unfused.losses[:FIRST_STEPS], fused.losses[:FIRST_STEPS], strict=True)]
    apart = abs(unfused.accuracies[-1] - fused.accuracies[-1])
    return {
        "steps": len(unfused.losses),
        "accuracy": {name: twin.accuracies[-1] for name, twin in twins.items()},
        "median_step_ms": {name: statistics.median(twin.milliseconds) for name, twin in twins.items()},
        "saved_bytes": {name: twin.saved_bytes for name, twin in twins.items()},
        "speedup": statistics.median(unfused.milliseconds) / statistics.median(fused.milliseconds),
        "largest_difference_of_first_losses": max(first),
        "difference_of_accuracies": apart,
        "same_losses": max(first) < LOSS_TOLERANCE,
        "same_accuracy": apart < ACCURACY_TOLERANCE,
    }


def _make_twins(settings: Settings) -> dict[str, Twin]:
    torch.manual_seed(settings.seed)
    network = fusedsep.reference.MobileNetV1(10, settings.width_multiplier, in_channels=1)
    # Without an opinion at first: the loss starts at log(10), whatever the features are.
    nn.init.zeros_(network.linear.weight)
    nn.init.zeros_(network.linear.bias)
    network.to(memory_format=torch.channels_last)
    return dict(zip(TWINS, (Twin(network), Twin(fusedsep.fuse(network))), strict=True))


def _split(labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices for training and for the test, with the same share of every class in both."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    is_test = torch.arange(len(order)) % _TEST_SHARE == 0
    return order[~is_test], order[is_test]


def _batches(training: torch.Tensor, settings: Settings, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(settings.epochs):
        order = training[torch.randperm(len(training), generator=generator)]
        full = len(order) // settings.batch_size * settings.batch_size
        yield from order[:full].split(settings.batch_size)


def _shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    down, right = torch.randint(-_SHIFT, _SHIFT + 1, (2,), generator=generator).tolist()
    return torch.roll(x, (down, right), (2, 3))


def _rate(step: int, steps: int) -> float:
    warm_up = ((step + 1) / (_WARM_UP_SHARE * steps)) ** 2
    return _PEAK_RATE * min(warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
