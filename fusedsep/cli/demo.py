# SPDX-License-Identifier: BSD-3-Clause
"""Classify photographs with a pretrained ImageNet MobileNetV1: unfused, fused and frozen, side by side."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

import fusedsep

from ..mobilenet import STAGES
from ..pretrained import download, weights
from ._arguments import CommandError, add_threads, output_file, picture_file, positive_int, set_threads
from ._measure import Accuracy, Times, compare, largest_difference, time_interleaved
from ._output import machine, machine_line, make_console, require_extra, write_json

if TYPE_CHECKING:
    from ..pretrained.photos import Photo

HELP = "classify photographs with a pretrained MobileNetV1"

ENGINES = ("unfused", "fused", "frozen")
_RESOLUTION = 224
_TOP = 5
_FACTOR, _ULPS = 3.0, 2.0  # of the check against float64, see _measure.compare


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a MobileNetV1 state_dict (.pt, .pth, .safetensors) or a frozen TF-slim GraphDef (.pb); default: fetched",
    )
    parser.add_argument(
        "--photos", type=Path, nargs="+", metavar="PATH", help="your own pictures or folders of them; default: fetched"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=download.default_cache_dir(),
        metavar="DIR",
        help="where fetched files are kept (default: $FUSEDSEP_CACHE, else %(default)s)",
    )
    add_threads(parser)
    parser.add_argument("--repeats", type=positive_int, default=7, metavar="N", help="timed runs a photo (default: 7)")
    parser.add_argument(
        "--output",
        type=picture_file,
        default=Path("fusedsep-demo.png"),
        metavar="FILE",
        help="the picture to write: PNG, JPEG, SVG or PDF by its suffix (default: %(default)s)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results to FILE")


def run(arguments: argparse.Namespace) -> int:
    require_extra()
    from . import _demo_report as report

    set_threads(arguments)
    console = make_console()
    state_dict, photos, names = _gather(arguments, console)
    unfused = weights.build_network(state_dict).to(memory_format=torch.channels_last)
    exact = weights.build_network(state_dict).double()
    if exact.linear.out_features not in (len(names), len(names) + 1):
        raise CommandError(
            f"the weights must tell ImageNet's {len(names)} classes, or {len(names) + 1} with the background, "
            f"got {exact.linear.out_features}"
        )
    fused = fusedsep.fuse(unfused)
    networks = dict(zip(ENGINES, (unfused, fused, fusedsep.freeze(fused)), strict=True))
    sites = fusedsep.fusion_report(unfused)
    facts = machine()
    console.print(machine_line(facts))
    console.print(f"fused {len(sites.fused)} of {len(STAGES)} depthwise-separable blocks")
    for site in sites.skipped:
        console.print(f"  left alone: {site.name}, {site.reason}")
    answers = [
        _classify(photo, networks, exact, arguments.repeats) for photo in report.progress(console, photos, "classifying")
    ]
    results = summarise(answers)
    report.print_answers(console, answers, names)
    report.print_summary(console, results)
    report.draw(arguments.output, answers, names, results, machine_line(facts))
    console.print(f"picture: {arguments.output}")
    if arguments.json is not None:
        content = {
            "machine": facts,
            "blocks": {"fused": len(sites.fused), "all": len(STAGES)},
            "summary": results,
            "photos": [report.as_json(answer, names) for answer in answers],
        }
        write_json(arguments.json, content)
        console.print(f"results: {arguments.json}")
    return 0 if results["accurate"] and len(sites.fused) == len(STAGES) else 1


def summarise(answers: list[Answer]) -> dict[str, Any]:
    """The figures under the table, as they go into the JSON."""
    labelled = [answer for answer in answers if answer.photo.label is not None]
    logits = {name: torch.cat([answer.logits[name] for answer in answers]) for name in (*ENGINES, "exact")}
    checks = [compare(logits[name], logits["unfused"], logits["exact"], _FACTOR, _ULPS) for name in ("fused", "frozen")]
    medians = {name: statistics.median(answer.times[name].median for answer in answers) for name in ENGINES}
    return {
        "labelled": len(labelled),
        "top1": sum(answer.rank == 1 for answer in labelled),
        "top5": sum(answer.rank is not None for answer in labelled),
        "largest_difference": max(answer.difference for answer in answers),
        "largest_error": {"unfused": checks[0].torch_error, "fused": checks[0].error, "frozen": checks[1].error},
        "allowed_error": checks[0].allowed,
        "accurate": all(check.ok for check in checks),
        "median_ms": medians,
        "speedup": {name: medians["unfused"] / medians[name] for name in ("fused", "frozen")},
    }


def _gather(
    arguments: argparse.Namespace, console: Console
) -> tuple[dict[str, torch.Tensor], list[Photo], list[str]]:
    """Weights, photographs and class names, from the user's files or fetched; what is local is read first."""
    from ..pretrained import photos
    from ._demo_report import fetching

    own_weights = None if arguments.weights is None else weights.read_state_dict(arguments.weights)
    own_photos = None if arguments.photos is None else photos.open_photos(arguments.photos)
    cache = arguments.cache_dir
    with fetching(console) as progress_of:
        try:
            state_dict = own_weights or weights.bundled_state_dict(cache, progress_of(download.WEIGHTS))
        except download.DownloadError as error:
            raise CommandError(f"{error}, or give --weights FILE") from None
        try:
            pictures = own_photos or photos.bundled_photos(cache, progress_of(download.PHOTOS))
        except download.DownloadError as error:
            raise CommandError(f"{error}, or give --photos PATH") from None
        try:
            names = photos.class_names(cache, progress_of(download.CLASS_NAMES))
        except download.DownloadError as error:
            console.print(f"classes are shown by number: {error}")
            names = [f"class {index}" for index in range(photos.CLASSES)]
    return state_dict, pictures, names


def _classify(photo: Photo, networks: dict[str, nn.Module], exact: nn.Module, repeats: int) -> Answer:
    from ..pretrained.photos import to_input

    x = to_input(photo.image, _RESOLUTION)
    with torch.inference_mode():
        logits = {engine: network(x) for engine, network in networks.items()}
        logits["exact"] = exact(x.double())
    probabilities, indices = logits["frozen"][0].softmax(0).topk(_TOP)
    background = logits["frozen"].shape[1] - CLASSES
    calls = {engine: functools.partial(network, x) for engine, network in networks.items()}
    return Answer(
        photo=photo,
        classes=[index - background for index in indices.tolist()],
        probability=probabilities[0].item(),
        logits=logits,
        times=time_interleaved(calls, repeats),
    )
