# SPDX-License-Identifier: BSD-3-Clause
"""``fusedsep bench --train``: steps that were right first, memory counted from outside, passes and their bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch
import torch.nn as nn

import fusedsep
from fusedsep import reference
from fusedsep.cli import _limits, _passes, _training_memory, _training_page, _training_steps, main
from fusedsep.cli._cases import Case
from fusedsep.cli._training_steps import Trainee, compare_losses, first_losses, make_subject

LIMITS = _limits.Limits(1, "portable", 100.0, 80.0, (_limits.Level("memory", math.inf, 20.0),))
SMALL = "--width", "0.25", "--resolution", "64", "--threads", "1", "--repeats", "2"


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(
        "fusedsep.cli._cases.measure_limits",
        lambda: dataclasses.replace(LIMITS, threads=torch.get_num_threads()),
    )


def bench(tmp_path, *arguments):
    """Run the command; its exit status, the JSON and the page."""
    outputs = tmp_path / "train.json", tmp_path / "train.html"
    status = main(["bench", "--train", *SMALL, "--json", str(outputs[0]), "--html", str(outputs[1]), *arguments])
    return status, json.loads(outputs[0].read_text()), outputs[1].read_text(encoding="utf-8")


def test_a_training_bench(tmp_path, capsys):
    status, document, page = bench(tmp_path)
    assert status == 0
    (result,) = document["results"]
    assert result["ok"] is True
    assert result["batch"] == 8
    assert list(result["times"]) == ["eager nchw", "eager channels_last", "fused nchw", "fused channels_last"]
    for phases in result["times"].values():
        whole = zip(*(phases[phase]["samples_ms"] for phase in _training_steps.PHASES), strict=True)
        assert phases["step"]["samples_ms"] == pytest.approx([sum(step) for step in whole])
    steps = {engine: phases["step"]["median_ms"] for engine, phases in result["times"].items()}
    ours = min(steps[engine] for engine in _training_steps.OURS)
    theirs = min(steps[engine] for engine in steps if engine not in _training_steps.OURS)
    assert result["speedup"] == pytest.approx(theirs / ours)
    for memory_format in ("nchw", "channels_last"):
        assert result["saved_bytes"][f"fused {memory_format}"] <= 0.4 * result["saved_bytes"][f"eager {memory_format}"]
    printed = capsys.readouterr().out
    assert "MobileNetV1 0.25-64, batch 8" in printed
    assert "losses pass" in printed
    flop = 6 * fusedsep.complexity(reference.MobileNetV1(width_multiplier=0.25), (8, 3, 64, 64)).mult_adds
    assert result["share_of_peak"] == pytest.approx(flop / (ours * 1e-3) / 100e9)
    assert "not timed: compile: takes minutes" in printed
    assert "pointwise backward" in printed
    for text in ("Time per phase", "Saved for the backward", "The passes of the training operator"):
        assert text in page
    assert "<script" not in page
    assert "nan" not in page


def test_lists_of_training_cases(tmp_path, monkeypatch):
    monkeypatch.setattr("fusedsep.cli._training_bench.resident_peak", lambda case, engine: None)
    _, document, page = bench(tmp_path, "--batch", "4,8", "--threads", "2,1")
    cases = [(result["threads"], result["batch"]) for result in document["results"]]
    assert cases == [(2, 4), (2, 8), (1, 4), (1, 8)]
    assert "MobileNetV1 0.25-64, batch 4, 2 threads" in page
    assert "Resident memory" not in page


def wrong_output(module):
    module = fusedsep.fuse(module)
    with torch.no_grad():
        module.linear.bias[0] += 100
    return module


def wrong_gradients(module):
    module = fusedsep.fuse(module)
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: 1.1 * gradient)
    return module


@pytest.mark.parametrize("wrong", [wrong_output, wrong_gradients])
def test_wrong_losses_fail(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setitem(_training_steps.ENGINES, "fused nchw", (wrong, torch.contiguous_format))
    monkeypatch.setattr("fusedsep.cli._training_bench.resident_peak", lambda case, engine: None)
    status, document, _ = bench(tmp_path)
    assert status == 1
    assert document["results"][0]["ok"] is False
    assert "losses FAIL" in capsys.readouterr().out


def test_other_engines_that_fail_or_differ_are_named(tmp_path, monkeypatch, capsys):
    def broken(module):
        raise RuntimeError("no compiler\nat all")

    def wrong(module):
        nn.init.constant_(module.linear.bias, 0)
        with torch.no_grad():
            module.linear.bias[0] += 100
        return module

    monkeypatch.setattr("fusedsep.cli._training_bench.resident_peak", lambda case, engine: None)
    monkeypatch.setitem(_training_steps.ENGINES, "compile", (broken, torch.channels_last))
    status, document, page = bench(tmp_path, "--peers", "compile")
    assert status == 0
    (result,) = document["results"]
    assert "compile" not in result["times"]
    assert "not timed: compile: RuntimeError: no compiler\n" in capsys.readouterr().out
    assert "Not timed: compile: RuntimeError: no compiler" in page

    monkeypatch.setitem(_training_steps.ENGINES, "compile", (wrong, torch.channels_last))
    monkeypatch.setitem(_training_steps.ENGINES, "eager channels_last", (wrong, torch.channels_last))
    status, document, page = bench(tmp_path, "--peers", "compile")
    assert status == 0
    (result,) = document["results"]
    # Eager torch is what others are measured by, however it computes.
    assert set(result["times"]) == {"eager nchw", "eager channels_last", "fused nchw", "fused channels_last"}
    printed = capsys.readouterr().out
    assert "not timed: compile: losses are off by" in printed
    assert "timed all the same: eager channels_last: losses are off by" in printed
    assert "Timed all the same: eager channels_last: losses are off by" in page


def test_compile_trains_the_same_network():
    _, network, images, labels = make_subject(Case(None, 1, 4, 0.25, 64))
    network = nn.Sequential(network.first_conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    labels = labels % 3
    torchs = first_losses(Trainee(network, images, labels, "eager channels_last"))
    torch.testing.assert_close(first_losses(Trainee(network, images, labels, "compile")), torchs, rtol=1e-4, atol=1e-4)


def test_losses_are_judged_against_float64():
    exact = torch.tensor([3.0, 3.0, 2.5], dtype=torch.double)  # moves by 0.5, of which 2 % are 0.01
    assert compare_losses(exact + 0.0109, exact, exact).ok
    assert not compare_losses(exact + 0.0111, exact, exact).ok
    assert compare_losses(exact + 0.04, exact + 0.01, exact).ok
    assert not compare_losses(exact + 0.042, exact + 0.01, exact).ok
    assert not compare_losses(exact * math.nan, exact, exact).ok


@pytest.fixture
def users_module(monkeypatch, tmp_path):
    text = (
        "import torch.nn as nn\n"
        "from fusedsep.reference import DepthwiseSeparableBlock\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(5, 8, 3), DepthwiseSeparableBlock(8, 12, 2))\n"
    )
    (tmp_path / "my_own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_users_network_whose_output_are_maps(users_module, tmp_path, capsys):
    status, document, _ = bench(tmp_path, "--model", "my_own:network", "--resolution", "20")
    assert status == 0
    (result,) = document["results"]
    assert result["name"] == "my_own:network"
    if sys.platform == "linux":
        assert all(size > 0 for size in result["resident_bytes"].values())
    assert main(["bench", "--train", "--model", "my_own:network", "--resolution", "1", "--threads", "1"]) == 2
    assert (
        "fusedsep bench: --model: my_own:network does not train on 1x1 images: RuntimeError" in capsys.readouterr().err
    )


# --------------------------------------------------------------------------------------------------------------- memory


def test_saved_bytes_count_storages_once():
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(30, 10, requires_grad=True)

    def forward():
        y = x @ weight
        return y * y + y.view(-1)[:300].view(30, 10).exp()  # keeps x, weight, y (twice) and the exponential

    assert _training_memory.saved_bytes(forward, [weight]) == 4 * (300 + 300 + 300)
    assert _training_memory.saved_bytes(forward, [weight, x]) == 4 * (300 + 300)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory: only Linux tells that of a process")
def test_the_resident_peak_is_what_a_step_takes(tmp_path, monkeypatch):
    """A network that saves 64 MiB more is seen to take about as much more."""
    text = (
        "import torch, torch.nn as nn\n"
        "class Exponentials(nn.Module):\n"
        "    def __init__(self, count):\n"
        "        super().__init__()\n"
        "        self.scale, self.count = nn.Parameter(torch.ones(())), count\n"
        "    def forward(self, x):\n"
        "        x = x.repeat(1, 64, 8, 8) * self.scale\n"
        "        for _ in range(self.count):\n"
        "            x = torch.sigmoid(x)\n"
        "        return x\n"
        "def few(): return Exponentials(2)\n"
        "def many(): return Exponentials(6)\n"
    )
    (tmp_path / "sizes.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    few, many = (  # maps of 5 * 192 * 128 * 128 floats: 60 MiB
        _training_memory.resident_peak(Case(f"sizes:{name}", 1, 5, 1.0, 16), "eager nchw") for name in ("few", "many")
    )
    assert (many - few) / (4 * 5 * 192 * 128 * 128 * 4) == pytest.approx(1.0, abs=0.15)


def test_no_peak_where_the_process_fails():
    assert _training_memory.resident_peak(Case("no_such_module:f", 1, 1, 1.0, 8), "eager nchw") is None


def test_no_peak_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(_training_memory.Path, "exists", lambda path: False)
    monkeypatch.setattr(_training_memory.subprocess, "run", lambda *_, **__: pytest.fail("asked all the same"))
    assert _training_memory.resident_peak(Case(None, 1, 1, 0.25, 32), "eager nchw") is None


# --------------------------------------------------------------------------------------------------------------- passes


def test_work_of_the_passes():
    shape = _passes.Shape(x=400, depthwise=100, product=300, dw_weight=4 * 9, pw_weight=4 * 12)
    bytes_and_work = {one.name: (one.elements(shape), one.mult_adds(shape)) for one in _passes.PASSES}
    pixels = 25  # of each of four channels
    assert bytes_and_work == {
        "depthwise statistics": (400, 9 * 100),
        "products": (400 + 300 + 48, 9 * 100 + 48 * pixels),
        "normalize": (600, 300),
        "reduce": (600, 600),
        "pointwise backward": (600 + 400 + 100 + 96, 9 * 100 + 2 * 48 * pixels),
        "depthwise backward": (100 + 800, 3 * 9 * 100),
    }


def test_every_pass_of_every_block_is_timed():
    network = reference.MobileNetV1(width_multiplier=0.25).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measured = _passes.measure_passes(network, torch.randn(2, 3, 64, 64), 1, LIMITS)
    passes, whole = measured["passes"], measured["whole"]
    assert [one["name"] for one in passes] == [one.name for one in _passes.PASSES]
    assert all(0 < one["ms"] < math.inf for one in passes)
    complexity = fusedsep.complexity(network, (2, 3, 64, 64))
    forward = sum(pair.mult_adds for pair in complexity.separable)
    assert passes[1]["gflop"] == pytest.approx(2e-9 * forward)
    assert whole["gflop"] == pytest.approx(3 * 2e-9 * forward)
    assert whole["share_of_peak"] == pytest.approx(whole["gflop"] / (whole["ms"] * 1e-3) / 100)
    sizes = sum(one["moved_bytes"] for one in passes)
    assert sum(one["moved_ms"] for one in passes) == pytest.approx(sizes / 20e9 * 1e3)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_a_network_without_blocks_has_no_passes():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    measured = _passes.measure_passes(network, torch.randn(2, 3, 8, 8), 1, LIMITS)
    assert measured == {"whole": {"ms": 0.0, "gflop": 0.0}, "passes": []}
    assert "No 3x3 depthwise-separable blocks" in _training_page._passes({"blocks": measured}, {})
