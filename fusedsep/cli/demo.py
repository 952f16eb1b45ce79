# SPDX-License-Identifier: BSD-3-Clause
"""Classify photographs with a pretrained ImageNet MobileNetV1, or train one on digits: unfused and fused."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

import fusedsep

from ..mobilenet import STAGES
from ..pretrained import download, weights
from ._arguments import (
    CommandError,
    add_threads,
    output_file,
    picture_file,
    positive_int,
    positive_number,
    set_threads,
)
from ._demo_results import ENGINES, Answer, as_json, summarise
from ._measure import time_interleaved
from ._output import machine, machine_line, make_console, require_extra, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from ..pretrained.photos import Photo

HELP = "classify photographs with a pretrained MobileNetV1, or train one"

_TRAINING_OPTIONS = (
    ("--epochs", "N", positive_int, "passes over the 4,000 training digits"),
    ("--batch-size", "N", positive_int, "digits of a step"),
    ("--width-multiplier", "W", positive_number, "width of the network"),
    ("--seed", "S", int, "of weights, split and batches"),
)
_DEFAULTS: dict[str, Any] = {"--epochs": 12, "--batch-size": 64, "--width-multiplier": 0.25, "--seed": 0}

_RESOLUTION = 224
_TOP = 5


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
        metavar="DIR",
        help="where fetched files are kept (default: $FUSEDSEP_CACHE, or fusedsep in the user's cache folder)",
    )
    add_threads(parser)
    training = parser.add_argument_group(
        "training", "--train trains a small MobileNetV1 on handwritten digits, unfused and fused from one seed"
    )
    training.add_argument("--train", action="store_true", help="train, instead of classifying photographs")
    for option, metavar, of_type, text in _TRAINING_OPTIONS:
        training.add_argument(option, type=of_type, metavar=metavar, help=f"{text} (default: {_DEFAULTS[option]})")
    parser.add_argument("--repeats", type=positive_int, default=7, metavar="N", help="timed runs a photo (default: 7)")
    parser.add_argument(
        "--output",
        type=picture_file,
        default=Path("fusedsep-demo.png"),
        metavar="FILE",
        help="the picture to write, PNG, JPEG, SVG or PDF by its suffix (default: %(default)s)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results to FILE")


def run(arguments: argparse.Namespace) -> int:
    require_extra()
    _check_options(arguments)
    set_threads(arguments)
    return _train(arguments) if arguments.train else _classify_photos(arguments)


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise for an option that the other demo has; fill in the defaults of training."""
    for option in ("--weights", "--photos") if arguments.train else ():
        if _value(arguments, option) is not None:
            raise CommandError(f"{option} is for photographs, and --train takes digits")
    for option, default in _DEFAULTS.items():
        if not arguments.train and _value(arguments, option) is not None:
            raise CommandError(f"{option} is for --train")
        if _value(arguments, option) is None:
            setattr(arguments, _name(option), default)


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _value(arguments: argparse.Namespace, option: str) -> Any:
    return getattr(arguments, _name(option))


# --------------------------------------------------------------------------------------------------------------- train


def _train(arguments: argparse.Namespace) -> int:
    from ..pretrained import digits
    from . import _demo_curves, _demo_report, _demo_training

    console = make_console()
    cache = arguments.cache_dir or download.default_cache_dir()
    with _demo_report.fetching(console) as progress_of:
        data = digits.bundled_digits(cache, progress_of(download.DIGITS))
    settings = _demo_training.Settings(*(_value(arguments, option) for option in _DEFAULTS))
    steps = _demo_training.steps_of(data, settings)
    if steps < _demo_training.FIRST_STEPS:
        raise CommandError(
            f"--epochs {settings.epochs} with --batch-size {settings.batch_size} makes {steps} steps, "
            f"at least {_demo_training.FIRST_STEPS} are wanted"
        )
    facts = machine()
    console.print(machine_line(facts))
    try:
        with _demo_report.training(steps, console) as after_step:
            twins = _demo_training.train(data, settings, after_step)
    except _demo_training.Diverged as error:
        raise CommandError(f"training went wrong: {error}") from None
    results = _demo_training.summarise(twins)
    _demo_report.print_training(results, console)
    _write(arguments.output, lambda path: _demo_curves.draw(path, twins, results, machine_line(facts)))
    console.print(f"picture: {arguments.output}")
    if arguments.json is not None:
        curves = {name: {"losses": twin.losses, "accuracies": twin.accuracies} for name, twin in twins.items()}
        write_json(arguments.json, {"machine": facts, "settings": vars(settings), "summary": results, "curves": curves})
        console.print(f"results: {arguments.json}")
    return 0 if results["same_losses"] and results["same_accuracy"] else 1


