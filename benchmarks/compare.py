# SPDX-License-Identifier: BSD-3-Clause
"""Time blocks or whole networks with the variants taking turns, and write the numbers that README shows.

    python benchmarks/compare.py blocks
    python benchmarks/compare.py networks --threads 2 --isa avx2
    python benchmarks/compare.py peers --threads 2
    python benchmarks/compare.py training-blocks --batch 16

pytest-benchmark finishes one variant before it begins the next, so a change of clock or load between them looks like a
difference between them. Here each call of one variant is followed by one of the next.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machine
import shapes
import subjects
import torch
import training

import fusedsep
from fusedsep.cli._arguments import CommandError, output_file, positive_int
from fusedsep.cli._measure import Times, pause_between_engines, time_interleaved
from fusedsep.cli._output import machine_line, write_json
from fusedsep.cli._peers import Unavailable


class Plan(NamedTuple):
    """What one word of the command line measures, and what ``--repeats`` and ``--batch`` are if they are not given."""

    make: Callable[..., subjects.Subject]  # from an entry of `entries` and a batch
    entries: str  # name of the list in shapes.py
    repeats: int
    batch: int | None  # None: each subject its own, which its name tells
    rehearsed: bool = False  # see `measure`

    def subjects(self, batch: int | None) -> Sequence[Callable[[], subjects.Subject]]:
        return [functools.partial(self.make, entry, batch) for entry in getattr(shapes, self.entries)]


def _with_batch(make: Callable[..., subjects.Subject]) -> Callable[..., subjects.Subject]:
    """For entries whose last number is their batch."""
    return lambda entry, batch: make(*entry[:-1], batch or entry[-1])


PLANS = {
    "blocks": Plan(subjects.block, "BLOCKS", 100, 1),
    "networks": Plan(lambda network, batch: subjects.network(*network, batch), "NETWORKS", 100, 1),
    "other-networks": Plan(
        lambda network, batch: subjects.other_network(*network, batch), "OTHER_WHOLE_NETWORKS", 50, 1
    ),
    "peers": Plan(_with_batch(subjects.peer_network), "PEER_NETWORKS", 30, None, rehearsed=True),
    "training-blocks": Plan(training.block, "BLOCKS", 20, 8),
    "training-networks": Plan(_with_batch(training.network), "TRAINING_NETWORKS", 20, None),
}
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.isa is not None:
            fusedsep.use_isa(arguments.isa)
        facts = machine.machine()
    except ValueError as error:  # no such ISA here
        sys.exit(f"compare.py: {error}")
    print(machine_line(facts, with_peers=True))
    plan = PLANS[arguments.subject]
    repeats, batch = arguments.repeats or plan.repeats, arguments.batch or plan.batch
    results, makers, begin = [], plan.subjects(batch), time.monotonic()
    for number, make in enumerate(makers, 1):
        results.append(measure(make(), repeats, arguments.with_compile, plan.rehearsed))
        print(f"  {number} of {len(makers)} after {time.monotonic() - begin:.0f} s", flush=True)
    document = {
        "subject": arguments.subject,
        "machine": facts,
        "settings": {"batch": batch, "repeats": repeats},
        "results": results,
    }
    try:
        write_json(arguments.output or _default_output(arguments.subject, facts), document)
    except CommandError as error:
        sys.exit(f"compare.py: {error}")
    return 0


def measure(subject: subjects.Subject, repeats: int, with_compile: bool, rehearsed: bool = False) -> dict[str, Any]:
    """Check and time every variant; the entry of ``subject`` in the JSON. What is not installed is named.

    Args:
        rehearsed: each timed call comes after a pause and untimed ones, as engines with threads of their own need it.
    """
    print(f"\n{subject.network} {subject.name}")
    calls = {}
    for variant in subjects.variants(subject.engines, with_compile):
        try:
            calls[str(variant)] = subject.call(variant)
        except Unavailable as reason:
            print(f"  {variant}: not timed: {reason}")
    pause = pause_between_engines() if rehearsed else None
    times = time_interleaved(calls, repeats, inference=subject.inference, pause=pause)
    for variant, samples in times.items():
        print(f"  {variant:22} {samples.median:8.3f} ms ±{samples.spread:.3f}")
    result: dict[str, Any] = {
        "network": subject.network,
        "name": subject.name,
        "gflop": subject.gflop,
        "times": {variant: _summary(samples) for variant, samples in times.items()},
    }
    if isinstance(subject, training.TrainingSubject):
        result["saved_bytes"] = {engine: subject.saved_bytes(engine) for engine in ("eager", "fused")}
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("subject", choices=PLANS)
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--isa", metavar="NAME", help="of fusedsep alone, not of torch (default: the best here)")
    parser.add_argument(
        "--repeats", type=positive_int, metavar="N", help="timed calls (default: 100; peers: 30; training: 20)"
    )
    parser.add_argument("--batch", type=positive_int, metavar="N", help="images (default: 1; training: 8; or as named)")
    parser.add_argument("--with-compile", action="store_true", help="torch.compile too: seconds for each shape")
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="default: benchmarks/results/<subject>-<isa>.json, with the threads in the name if not 1",
    )
    return parser


def _default_output(subject: str, facts: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    threads = "" if facts["threads"] == 1 else f"-{facts['threads']}threads"
    return RESULTS / f"{subject}-{facts['isa']}{threads}.json"


def _summary(times: Times) -> dict[str, float]:
    summary = {"median_ms": times.median, "spread_ms": times.spread, "min_ms": min(times.samples)}
    return {name: round(value, 6) for name, value in summary.items()}  # whole nanoseconds


if __name__ == "__main__":
    sys.exit(main())
