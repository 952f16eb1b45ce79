# SPDX-License-Identifier: BSD-3-Clause
"""``fusedsep bench`` against other engines: what is timed was right first, and what is not timed is named."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import fusedsep
from fusedsep import reference
from fusedsep.cli import _peers, main

SMALL = ["bench", "--width", "0.25", "--resolution", "32", "--repeats", "1"]


def right(module, x):
    return lambda: module(x)


def wrong(module, x):
    return lambda: module(x) * 1.01


def broken(module, x):
    raise RuntimeError("no such operator\nand more")


def bench(monkeypatch, tmp_path, engines, *arguments):
    monkeypatch.setattr(_peers, "PEERS", engines)
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--peers", "all", "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())["results"]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_right_engines_are_timed_and_others_are_named(threads, monkeypatch, tmp_path, capsys):
    engines = {"good": right, "bad": wrong, "gone": broken}
    results = bench(monkeypatch, tmp_path, engines, "--threads", threads)
    printed = capsys.readouterr().out
    assert len(results) == 10
    for result in results:
        assert list(result["times"]) == ["eager nchw", "eager channels_last", "fused", "frozen", "good"]
        assert result["left_out"]["gone"] == "RuntimeError: no such operator"
        assert result["left_out"]["bad"].startswith("error ")
        medians = {engine: times["median_ms"] for engine, times in result["times"].items()}
        ours = min(medians.pop("fused"), medians.pop("frozen"))
        assert result["speedup"] == pytest.approx(min(medians.values()) / ours)
    assert "good" in printed
    assert printed.count("not timed: gone: RuntimeError: no such operator\n") == 1
    assert "not timed: bad: error " in printed


def test_engines_that_are_not_installed_are_named(monkeypatch, tmp_path, capsys):
    import_module = importlib.import_module

    def import_but(name, *arguments):
        if name in ("onnx", "onnxruntime", "openvino"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", import_but)
    assert main(SMALL) == 0
    printed = capsys.readouterr().out
    assert "not timed: onnxruntime: onnxruntime is not installed\n" in printed
    assert "not timed: openvino: openvino is not installed\n" in printed
    assert "compile" not in printed


def test_gflops_are_those_of_the_faster_of_ours(monkeypatch, tmp_path):
    *_, result = bench(monkeypatch, tmp_path, {})
    ours = min(result["times"][engine]["median_ms"] for engine in ("fused", "frozen"))
    mult_adds = fusedsep.complexity(reference.MobileNetV1(width_multiplier=0.25), 32).mult_adds
    assert result["gflops"] == pytest.approx(2e-6 * mult_adds / ours)


def test_compile_gives_the_answer_of_the_model():
    module = reference.DepthwiseSeparableBlock(4, 6).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        call, answer = _peers.make_call("compile", module, x)
        torch.testing.assert_close(answer, module(x))
        torch.testing.assert_close(call(), answer)
