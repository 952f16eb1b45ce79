# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks can be collected, check what they time, and their results become the README's tables."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedsep

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
README = "# Title\n\n<!-- blocks:begin -->\nold\n<!-- blocks:end -->\n\nafter\n"


@pytest.fixture
def script(monkeypatch):
    """A function that imports a module of the benchmarks, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def times(median):
    return {"median_ms": median, "spread_ms": median / 50, "min_ms": median}


def document():
    medians = {
        "eager NCHW": 4.0,
        "eager channels_last": 3.0,
        "fused NCHW": 2.5,
        "fused channels_last": 2.0,
        "frozen NCHW": 1.5,
        "frozen channels_last": 1.9,
    }
    result = {
        "network": "Net",
        "name": "8 -> 16, 7x7",
        "gflop": 0.09,
        "times": {k: times(v) for k, v in medians.items()},
    }
    machine = {
        "cpu": "A CPU",
        "isa": "avx2",
        "threads": 1,
        "torch": "2.13.0",
        "fusedsep": "0.1.0",
        "sgemm_gflops": 80.0,
    }
    other = {**result, "network": "Other"}
    return {"subject": "blocks", "machine": machine, "settings": {"batch": 1, "repeats": 9}, "results": [result, other]}


@pytest.fixture
def files(tmp_path):
    """A README with markers, and results to put there."""
    readme, results = tmp_path / "README.md", tmp_path / "blocks.json"
    readme.write_text(README)
    results.write_text(json.dumps(document()))
    return readme, results


def run_from_elsewhere(folder, *arguments):
    """Run Python outside of the repository, whose ``fusedsep`` folder would hide an installed package."""
    path = os.pathsep.join(filter(None, [str(Path(fusedsep.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )


def test_the_nine_blocks_of_mobilenet(script):
    shapes = script("shapes")
    blocks = [shape[1:5] for shape in shapes.mobilenet_v1(1.0, 224)]
    assert blocks == [
        (32, 64, 112, 1),
        (64, 128, 112, 2),
        (128, 128, 56, 1),
        (128, 256, 56, 2),
        (256, 256, 28, 1),
        (256, 512, 28, 2),
        (512, 512, 14, 1),
        (512, 1024, 14, 2),
        (1024, 1024, 7, 1),
    ]
    ids = [shape.test_id for shape in shapes.BLOCKS]
    assert len(set(ids)) == len(ids) == 34


def test_every_benchmark_is_collected(tmp_path, script):
    shapes = script("shapes")
    done = run_from_elsewhere(tmp_path, "-m", "pytest", BENCHMARKS, "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    variants = 8  # four engines without torch.compile, two formats
    assert f"{variants * (len(shapes.BLOCKS) + len(shapes.NETWORKS))} tests collected" in done.stdout


def test_variants_compute_the_block(script):
    subjects, shapes = script("subjects"), script("shapes")
    subject = subjects.block(shapes.Shape("net", 9, 17, 7, 2, "hardswish", "none", depthwise_norm=False))
    assert subject.gflop == pytest.approx(2e-9 * 4 * 4 * 9 * (9 + 17))
    with torch.inference_mode():
        expected = subject.module(subject.x)
        for variant in subjects.variants():
            torch.testing.assert_close(subject.call(variant)(), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_answer_is_not_timed(script, monkeypatch):
    subjects, shapes = script("subjects"), script("shapes")
    subject = subjects.block(shapes.Shape("net", 8, 8, 5))

    def almost(module):
        wrong = copy.deepcopy(module)
        wrong.pw.weight.data *= 1.0001
        return wrong

    monkeypatch.setitem(subjects.ENGINES, "fused", almost)
    with pytest.raises(RuntimeError, match="fused NCHW gives a wrong answer for net 8 -> 8, 5x5: error"):
        subject.call(subjects.Variant("fused", "NCHW"))


def test_compare_writes_what_report_reads(script, monkeypatch, tmp_path, capsys):
    compare, report, shapes = script("compare"), script("report"), script("shapes")
    monkeypatch.setattr(shapes, "BLOCKS", [shapes.Shape("net", 8, 8, 5)])
    output = tmp_path / "blocks.json"
    assert compare.main(["blocks", "--repeats", "3", "--isa", "portable", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["machine"]["isa"] == "portable"
    assert written["machine"]["threads"] == 1
    assert written["machine"]["sgemm_gflops"] > 0
    assert "frozen channels_last" in capsys.readouterr().out
    assert "| 8 -> 8, 5x5 |" in report.render(written)


def test_compare_names_a_wrong_isa(script):
    with pytest.raises(SystemExit, match=r"compare\.py: .*'sse9'"):
        script("compare").main(["blocks", "--isa", "sse9"])


def test_report_fills_the_markers(script, files):
    readme, results = files
    assert script("report").main([str(readme), str(results)]) == 0
    text = readme.read_text()
    head, _, tail = text.partition("<!-- blocks:end -->")
    assert "old" not in head
    assert head.startswith("# Title\n\n<!-- blocks:begin -->\n\n**Net** on A CPU, avx2, 1 thread, torch 2.13.0")
    header = "|  | eager | fused | frozen | speed, fused | speed, frozen | GFLOP/s | of sgemm |"
    row = "4.00 · 3.00 | 2.50 · 2.00 | 1.50 · 1.90 | 1.50x | 2.00x | 60 | 75% |"
    assert head.count(header) == 2
    assert f"| 8 -> 16, 7x7 | {row}" in head
    assert f"| Other: 8 -> 16, 7x7 | {row}" in head.partition("<details>")[2]
    assert "of 9 calls in turns; half of the quartile range is mostly 2% of it and 2% at worst" in head
    assert tail == README.partition("<!-- blocks:end -->")[2]


def test_report_check(script, files, capsys):
    report, (readme, results) = script("report"), files
    arguments = [str(readme), str(results)]
    assert report.main([*arguments, "--check"]) == 1
    assert "README.md does not show these results" in capsys.readouterr().err
    assert readme.read_text() == README
    report.main(arguments)
    assert report.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    "text", ["", "<!-- blocks:begin -->", "<!-- blocks:end --> <!-- blocks:begin -->", README + "<!-- blocks:end -->"]
)
def test_report_wants_markers(script, files, text):
    readme, results = files
    readme.write_text(text)
    with pytest.raises(
        ValueError, match="must hold <!-- blocks:begin --> and behind it <!-- blocks:end -->, once each"
    ):
        script("report").main([str(readme), str(results)])
    assert readme.read_text() == text


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_picture(script, files, tmp_path, suffix, magic):
    path, again = tmp_path / f"blocks{suffix}", tmp_path / f"again{suffix}"
    for output in (path, again):
        assert script("picture").main([str(files[1]), str(output)]) == 0
    assert path.read_bytes().startswith(magic)
    assert path.read_bytes() == again.read_bytes()
