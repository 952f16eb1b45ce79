# SPDX-License-Identifier: BSD-3-Clause
"""Options, the machine in header and JSON, and the one way in which a variant is timed."""

from __future__ import annotations

from typing import Any

import machine
import pytest
import torch
from subjects import Subject, Variant, variants

from fusedsep.cli import _output
from fusedsep.cli._arguments import positive_int
from fusedsep.cli._peers import Unavailable


def pytest_addoption(parser):
    group = parser.getgroup("fusedsep")
    group.addoption("--threads", type=positive_int, default=1, metavar="N", help="torch's threads (default: 1)")
    group.addoption(
        "--with-compile", action="store_true", help="time torch.compile too, which takes seconds to compile each shape"
    )


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


def pytest_report_header():
    return f"machine: {_output.machine_line(_output.machine())}"


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fusedsep"] = machine.machine()


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        chosen = variants(metafunc.module.ENGINES, metafunc.config.getoption("--with-compile"))
        metafunc.parametrize("variant", chosen, ids="-".join)


@pytest.fixture
def time_variant(benchmark, variant: Variant):
    """A function that checks and times a subject as ``variant``."""

    def time(subject: Subject) -> None:
        try:
            call = subject.call(variant)
        except Unavailable as reason:
            pytest.skip(f"{variant.engine}: {reason}")
        benchmark.group = f"{subject.network}: {subject.name}"
        facts: dict[str, Any] = machine.machine()
        benchmark.extra_info.update(variant._asdict(), isa=facts["isa"], threads=facts["threads"], gflop=subject.gflop)
        with torch.inference_mode(subject.inference):
            benchmark(call)
        if benchmark.stats is not None:  # with --benchmark-disable there is none
            gflops = subject.gflop / benchmark.stats.stats.median
            benchmark.extra_info.update(gflops=gflops, share_of_peak=gflops / facts["fma_gflops"])

    return time
