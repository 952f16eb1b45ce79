# SPDX-License-Identifier: BSD-3-Clause
"""The demo on the terminal: progress bars, the table of photographs, the summary. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pretrained.download import Package, Progress
from ..pretrained.photos import Photo
from ._demo_results import ENGINES, Answer, class_name
from ._demo_training import ACCURACY_TOLERANCE, FIRST_STEPS, LOSS_TOLERANCE, TWINS, Twin

_NUMBERS_WIDTH = 48  # characters of the five columns of numbers and of the gaps between all columns


@contextmanager
def fetching(console: Console) -> Iterator[Callable[[Package], Progress]]:
    """Gives a function that makes the progress callback of a package; its bar appears once something is awaited."""
    columns = (
        progress.TextColumn("fetching {task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns, console=console) as bars:

        def progress_of(package: Package) -> Progress:
            task: progress.TaskID | None = None

            def received(size: int) -> None:
                nonlocal task
                if task is None:
                    task = bars.add_task(package.content, total=package.size)
                bars.update(task, completed=size)

            return received

        yield progress_of


def with_progress(photos: Sequence[Photo], what: str, console: Console) -> Iterator[Photo]:
    """``photos`` behind a bar that vanishes at the end."""
    yield from progress.track(photos, what, console=console, transient=True)


def print_answers(answers: Sequence[Answer], names: Sequence[str], console: Console) -> None:
    """One row a photograph."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    text_width = max(8, (console.width - _NUMBERS_WIDTH) // 3)
    for header in ("photo", "top answer", "label"):
        table.add_column(header, no_wrap=True, overflow="ellipsis", max_width=text_width)
    for header in ("prob.", "largest\ndifference", *(f"{engine}\nms" for engine in ENGINES)):
        table.add_column(header, justify="right", min_width=max(map(len, header.split())))
    for answer in answers:
        table.add_row(
            Text(answer.photo.name),
            Text(class_name(answer.classes[0], names), style="bold"),
            _agreement(answer, names),
            f"{answer.probability:.3f}",
            f"{answer.difference:.1e}",
            *(f"{answer.times[engine].median:.1f}" for engine in ENGINES),
        )
    console.print(table)


def print_summary(results: dict[str, Any], console: Console) -> None:
    if results["labelled"]:
        console.print(
            f"agreement with the labels: top-1 {results['top1']} of {results['labelled']}, "
            f"top-5 {results['top5']} of {results['labelled']}"
        )
    medians, speedup = results["median_ms"], results["speedup"]
    console.print(
        f"time of a photograph: unfused {medians['unfused']:.1f} ms, fused {medians['fused']:.1f} ms "
        f"({speedup['fused']:.2f}x), frozen {medians['frozen']:.1f} ms ({speedup['frozen']:.2f}x)"
    )
    errors = results["largest_error"]
    console.print(
        f"largest error of a logit against float64: unfused {errors['unfused']:.1e}, fused {errors['fused']:.1e}, "
        f"frozen {errors['frozen']:.1e}; at most {results['allowed_error']:.1e} (3 x unfused + 4 ulp) is allowed: ",
        _verdict(results["accurate"]),
        sep="",
    )


@contextmanager
def training(steps: int, console: Console) -> Iterator[Callable[[dict[str, Twin]], None]]:
    """Gives a function to call after every step; its bar shows the losses and the last test accuracies."""
    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    with progress.Progress(*columns, console=console) as bars:
        task = bars.add_task("", total=steps)

        def after_step(twins: dict[str, Twin]) -> None:
            states = [
                f"{name}: loss {twin.losses[-1]:.3f}" + (f", {twin.accuracies[-1]:.1%}" if twin.accuracies else "")
                for name, twin in twins.items()
            ]
            bars.update(task, advance=1, description="   ".join(states))

        yield after_step


def print_training(results: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for header in ("test accuracy", "step, median ms", "saved for backward, MiB"):
        table.add_column(header, justify="right")
    for name in TWINS:
        table.add_row(
            name,
            f"{results['accuracy'][name]:.1%}",
            f"{results['median_step_ms'][name]:.2f}",
            f"{results['saved_bytes'][name] / 2**20:.2f}",
        )
    console.print(table)
    saved = results["saved_bytes"]
    console.print(
        f"fused: {results['speedup']:.2f}x the speed, {saved['fused'] / saved['unfused']:.0%} of the saved bytes; "
        f"{results['steps']} steps of both, one after the other"
    )
    console.print(
        f"largest difference of the first {FIRST_STEPS} losses: {results['largest_difference_of_first_losses']:.1e}, "
        f"less than {LOSS_TOLERANCE:.0e} is allowed: ",
        _verdict(results["same_losses"]),
        sep="",
    )
    console.print(
        f"difference of the test accuracies: {100 * results['difference_of_accuracies']:.1f} points, "
        f"less than {100 * ACCURACY_TOLERANCE:.0f} is allowed: ",
        _verdict(results["same_accuracy"]),
        sep="",
    )


def _verdict(passed: bool) -> Text:
    return Text("pass", style="green") if passed else Text("FAIL", style="bold red")


def _agreement(answer: Answer, names: Sequence[str]) -> Text:
    if answer.photo.label is None:
        return Text("not known", style="dim")
    if answer.rank == 1:
        return Text("agrees", style="green")
    label = class_name(answer.photo.label, names)
    if answer.rank is None:
        return Text(f"{label}, not in the top 5", style="red")
    return Text(f"{label}, answer {answer.rank}", style="yellow")
