# SPDX-License-Identifier: BSD-3-Clause
"""Count the Mult-Adds and parameters of a network per kind of layer, and list what would be fused."""

from __future__ import annotations

import argparse

import fusedsep

from ._arguments import CommandError, add_model, describe, make_model

HELP = "Mult-Adds, parameters and fusable sites of a network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    name, model = make_model(arguments.model, arguments.width, arguments.resolution)
    try:
        complexity = fusedsep.complexity(model, arguments.resolution)
        report = fusedsep.fusion_report(model)
    except Exception as error:
        if arguments.model is None:
            raise
        raise CommandError(
            f"--model: {name} does not take {arguments.resolution}x{arguments.resolution} images: {describe(error)}"
        ) from error
    print(f"{name}\n\n{complexity}\n\n{report}")
    return 0
