# SPDX-License-Identifier: BSD-3-Clause
"""The loop of multiply-adds does what it counts, and what is measured of the machine can be used."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fusedsep import _C
from fusedsep.cli import _limits
from fusedsep.cli._limits import Level, Limits


def test_every_multiply_add_is_done(isa):
    rounds = 7
    flop, total = _C.multiply_adds(rounds, 1.0, 3.0, isa)
    one_more, next_total = _C.multiply_adds(rounds + 1, 1.0, 3.0, isa)
    accumulated = flop / (2 * rounds)  # numbers that each round adds 3 to
    assert accumulated == int(accumulated) > 0
    assert next_total - total == 3 * accumulated
    assert one_more / (rounds + 1) == flop / rounds
    assert _C.multiply_adds(1000, 0.5, 1.0, isa)[1] == 2 * accumulated  # where x = x / 2 + 1 ends


def test_the_accumulators_are_not_the_same_number(isa):
    """Otherwise a compiler would need to compute one of them only."""
    flop, total = _C.multiply_adds(1, 1.0, 0.0, isa)
    lanes_and_accumulators = flop / 2
    assert total > 0
    accumulators = 1 + 2 * total / lanes_and_accumulators  # 0 + 1 + ... + (n - 1) of each lane
    assert accumulators == int(accumulators) > 1


@pytest.mark.parametrize(
    ("rounds", "isa", "message"), [(-1, "portable", "rounds must be"), (1, "sse9", "isa must be one of .* got 'sse9'")]
)
def test_the_loop_names_wrong_arguments(rounds, isa, message):
    with pytest.raises(ValueError, match=message):
        _C.multiply_adds(rounds, 1.0, 1.0, isa)


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_of_this_machine(monkeypatch, threads):
    monkeypatch.setattr(_limits, "_REPEATS", 2)
    torch.set_num_threads(threads)
    limits = _limits.measure_limits()
    assert limits.threads == threads
    assert limits.isa == _C.active_isa()
    assert [level.name for level in limits.levels] == ["L2", "L3", "memory"]
    numbers = [limits.fma_gflops, limits.mm_gflops, *(level.gbs for level in limits.levels)]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert json.loads(json.dumps(limits.as_json(), allow_nan=False))["levels"][-1]["capacity"] is None
    assert f"{limits.fma_gflops:.0f} GFLOP/s" in str(limits)


def test_the_level_that_holds_a_map():
    levels = (Level("L2", 1000, 90.0), Level("L3", 5000, 50.0), Level("memory", math.inf, 20.0))
    limits = Limits(1, "avx2", 100.0, 90.0, levels)
    assert [limits.level_for(size).name for size in (10, 1000, 1001, 5001)] == ["L2", "L2", "L3", "memory"]


def test_sizes_of_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(_limits, "_CACHES", tmp_path)
    assert _limits.cache_bytes("L2") == 256 * 1024
    (tmp_path / "index2").mkdir()
    (tmp_path / "index2" / "size").write_text("2048K\n")
    assert _limits.cache_bytes("L2") == 2048 * 1024