def _write(path: Path, draw: Callable[[Path], None]) -> None:
    try:
        draw(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------------ classify


def _classify_photos(arguments: argparse.Namespace) -> int:
    from . import _demo_picture, _demo_report

    console = make_console()
    state_dict, photos, names = _gather(arguments, console)
    unfused = weights.build_network(state_dict).to(memory_format=torch.channels_last)
    exact = weights.build_network(state_dict).double()
    if exact.linear.out_features - len(names) not in (0, 1):
        raise CommandError(
            f"the weights must tell {len(names)} ImageNet classes, or {len(names) + 1} with the background, "
            f"got {exact.linear.out_features}"
        )
    fused = fusedsep.fuse(unfused)
    networks = dict(zip(ENGINES, (unfused, fused, fusedsep.freeze(fused)), strict=True))
    sites = fusedsep.fusion_report(fused)
    facts = machine()
    console.print(machine_line(facts))
    console.print(f"fused {len(sites.fused)} of {len(STAGES)} depthwise-separable blocks")
    for site in sites.skipped:
        console.print(f"  left alone: {site.name}, {site.reason}")

    answers = []
    for photo in _demo_report.with_progress(photos, "classifying", console):
        answers.append(_classify(photo, networks, exact, len(names), arguments.repeats))
    results = summarise(answers)
    _demo_report.print_answers(answers, names, console)
    _demo_report.print_summary(results, console)

    _write(arguments.output, lambda path: _demo_picture.draw(path, answers, names, results, machine_line(facts)))
    console.print(f"picture: {arguments.output}")
    if arguments.json is not None:
        content = {
            "machine": facts,
            "blocks": {"fused": len(sites.fused), "all": len(STAGES)},
            "summary": results,
            "photos": [as_json(answer, names) for answer in answers],
        }
        write_json(arguments.json, content)
        console.print(f"results: {arguments.json}")
    return 0 if results["accurate"] and len(sites.fused) == len(STAGES) else 1


def _gather(arguments: argparse.Namespace, console: Console) -> tuple[dict[str, torch.Tensor], list[Photo], list[str]]:
    """Weights, photographs, class names: the user's own files first, so that a wrong path fails before a download."""
    from ..pretrained import photos
    from ._demo_report import fetching

    state_dict = None if arguments.weights is None else weights.read_state_dict(arguments.weights)
    pictures = None if arguments.photos is None else photos.open_photos(arguments.photos)
    cache = arguments.cache_dir or download.default_cache_dir()
    with fetching(console) as progress_of:
        if state_dict is None:
            with _or_give("--weights FILE"):
                state_dict = weights.bundled_state_dict(cache, progress_of(download.WEIGHTS))
        if pictures is None:
            with _or_give("--photos PATH"):
                pictures = photos.bundled_photos(cache, progress_of(download.PHOTOS))
        try:
            names = photos.class_names(cache, progress_of(download.CLASS_NAMES))
        except download.DownloadError as error:
            console.print(f"classes are shown by number, because {error}")
            names = [f"class {index}" for index in range(weights.IMAGENET_CLASSES)]
    return state_dict, pictures, names


@contextlib.contextmanager
def _or_give(option: str) -> Iterator[None]:
    try:
        yield
    except download.DownloadError as error:
        raise CommandError(f"{error}, or give {option}") from None


def _classify(photo: Photo, networks: dict[str, nn.Module], exact: nn.Module, classes: int, repeats: int) -> Answer:
    from ..pretrained.photos import to_input

    x = to_input(photo.image, _RESOLUTION)
    with torch.inference_mode():
        logits = {engine: network(x) for engine, network in networks.items()}
        logits["exact"] = exact(x.double())
    probabilities, indices = logits["frozen"][0].softmax(0).topk(_TOP)
    background = logits["frozen"].shape[1] - classes  # 1 if class 0 is the background
    return Answer(
        photo=photo,
        classes=[index - background for index in indices.tolist()],
        probability=probabilities[0].item(),
        logits=logits,
        times=time_interleaved({engine: functools.partial(net, x) for engine, net in networks.items()}, repeats),
    )
