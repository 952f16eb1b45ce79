# SPDX-License-Identifier: BSD-3-Clause
"""How the demo shows itself: progress bars, table, summary, picture; needs rich and matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.progress
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pretrained.download import Package, Progress
from ._demo_results import ENGINES, Answer

@contextmanager
def fetching(console: Console) -> Iterator[Callable[[Package], Progress]]:
    """Gives a function that makes the progress callback of one package; its bar appears when bytes are awaited."""
    columns = (
        rich.progress.TextColumn("fetching {task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bars:

        def progress_of(package: Package) -> Progress:
            tasks: list[rich.progress.TaskID] = []

            def progress(received: int) -> None:
                if not tasks:
                    tasks.append(bars.add_task(package.content, total=package.size))
                bars.update(tasks[0], completed=received)

            return progress

        yield progress_of


def print_answers(console: Console, answers: Sequence[Answer], names: Sequence[str]) -> None:
    """One row a photograph."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("photo", "top answer", "label"):
        table.add_column(header, no_wrap=True, overflow="ellipsis")
    for header in ("probability", "|difference|", *(f"{engine} ms" for engine in ENGINES)):
        table.add_column(header, justify="right")
    for answer in answers:
        table.add_row(
            Text(answer.photo.name),
            Text(class_name(answer.classes[0], names), style="bold"),
            agreement(answer),
            f"{answer.probability:.3f}",
            f"{answer.difference:.1e}",
            *(f"{answer.times[engine].median:.1f}" for engine in ENGINES),
        )
    console.print(table)
