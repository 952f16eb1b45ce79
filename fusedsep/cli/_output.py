# SPDX-License-Identifier: BSD-3-Clause
"""Tables, JSON and the line about the machine; rich makes the tables prettier where it is installed."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import backend_info
from ._arguments import CommandError

#: Import names and package names of the optional extra.
_EXTRA = {"rich": "rich", "matplotlib": "matplotlib", "PIL": "pillow"}
_PIPED_WIDTH = 150  # columns; rich would fold the tables to 80 when nobody watches


def require_extra() -> None:
    """Raise :class:`CommandError` if a package of the extra is missing."""
    missing = [package for name, package in _EXTRA.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f'not installed: {", ".join(missing)}; all that the demo needs: pip install "fusedsep[demo]"'
        )


def make_console() -> Any:
    """A rich console that prints text as it is."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(markup=False, highlight=False, width=width)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    failed: Sequence[bool] | None = None,
) -> None:
    """Print a table: ``text_columns`` flush left, the others flush right, and the rows that ``failed`` in red."""
    if importlib.util.find_spec("rich") is None:
        _print_plain_table(title, columns, rows, text_columns)
        return
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns else "right", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*row, style="red" if failed is not None and failed[index] else None)
    make_console().print(table)


def _print_plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:text_columns], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[text_columns:], widths[text_columns:], strict=True)]
        print("  ".join(cells).rstrip())
    print()


def machine() -> dict[str, Any]:
    """What the numbers of this run depend on."""
    info = backend_info()
    return {
        "cpu": _cpu_name(),
        "isa": info["isa"],
        "threads": info["threads"],
        "python": platform.python_version(),
        "torch": info["torch_version"],
        "fusedsep": info["version"],
    }


def machine_line(facts: Mapping[str, Any], *, with_peers: bool = False) -> str:
    """One line of what :func:`machine` returned; ``with_peers`` also the versions in ``facts["peers"]``, if any."""
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    versions = {"torch": facts["torch"], "fusedsep": facts["fusedsep"]}
    if with_peers:
        versions |= facts.get("peers", {})
    return ", ".join(
        [facts["cpu"], facts["isa"], threads, *(f"{name} {version}" for name, version in versions.items())]
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Gives a function to call before each of ``total`` steps with what it is: a bar that vanishes at the end.

    Nothing is drawn unless stderr is a terminal and rich is installed, and nothing while a step runs: a thread that
    redraws would be timed too.
    """
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        task = bars.add_task("", total=total, completed=-1)

        def begin(what: str) -> None:
            bars.update(task, advance=1, description=what, refresh=True)

        yield begin


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
