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
from fusedsep.cli import main

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
    # Without torch.compile, four engines in inference and two in training, each in two formats; on a GPU five engines
    # in two formats and two types, in inference and in training.
    count = 8 * (len(shapes.BLOCKS) + len(shapes.NETWORKS)) + 4 * len(shapes.BLOCKS)
    # Three engines of ours and of torch in two formats, and two others.
    count += 8 * len(shapes.PEER_NETWORKS)
    count += 2 * 20 * len(shapes.mobilenet_v1(1.0, 224))
    assert f"{count} tests collected" in done.stdout


def test_variants_compute_the_block(script):
    subjects, shapes = script("subjects"), script("shapes")
    subject = subjects.block(shapes.Shape("net", 9, 17, 7, 2, "hardswish", "none", depthwise_norm=False))
    assert subject.gflop == pytest.approx(2e-9 * 4 * 4 * 9 * (9 + 17))
    with torch.inference_mode():
        expected = subject.module(*subject.inputs)
        for variant in subjects.variants(subject.engines):
            torch.testing.assert_close(subject.call(variant)(), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_answer_is_not_timed(script, monkeypatch):
    subjects, shapes = script("subjects"), script("shapes")
    subject = subjects.block(shapes.Shape("net", 8, 8, 5))

    def almost(module):
        wrong = copy.deepcopy(module)
        wrong.pw.weight.data *= 1.0001
        return wrong

    monkeypatch.setitem(subjects.ENGINES, "fused", almost)
    with pytest.raises(RuntimeError, match="fused NCHW gives a wrong output for net 8 -> 8, 5x5: error"):
        subject.call(subjects.Variant("fused", "NCHW"))


@pytest.fixture
def tiny_block(script):
    """What trains on a block of 8 and 16 channels, two images of 5 x 5."""
    return script("training").block(script("shapes").Shape("net", 8, 16, 5, activation="relu6"), batch=2)


def test_training_variants_compute_the_gradients(script, tiny_block):
    twin = copy.deepcopy(tiny_block.module).double()
    x, grad_output = (tensor.double() for tensor in tiny_block.inputs)
    twin(x.requires_grad_()).backward(grad_output)
    variants = script("subjects").variants(tiny_block.engines)
    assert [*map(str, variants)] == ["eager NCHW", "eager channels_last", "fused NCHW", "fused channels_last"]
    for variant in variants:
        module, *inputs = tiny_block._operands(variant)
        step = tiny_block._work(module, *inputs)
        for _ in range(2):  # gradients do not pile up
            step()
        torch.testing.assert_close(inputs[0].grad.double(), x.grad, rtol=1e-4, atol=1e-5)
        for ours, exact in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
        tiny_block.call(variant)()
    assert tiny_block.gflop == pytest.approx(3 * 2e-9 * 2 * 5 * 5 * 8 * (9 + 16))


def wrong_gradient(module):
    module.bn1.bias.register_hook(lambda gradient: gradient * 1.0001)
    return module


def wrong_gradient_at_the_edge(module):
    def replace(_, grad_input, grad_output):
        grad_input[0][0, 0, 0, 0] *= 1.001

    module.dw.register_full_backward_hook(replace)
    return module


def wrong_statistics(module):
    module.bn2.momentum *= 1.0001
    return module


@pytest.mark.parametrize(
    ("engine", "part"),
    [
        (wrong_gradient, "gradient of bn1.bias"),
        (wrong_gradient_at_the_edge, "gradient of the input"),
        (wrong_statistics, "bn2.running_mean"),
    ],
)
def test_a_wrong_training_step_is_not_timed(script, monkeypatch, tiny_block, engine, part):
    monkeypatch.setitem(script("training").TRAINING_ENGINES, "fused", engine)
    with pytest.raises(RuntimeError, match=f"fused NCHW gives a wrong {part} for net 8 -> 16, 5x5: error"):
        tiny_block.call(script("subjects").Variant("fused", "NCHW"))


def test_no_rounding_flips_a_derivative(script):
    """The kinks of the activations lie in gaps between what the BNs give."""
    subject = script("training").block(script("shapes").Shape("net", 8, 16, 28, activation="relu6"), batch=4)
    distances = []
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0]).view(-1, 1, 1, 1, 1)
    for norm in (subject.module.bn1, subject.module.bn2):
        norm.register_forward_hook(lambda _, inputs, y: distances.append((y - kinks).abs().min().item()))
    subject.module(subject.inputs[0])
    assert len(distances) == 2
    assert min(distances) > 1e-4


def test_saved_bytes(script):
    subject = script("training").block(script("shapes").Shape("net", 8, 16, 5), batch=2)
    x, p, statistics = 2 * 8 * 25, 2 * 16 * 25, 2 * (8 + 16)
    assert subject.saved_bytes("eager") == 4 * (3 * x + 2 * p + statistics)  # what each of the six modules keeps
    normalization = 4 * 8  # how the input is kept (fusedsep/_kept_input.py)
    assert subject.saved_bytes("fused") == 4 * (x + p + statistics + normalization)


