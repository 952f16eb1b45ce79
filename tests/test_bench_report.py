# SPDX-License-Identifier: BSD-3-Clause
"""``fusedsep bench`` over lists of cases, its parts, and the page that it writes."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import sys

import pytest
import torch
import torch.nn as nn
from chain_layers import rows_of
from randomize import randomized
from test_gated_chains import EfficientNet
from test_linear_chains import ConvolutionBlock, LinearBlock
from test_whole_convolutions import Whole

import fusedsep
from fusedsep import reference
from fusedsep.cli import _inference, _inference_page, _limits, _output, _parts, _peers, _svg, main

LIMITS = _limits.Limits(
    1,
    "portable",
    100.0,
    80.0,
    (
        _limits.Level("L2", 2**20, 100.0),
        _limits.Level("L3", 2**25, 50.0),
        _limits.Level("memory", math.inf, 20.0),
    ),
)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(
        "fusedsep.cli._cases.measure_limits", lambda: dataclasses.replace(LIMITS, threads=torch.get_num_threads())
    )


def bench(tmp_path, *arguments):
    """Run the command; the JSON and the page."""
    outputs = tmp_path / "bench.json", tmp_path / "bench.html"
    command = ["bench", "--repeats", "2", "--peers", "none", "--json", str(outputs[0]), "--html", str(outputs[1])]
    assert main([*command, *arguments]) == 0
    return json.loads(outputs[0].read_text()), outputs[1].read_text(encoding="utf-8")


def test_lists_are_every_combination(tmp_path, capsys):
    document, page = bench(
        tmp_path, "--width", "0.25,0.5", "--resolution", "32,64", "--batch", "1,3", "--threads", "2,1"
    )
    cases = [(r["threads"], r["batch"], r["width"], r["resolution"]) for r in document["results"]]
    assert cases == [(t, n, w, r) for t in (2, 1) for n in (1, 3) for w in (0.25, 0.5) for r in (32, 64)]
    assert [limits["threads"] for limits in document["limits"]] == [2, 1]
    assert document["machine"]["threads"] == [2, 1]
    printed = capsys.readouterr().out
    assert printed.count("MobileNetV1 0.5-64 ") >= 4
    assert "2 threads, torch" in printed
    assert "1 thread, torch" in printed
    assert "MobileNetV1 0.5-64, batch 3, 2 threads" in page


def test_share_of_peak(tmp_path):
    document, _ = bench(tmp_path, "--width", "0.25", "--resolution", "32", "--no-blocks", "--threads", "1")
    (result,) = document["results"]
    ours = min(result["times"][engine]["median_ms"] for engine in ("fused", "frozen"))
    flop = 2 * fusedsep.complexity(reference.MobileNetV1(width_multiplier=0.25), 32).mult_adds
    assert result["share_of_peak"] == pytest.approx(flop / (ours * 1e-3) / 100e9)


def test_blocks_where_they_are_asked_for(tmp_path):
    small = "--width", "0.25", "--threads", "1"
    assert len(bench(tmp_path, *small, "--resolution", "32")[0]["results"]) == 10
    assert len(bench(tmp_path, *small, "--resolution", "32", "--no-blocks")[0]["results"]) == 1
    assert len(bench(tmp_path, *small, "--resolution", "32,48")[0]["results"]) == 2
    assert len(bench(tmp_path, *small, "--resolution", "32,48", "--blocks")[0]["results"]) == 20


# ---------------------------------------------------------------------------------------------------------------- parts


def test_the_parts_of_mobilenet_are_all_of_it():
    network = reference.MobileNetV1(width_multiplier=0.25).eval()
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    frozen = fusedsep.freeze(network)
    parts = _parts.parts_of(frozen, x)
    assert [part.kind for part in parts] == [_parts.WHOLE, *13 * [_parts.SEPARABLE], _parts.CLASSIFIER]
    assert parts[1].name == "1: 8 -> 16, 32x32"
    assert parts[2].name == "2: 16 -> 32, 32x32 /2"
    assert sum(part.mult_adds for part in parts) == fusedsep.complexity(network, (2, 3, 64, 64)).mult_adds
    site = parts[2]
    assert site.moved_bytes == 4 * (2 * 16 * 32 * 32 + 2 * 32 * 16 * 16 + 16 * 9 + 16 + 16 * 32 + 32)
    assert site.scratch_bytes == 4 * 2 * 16 * 16 * 16
    with torch.inference_mode():
        torch.testing.assert_close(parts[-1].call(), network(x), rtol=1e-4, atol=1e-4)


def test_the_parts_of_an_excited_network(chain_calls):
    network = randomized(EfficientNet()).eval()
    x = torch.randn(2, 3, 64, 64)
    parts = _parts.parts_of(fusedsep.freeze(network), x)
    block = [_parts.POINTWISE, _parts.DEPTHWISE, _parts.GATED]
    assert [part.kind for part in parts] == [_parts.WHOLE, *3 * block, _parts.POINTWISE, _parts.CLASSIFIER]
    assert sum(part.mult_adds for part in parts) == fusedsep.complexity(network, (2, 3, 64, 64)).mult_adds
    with torch.inference_mode():
        torch.testing.assert_close(parts[-1].call(), network(x), rtol=1e-4, atol=1e-4)
    assert len(chain_calls) == 1
    assert not {part.kind for part in parts} - _inference_page._KINDS.keys()


def test_the_parts_of_linear_layers():
    network, x = torch.nn.Sequential(LinearBlock(), ConvolutionBlock()).eval(), torch.randn(2, 12, 9, 8)
    parts = _parts.parts_of(fusedsep.freeze(network), x)
    assert [part.kind for part in parts] == 2 * [_parts.DEPTHWISE, _parts.POINTWISE, _parts.POINTWISE]
    assert sum(part.mult_adds for part in parts) == fusedsep.complexity(network, x.shape).mult_adds
    with torch.inference_mode():
        torch.testing.assert_close(parts[-1].call() + network[0](x), network(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_whole_convolutions_are_parts_that_run_as_in_their_chain(memory_format, chain_calls):
    network = randomized(Whole()).eval()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format)
    frozen = fusedsep.freeze(network)
    parts = _parts.parts_of(frozen, x)
    assert [part.kind for part in parts] == [*4 * [_parts.WHOLE], _parts.SEPARABLE, _parts.CLASSIFIER]
    assert sum(part.mult_adds for part in parts) == fusedsep.complexity(network, (2, 3, 64, 64)).mult_adds
    with torch.inference_mode():
        frozen(x)
        for part in parts[:4]:
            part.call()
    together, *alone = rows_of(chain_calls)
    assert [rows for (rows,) in alone] == together[:4]


def test_ends_run_in_our_kernels(chain_calls):
    network = reference.MobileNetV1(width_multiplier=0.25).eval()
    first, *_, last = _parts.parts_of(fusedsep.freeze(network), torch.randn(1, 3, 32, 32))
    with torch.inference_mode():
        first.call()
        last.call()
    assert len(chain_calls) == 2


def test_recording_leaves_nothing_behind(chain_calls):
    frozen = fusedsep.freeze(reference.MobileNetV1(width_multiplier=0.25).eval())
    x = torch.randn(1, 3, 32, 32)
    _parts.parts_of(frozen, x)
    assert not chain_calls
    with torch.inference_mode():
        frozen(x)
    assert len(chain_calls) == 1


def test_layers_that_are_no_parts_are_other_time():
    network = nn.Sequential(nn.Conv2d(3, 64, 7, padding=3), reference.DepthwiseSeparableBlock(64, 4)).eval()
    x = torch.randn(1, 3, 40, 40)
    measured = _parts.measure_parts(fusedsep.freeze(network), x, 3, LIMITS)
    (part,) = measured["parts"]
    assert part["kind"] == _parts.SEPARABLE
    assert measured["sum_ms"] == part["ms"] < measured["whole_ms"]
    assert measured["kinds_ms"][_parts.OTHER] == pytest.approx(measured["whole_ms"] - part["ms"])


def test_bounds_of_a_part():
    part = _parts.Part("0: a", _parts.SEPARABLE, 10**9, 2 * 2**20, 2**18, lambda: torch.zeros(1))
    row = _parts._row(part, _parts.Times((40.0,)), LIMITS)
    assert row["share_of_peak"] == pytest.approx(0.5)
    assert row["arithmetic_ms"] == pytest.approx(20.0)
    assert (row["level"], row["level_gbs"]) == ("L3", 50.0)
    assert row["moved_ms"] == pytest.approx(2 * 2**20 / 50e9 * 1e3)
    assert row["scratch_ms"] == pytest.approx(2 * 2**18 / 100e9 * 1e3)
    assert row["intensity"] == pytest.approx(2e9 / (2 * 2**20))
    text = _inference_page._explanation(row)
    assert "2 MiB from L3 at 50 GB/s" in text
    assert "0.25 MiB between the convolutions" in text
    assert _inference_page._explanation({**row, "share_of_peak": 0.8}) == "arithmetic"


# ----------------------------------------------------------------------------------------------------------------- page


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and notes tags and attributes."""

    VOID = ("meta", "br", "line", "circle", "polygon", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_complete_by_itself(tmp_path):
    _, text = bench(tmp_path, "--width", "0.25", "--resolution", "32", "--threads", "1")
    page = Page(text)
    assert not page.open
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "url(" not in text
    assert "@import" not in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    labelled = [value.split() for name, value in page.attributes if name == "aria-labelledby"]
    assert len(labelled) == 4  # networks, blocks, roofline, kinds of layers
    assert {name for names in labelled for name in names} <= set(ids)
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in text


def test_names_are_escaped(tmp_path, monkeypatch):
    module = type(sys)("odd_names")
    setattr(module, "<b>", lambda: reference.MobileNetV1(width_multiplier=0.25))
    monkeypatch.setitem(sys.modules, "odd_names", module)
    _, text = bench(tmp_path, "--model", "odd_names:<b>", "--resolution", "32", "--threads", "1")
    assert "odd_names:&lt;b&gt;" in text
    assert "<b>" not in text


def test_the_page_has_a_color_for_every_engine():
    engines = {"eager nchw", "eager channels_last", "fused", "frozen", *_peers.PEERS}
    assert engines == set(_inference_page._SERIES)


# ------------------------------------------------------------------------------------------- versions, progress, words


def test_versions_of_peers_in_header_and_json(tmp_path, monkeypatch, capsys):
    known = {"onnxruntime": "7.8.9"}

    def version(name):
        if name in known:
            return known[name]
        raise _peers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_peers.importlib.metadata, "version", version)
    monkeypatch.setattr(_inference, "make_call", lambda *_: (_ for _ in ()).throw(_peers.Unavailable("not here")))
    document, page = bench(
        tmp_path, "--width", "0.25", "--resolution", "32", "--no-blocks", "--threads", "1", "--peers", "installed"
    )
    assert document["machine"]["peers"] == known
    printed = capsys.readouterr().out
    assert "fusedsep" in printed
    assert "onnxruntime 7.8.9" in printed
    assert "onnxruntime 7.8.9" in page
    for peer in _peers.PEERS:
        assert f"not timed: {peer}: not here\n" in printed
        assert f"Not timed: {peer}: not here" in page


