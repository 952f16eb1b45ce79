# SPDX-License-Identifier: BSD-3-Clause
"""Weights, photographs and class names arrive verified, or with one sentence that says why not."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from graphdef_bytes import DT_INT32, constant, message, node, number, slim_graph, tensor, varint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from randomize import randomized

from fusedsep.pretrained import PretrainedError, download, photos
from fusedsep.pretrained.download import ChecksumError, DownloadError, Package, fetch
from fusedsep.pretrained.graphdef import GraphDefError, read_constants
from fusedsep.pretrained.weights import SLIM_ARGUMENTS, WeightsError, build_network, read_state_dict
from fusedsep.reference import MobileNetV1

# ------------------------------------------------------------------------------------------------------------ GraphDef


def test_reads_back_what_was_written():
    arrays = {"a/weights": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "b": np.array([-0.5], np.float32)}
    graph = b"".join(constant(name, array) for name, array in arrays.items())
    read = read_constants(graph)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def test_leaves_out_what_is_no_float_constant():
    graph = node("x", "Placeholder") + node("shape", "Const", tensor((1,), message(4, b"\0\0\0\0"), DT_INT32))
    graph += constant("kept", np.ones(2, np.float32)) + message(4, number(1, 24))  # field 4: versions
    assert list(read_constants(graph)) == ["kept"]


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_one_value_fills_a_tensor(shape):
    value = np.float32(1e-3)
    read = read_constants(node("eps", "Const", tensor(shape, message(5, value.tobytes()))))
    np.testing.assert_array_equal(read["eps"], np.full(shape, value), strict=True)


def test_values_may_be_listed_one_by_one():
    values = np.array([1, 2, 3], "<f4")
    unpacked = b"".join(varint(5 << 3 | 5) + value.tobytes() for value in values)
    read = read_constants(node("listed", "Const", tensor((3,), unpacked)))
    np.testing.assert_array_equal(read["listed"], values)


def test_every_truncation_is_an_error():
    graph = constant("MobilenetV1/Conv2d_0/weights", np.ones((3, 3), np.float32))
    for end in range(len(graph)):
        with pytest.raises(GraphDefError):
            read_constants(graph[:end])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no float constant"),
        (node("v", "VariableV2"), "constants only in a frozen graph"),
        (b"\x00\x00", "numbered from 1"),
        (b"\x0b", "no wire type 3"),
        (b"\x0a\xff", "inside a varint"),
        (b"\x0a" + b"\xff" * 11, "longer than ten bytes"),
        (b"\x0a\x7f\x00", "wants 127 bytes, but 1 are left"),
        (number(1, 5), "node is a number"),
        (message(1, message(1, b"\xff\xfe")), "not UTF-8"),
        (node("w", "Const", tensor((2, 2), message(4, b"\0" * 12))), r"'w' of shape \(2, 2\) needs 16 bytes, has 12"),
        (node("w", "Const", tensor((1 << 40, 9), message(5, b"\0" * 4))), "larger than"),
        (node("w", "Const", tensor(((1 << 64) - 1,), b"")), "dimension of unknown size"),
    ],
)
def test_wrong_bytes_are_named(data, text):
    with pytest.raises(GraphDefError, match=text):
        read_constants(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 120))
def test_no_bytes_raise_anything_else(noise, position):
    graph = constant("name", np.ones((2, 2), np.float32))
    for data in (noise, graph[:position] + noise + graph[position + len(noise) :]):
        with contextlib.suppress(GraphDefError):
            read_constants(data)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def network() -> MobileNetV1:
    torch.manual_seed(0)
    return randomized(MobileNetV1(11, 0.25, **SLIM_ARGUMENTS)).eval()


def save_safetensors(state, path):
    pytest.importorskip("safetensors.torch").save_file(state, path)


WRITERS = {
    "graph.pb": lambda state, path: path.write_bytes(slim_graph(state)),
    "weights.pt": torch.save,
    "weights.pth": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "parallel.pt": lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, path),
    "old.bin": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "weights.safetensors": save_safetensors,
    "renamed": save_safetensors,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_network(name, network, tmp_path):
    path = tmp_path / name
    WRITERS[name](network.state_dict(), path)
    rebuilt = build_network(read_state_dict(path))
    x = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), network(x))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(name, kept, network, tmp_path):
    path = tmp_path / name
    WRITERS[name](network.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(WeightsError, match=name):
        read_state_dict(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read the weights .*none\.pt: No such file"):
        read_state_dict(tmp_path / "none.pt")


def test_a_pickled_module_is_refused(network, tmp_path):
    torch.save(network, tmp_path / "module.pt")
    with pytest.raises(WeightsError, match=r"save model\.state_dict\(\) instead"):
        read_state_dict(tmp_path / "module.pt")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"loss": 0.5}, tmp_path / "log.pt")
    with pytest.raises(WeightsError, match=r"must hold a state_dict"):
        read_state_dict(tmp_path / "log.pt")


def test_another_graph_is_refused(tmp_path):
    path = tmp_path / "other.pb"
    path.write_bytes(constant("InceptionV3/weights", np.ones((3, 3), np.float32)))
    with pytest.raises(WeightsError, match="no constant 'MobilenetV1/Conv2d_0/weights'"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("linear.weight"), "no matrix 'linear.weight'"),
        (lambda state: state.pop("stage_layers.3.dw.weight"), r"stage_layers\.3\.dw\.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "extra"),
        (lambda state: state.update({"stage_layers.0.pw.weight": torch.ones(3, 3, 1, 1)}), r"stage_layers\.0\.pw"),
    ],
)
def test_other_networks_are_refused(change, text, network):
    state = dict(network.state_dict())
    change(state)
    with pytest.raises(WeightsError, match=text):
        build_network(state)


# ------------------------------------------------------------------------------------------------------------ download


@pytest.fixture
def package(tmp_path) -> Package:
    """A package whose wheel is a zip with one file; ``pip`` below copies it."""
    source = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as wheel:
        wheel.writestr("tiny/data", b"x" * 5000)
    data = source.read_bytes()
    return Package("tiny==1.0", source.name, hashlib.sha256(data).hexdigest(), len(data), "a tiny thing")


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Counts the downloads; a download copies from the folder ``index``."""
    calls = []

    def copy(package, folder, progress):
        calls.append(package.name)
        (folder / package.wheel).write_bytes((tmp_path / "index" / package.wheel).read_bytes())
        progress(package.size)

    monkeypatch.setattr(download, "_pip_download", copy)
    return calls