@pytest.fixture
def peer_subject(script):
    """A small network as ``compare.py peers`` has it."""
    return script("subjects").peer_network(0.25, 64, 8)


def test_other_engines_compute_the_network(monkeypatch, script, peer_subject):
    subjects, peers = script("subjects"), script("fusedsep.cli._peers")
    monkeypatch.setitem(peers.PEERS, "openvino", lambda module, x: lambda: module(x))
    with torch.inference_mode():
        call = peer_subject.call(subjects.Variant("openvino", "NCHW"))
        torch.testing.assert_close(call(), peer_subject.module(*peer_subject.inputs))
    monkeypatch.setitem(peers.PEERS, "openvino", lambda module, x: lambda: module(x) * 1.01)
    with pytest.raises(RuntimeError, match="openvino NCHW gives a wrong output for MobileNetV1"):
        peer_subject.call(subjects.Variant("openvino", "NCHW"))


def test_what_is_not_installed_is_named_and_left_out(monkeypatch, script, peer_subject, capsys):
    def missing(module, x):
        raise peers.Unavailable("onnxruntime is not installed")

    compare, peers = script("compare"), script("fusedsep.cli._peers")
    monkeypatch.setattr(peers, "PEERS", {"onnxruntime": missing, "openvino": lambda module, x: lambda: module(x)})
    result = compare.measure(peer_subject, 1, with_compile=False)
    assert "  onnxruntime NCHW: not timed: onnxruntime is not installed\n" in capsys.readouterr().out
    engines = {variant.split()[0] for variant in result["times"]}
    assert engines == {"eager", "openvino", "fused", "frozen"}
    table = script("report").render(peers_document(result))
    assert "| 0.25-64, batch 8 |" in table
    assert "ONNX Runtime" not in table
    assert "OpenVINO 9.9" in table


def peers_document(*results):
    machine = document()["machine"] | {"fma_gflops": 100.0, "peers": {"openvino": "9.9"}}
    return {"subject": "peers", "machine": machine, "settings": {"batch": None, "repeats": 9}, "results": list(results)}


def peer_result(name, ours, others):
    medians = {"eager NCHW": 9 * ours, "frozen NCHW": 2 * ours, "frozen channels_last": ours, **others}
    return {"network": "Net", "name": name, "gflop": 0.05, "times": {k: times(v) for k, v in medians.items()}}


def test_report_of_peers(script):
    faster = peer_result("a", 1.0, {"onnxruntime NCHW": 0.8, "openvino NCHW": 2.0})
    slower = peer_result("b", 2.0, {"onnxruntime NCHW": 8.0, "openvino NCHW": 2.5})
    table = script("report").render(peers_document(faster, slower))
    assert "| a | 9.00 · - | 0.800 | 2.00 | 2.00 · 1.00 | 0.80x | 50% |" in table
    assert "| b | 18.0 · - | 8.00 | 2.50 | 4.00 · 2.00 | 1.25x | 25% |" in table
    assert "geometric mean 1.00x, from 0.80x to 1.25x" in table
    assert "100 GFLOP/s" in table


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_picture_of_peers(script, tmp_path, suffix):
    files = []
    for threads in (1, 2):
        written = peers_document(peer_result("a", 1.0, {"onnxruntime NCHW": 0.8}), peer_result("b", 2.0, {}))
        written["machine"]["threads"] = threads
        files.append(tmp_path / f"{threads}.json")
        files[-1].write_text(json.dumps(written))
    path = tmp_path / f"peers{suffix}"
    assert script("picture").main([*map(str, files), str(path)]) == 0
    assert 2000 < path.stat().st_size < 200_000


def test_pictures_are_of_one_kind(script, files, tmp_path):
    other = tmp_path / "peers.json"
    other.write_text(json.dumps(peers_document(peer_result("a", 1.0, {}))))
    with pytest.raises(ValueError, match="several files of results must all be of peers, got blocks, peers"):
        script("picture").main([str(files[1]), str(other), str(tmp_path / "picture.svg")])


