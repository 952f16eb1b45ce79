# SPDX-License-Identifier: BSD-3-Clause
"""What the subcommands' arguments mean, and the one exception for wrong ones."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

from .. import active_isa, reference

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".pdf")


class CommandError(Exception):
    """The user can mend this; the message is one sentence."""


def positive_int(text: str) -> int:
    """argparse type: an int of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """argparse type: a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text!r}")
    return value


def positive_ints(text: str) -> tuple[int, ...]:
    """argparse type: ints of at least 1 with commas between them, each once."""
    return tuple(dict.fromkeys(map(positive_int, text.split(","))))


def positive_numbers(text: str) -> tuple[float, ...]:
    """argparse type: finite numbers greater than 0 with commas between them, each once."""
    return tuple(dict.fromkeys(map(positive_number, text.split(","))))


def output_file(text: str) -> Path:
    """argparse type: a file to write; its folder must exist now, not after minutes of work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, a file is wanted")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write into")
    return path


def picture_file(text: str) -> Path:
    """argparse type: an :func:`output_file` in one of the formats that the picture can have."""
    path = output_file(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PICTURE_SUFFIXES)}, got {text!r}")
    return path


def check_isa() -> None:
    """Raise :class:`CommandError` if the environment asks for an instruction set that is not there."""
    try:
        active_isa()
    except ValueError as error:
        raise CommandError(str(error)) from None


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive_int, metavar="N", help="intra-op threads (default: torch's own)")


def set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """``--model``, or the width of a MobileNetV1; :func:`make_model` reads one of each.

    Args:
        several: widths and resolutions are tuples, from lists with commas.
    """
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="your own network: a function without arguments that returns it"
    )
    parser.add_argument(
        "--width",
        type=positive_numbers if several else positive_number,
        default=(1.0,) if several else 1.0,
        metavar="W,..." if several else "W",
        help="width multiplier of MobileNetV1 (default: 1.0)",
    )
    parser.add_argument(
        "--resolution",
        type=positive_ints if several else positive_int,
        default=(224,) if several else 224,
        metavar="R,..." if several else "R",
        help="height and width of the images (default: 224)",
    )


def make_model(model: str | None, width: float, resolution: int) -> tuple[str, nn.Module]:
    """A name for tables, and the unfused network in eval mode: the user's ``model``, or a MobileNetV1."""
    if model is not None:
        return model, load_model(model).eval()
    return f"MobileNetV1 {width:g}-{resolution}", reference.MobileNetV1(width_multiplier=width).eval()


def load_model(spec: str) -> nn.Module:
    """The module that the function named by ``package.module:function`` returns.

    Raises:
        CommandError: the text is of another form, the import or the call fails, or no ``nn.Module`` comes back.
    """
    module_name, colon, function_name = spec.partition(":")
    if not (module_name and colon and function_name):
        raise CommandError(f"--model must be MODULE:FUNCTION, got {spec!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not search the working directory by itself
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise CommandError(f"--model: cannot import {module_name!r}: {describe(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CommandError(f"--model: module {module_name!r} has no function {function_name!r}")
    try:
        model = function()
    except Exception as error:  # whatever the user's function raises
        raise CommandError(f"--model: {function_name}() failed: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model: {function_name}() must return an nn.Module, got {type(model).__name__}")
    return model


def describe(error: Exception) -> str:
    """Type and first line of ``error``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