def test_fetches_once(package, pip, tmp_path):
    cache, seen = tmp_path / "deep" / "cache", []
    first = fetch(package, cache, seen.append)
    assert first == fetch(package, cache) == cache / package.wheel
    assert pip == ["tiny"]
    assert seen == [package.size]
    assert [path.name for path in cache.iterdir()] == [package.wheel]


def test_fetches_a_damaged_file_again(package, pip, tmp_path):
    (tmp_path / package.wheel).write_bytes(b"half of it")
    fetch(package, tmp_path)
    assert pip == ["tiny"]
    assert (tmp_path / package.wheel).stat().st_size == package.size


def test_keeps_nothing_with_another_checksum(package, pip, tmp_path):
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(ChecksumError, match=rf"SHA-256 {package.sha256}, expected 0000"):
        fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_offline_says_what_to_do(package, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself runs, and finds nothing
    with pytest.raises(DownloadError) as caught:
        fetch(package, tmp_path / "cache")
    text = str(caught.value)
    assert "pip could not download tiny==1.0 (a tiny thing): No matching distribution found" in text
    assert f"copy {package.wheel} into {tmp_path / 'cache'}" in text
    assert "\n" not in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_python_without_pip_is_named(package, monkeypatch, tmp_path):
    real = subprocess.Popen

    def without_pip(command, **options):
        return real([command[0], "-c", "raise SystemExit('No module named pip')"], **options)

    monkeypatch.setattr(download.subprocess, "Popen", without_pip)
    with pytest.raises(DownloadError, match=r"is fetched with pip, which .* does not have"):
        fetch(package, tmp_path)


def test_a_cache_that_is_a_file_is_named(package, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot use the cache folder"):
        fetch(package, tmp_path / "file")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FUSEDSEP_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/fusedsep"),
        ({"HOME": "/home/user"}, "/home/user/.cache/fusedsep"),
    ],
)
def test_where_the_cache_is(environment, expected, monkeypatch):
    for name in ("FUSEDSEP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert download.default_cache_dir() == Path(expected)


# -------------------------------------------------------------------------------------------------------------- photos


def test_opens_folders_and_files(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "imagenet_00_243.png", folder / "IMG_0042.JPG", tmp_path / "one.png"):
        Image.new("RGB", (8, 6), "red").save(path)
    (folder / "notes.txt").write_text("not a picture")
    opened = photos.open_photos([folder, tmp_path / "one.png"])
    assert [(photo.name, photo.label) for photo in opened] == [
        ("IMG_0042.JPG", None),
        ("imagenet_00_243.png", 243),
        ("one.png", None),
    ]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_color_mode_becomes_the_same_kind_of_input(mode, tmp_path):
    path = tmp_path / "photo.tiff"
    Image.new(mode, (40, 20)).save(path)
    x = photos.to_input(photos.open_photos([path])[0].image, 32)
    assert x.shape == (1, 3, 32, 32)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_scaled_to_minus_one_and_one():
    halves = Image.new("RGB", (4, 4), "black")
    halves.paste("white", (0, 0, 4, 2))
    x = photos.to_input(halves, 4)
    assert torch.equal(x[0, :, :2], torch.ones(3, 2, 4))
    assert torch.equal(x[0, :, 2:], -torch.ones(3, 2, 4))


def test_unusable_photos_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for name, text in {
        "text.jpg": "text.jpg is not a picture",
        "half.png": "half.png cannot be decoded",
        "none.png": "cannot read the photo .*none.png: No such file",
        "empty": "no picture in the folder",
    }.items():
        with pytest.raises(PretrainedError, match=text):
            photos.open_photos([tmp_path / name])
