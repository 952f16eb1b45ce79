# SPDX-License-Identifier: BSD-3-Clause
"""What the demo finds out, apart from how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._measure import Times, compare, largest_difference

if TYPE_CHECKING:
    from ..pretrained.photos import Photo

ENGINES = ("unfused", "fused", "frozen")


@dataclass(frozen=True)
class Answer:
    """What the networks say about one photograph."""

    photo: Photo
    classes: list[int]  # the frozen network's, likeliest first: ImageNet's 0 to 999, or -1 for the background
    probability: float  # of the first of them
    logits: dict[str, torch.Tensor]  # by engine, and "exact": the unfused network in float64
    times: dict[str, Times]

    @property
    def rank(self) -> int | None:
        """Position of the label among the classes, 1 being the top; ``None`` if it is not there or not known."""
        label = self.photo.label
        return self.classes.index(label) + 1 if label in self.classes else None

    @property
    def difference(self) -> float:
        """Largest difference of a fused or frozen logit from the unfused one."""
        unfused, *others = (self.logits[engine] for engine in ENGINES)
        return max(largest_difference(other, unfused) for other in others)


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures under the table, as they go into the JSON."""
    labelled = [answer for answer in answers if answer.photo.label is not None]
    logits = {name: torch.cat([answer.logits[name] for answer in answers]) for name in (*ENGINES, "exact")}
    checks = [compare(logits[name], logits["unfused"], logits["exact"]) for name in ENGINES[1:]]
    medians = {name: statistics.median(answer.times[name].median for answer in answers) for name in ENGINES}
    return {
        "photos": len(answers),
        "labelled": len(labelled),
        "top1": sum(answer.rank == 1 for answer in labelled),
        "top5": sum(answer.rank is not None for answer in labelled),
        "largest_difference": max(answer.difference for answer in answers),
        "largest_error": dict(zip(ENGINES, (checks[0].torch_error, *(check.error for check in checks)), strict=True)),
        "allowed_error": checks[0].allowed,
        "accurate": all(check.ok for check in checks),
        "median_ms": medians,
        "speedup": {name: medians["unfused"] / medians[name] for name in ENGINES[1:]},
    }


def class_name(index: int, names: Sequence[str]) -> str:
    return "background" if index < 0 else names[index]


def as_json(answer: Answer, names: Sequence[str]) -> dict[str, Any]:
    label = answer.photo.label
    return {
        "photo": answer.photo.name,
        "label": None if label is None else class_name(label, names),
        "answers": [class_name(index, names) for index in answer.classes],
        "probability": answer.probability,
        "rank_of_label": answer.rank,
        "largest_difference": answer.difference,
        "median_ms": {engine: times.median for engine, times in answer.times.items()},
    }