@pytest.mark.parametrize(
    "subject", ["blocks", "networks", "other-networks", "peers", "training-blocks", "training-networks"]
)
def test_compare_writes_what_report_reads(script, monkeypatch, tmp_path, capsys, subject):
    compare, report, shapes = script("compare"), script("report"), script("shapes")
    monkeypatch.setattr(shapes, "BLOCKS", [shapes.Shape("net", 8, 8, 5)])
    monkeypatch.setattr(shapes, "NETWORKS", [(0.25, 64)])
    monkeypatch.setattr(shapes, "OTHER_WHOLE_NETWORKS", [("MobileNetV3 large", 128)])
    monkeypatch.setattr(shapes, "PEER_NETWORKS", [(0.25, 64, 3)])
    monkeypatch.setattr(script("fusedsep.cli._peers"), "PEERS", {"onnxruntime": lambda module, x: lambda: module(x)})
    monkeypatch.setattr(shapes, "TRAINING_NETWORKS", [("MobileNetV3 large", 1.0, 32, 8)])
    output = tmp_path / "results.json"
    assert compare.main([subject, "--repeats", "3", "--isa", "portable", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["subject"] == subject
    assert written["machine"]["isa"] == "portable"
    assert written["machine"]["threads"] == 1
    assert written["machine"]["sgemm_gflops"] > 0
    best = "fused" if subject.startswith("training") else "frozen"
    assert f"{best} channels_last" in capsys.readouterr().out
    name = {
        "networks": "0.25-64",
        "other-networks": "MobileNetV3 large: 128x128",
        "peers": "0.25-64, batch 3",
        "training-networks": "MobileNetV3 large: 1.0-32, batch 8",
    }.get(subject, "8 -> 8, 5x5")
    table = report.render(written)
    assert f"| {name} |" in table
    assert f"*GFLOP/s*: of {best};" in table or subject == "peers"


@pytest.mark.parametrize(("subject", "batches"), [("blocks", [1, 3]), ("training-blocks", [8, 3])])
def test_compare_batch(script, monkeypatch, tmp_path, subject, batches):
    compare, shapes = script("compare"), script("shapes")
    monkeypatch.setattr(shapes, "BLOCKS", [shapes.Shape("net", 8, 8, 5)])
    output = tmp_path / "results.json"
    work = []
    for arguments, batch in zip(([], ["--batch", "3"]), batches, strict=True):
        assert compare.main([subject, "--repeats", "1", "--output", str(output), *arguments]) == 0
        written = json.loads(output.read_text())
        assert written["settings"] == {"batch": batch, "repeats": 1}
        work.append(written["results"][0]["gflop"] / batch)
    assert work[0] == pytest.approx(work[1])


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


def test_report_of_training(script):
    """No frozen column, the bytes kept for the backward, and no batch where each network has its own."""
    training = document() | {"subject": "training-networks", "settings": {"batch": None, "repeats": 9}}
    for result in training["results"]:
        result["times"] = {k: v for k, v in result["times"].items() if not k.startswith("frozen")}
        result["saved_bytes"] = {"eager": 2**31, "fused": 2**20}
    table = script("report").render(training)
    assert "|  | eager | fused | speed, fused | GFLOP/s | of sgemm | MiB, eager | MiB, fused |" in table
    assert "**Training steps** on" in table
    assert ": 8 -> 16, 7x7 | 4.00 · 3.00 | 2.50 · 2.00 | 1.50x | 45 | 56% | 2048 | 1.00 |" in table
    assert "Median milliseconds, NCHW · channels_last, of 9 calls in turns" in table
    assert "*GFLOP/s*: of fused;" in table
    assert "*MiB*: what autograd keeps" in table


def test_report_of_parts(script, tmp_path):
    """What ``fusedsep bench`` writes becomes a table in the file that has a place for it."""
    results, first, second = tmp_path / "parts.json", tmp_path / "first.md", tmp_path / "second.md"
    command = ["bench", "--width", "0.25", "--resolution", "32", "--repeats", "1", "--peers", "none", "--threads", "1"]
    assert main([*command, "--no-blocks", "--json", str(results)]) == 0
    first.write_text(README)
    second.write_text("<!-- parts:begin -->\n<!-- parts:end -->\n")
    assert script("report").main([f"{first},{second}", str(results)]) == 0
    assert first.read_text() == README
    text = second.read_text()
    assert "**MobileNetV1 0.25-32, batch 1** on " in text
    assert text.count("\n| ") == 1 + 15 + 1  # a header, a rule, first convolution, thirteen blocks, classifier
    # 8 -> 16 on 16 x 16: two operations for each of (9 + 16) * 8 * 256 Mult-Adds; both maps and the weights.
    assert f"| 1: 8 -> 16, 16x16 | 0.102 | {4 * (24 * 256 + 9 * 8 + 8 + 8 * 16 + 16) / 1024:#.3g} |" in text


def test_report_begins_with_fewer_threads(script, files):
    """Whatever the files are called: ``blocks-2threads.json`` comes before ``blocks.json``."""
    readme, results = files
    two_threads = document()
    two_threads["machine"]["threads"] = 2
    other = results.with_name("a.json")
    other.write_text(json.dumps(two_threads))
    script("report").main([str(readme), str(other), str(results)])
    text = readme.read_text()
    assert 0 < text.index(", 1 thread,") < text.index(", 2 threads,")


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