def test_no_progress_where_nobody_watches(capsys):
    with _output.progress(2) as begin:
        begin("one")
        begin("two")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_goes_to_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with _output.progress(2) as begin:
        begin("first thing")
        begin("second thing")
    out, err = capsys.readouterr()
    assert out == ""
    assert "first thing" in err
    assert "second thing" in err
    assert "1/2" in err


def test_labels_of_a_chart():
    assert _svg._ranges([3, 1, 2, 5]) == "1-3, 5"
    assert _svg._ranges([7]) == "7"
    assert _svg._shortened("short") == "short"
    assert _svg._shortened("x" * 30 + "y" * 30) == "…" + "x" * 9 + "y" * 30


def test_a_network_without_parts(tmp_path, monkeypatch, capsys):
    module = type(sys)("without_parts")
    module.network = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    monkeypatch.setitem(sys.modules, "without_parts", module)
    document, text = bench(tmp_path, "--model", "without_parts:network", "--resolution", "8", "--threads", "1")
    assert document["parts"][0]["parts"] == []
    assert "Nothing in this network runs in the kernels." in text
    assert "the parts of" not in capsys.readouterr().out


@pytest.mark.parametrize("memory_format", ["nchw", "channels_last"])
def test_parts_in_both_formats(tmp_path, memory_format):
    document, _ = bench(
        tmp_path, "--width", "0.25", "--resolution", "40", "--batch", "3", "--format", memory_format, "--threads", "1"
    )
    assert len(document["parts"][0]["parts"]) == 15
