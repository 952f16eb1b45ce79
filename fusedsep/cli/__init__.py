# SPDX-License-Identifier: BSD-3-Clause
"""The console script ``fusedsep``: one subcommand a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..pretrained import PretrainedError
from . import bench, demo, info, summary, verify
from ._arguments import CommandError, check_isa

_SUBCOMMANDS = (demo, verify, info, summary, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 on success, 1 if results disagree, 2 if an argument, a file or a package is missing or wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        check_isa()
        return arguments.run(arguments)
    except (CommandError, PretrainedError) as error:
        print(f"fusedsep {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedsep", description="Fused depthwise-separable convolutions for PyTorch on the CPU."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{demo,verify,info,summary,bench}")
    for module in _SUBCOMMANDS:
        name = module.__name__.rpartition(".")[2]
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser
