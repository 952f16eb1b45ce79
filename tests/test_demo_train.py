# SPDX-License-Identifier: BSD-3-Clause
"""``fusedsep demo --train``, with digits of our own: twins from one seed, criteria, picture, wrong arguments."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from fusedsep.cli import _demo_training, main
from fusedsep.cli._demo_training import TWINS, Settings, summarise, train
from fusedsep.pretrained import digits
from fusedsep.pretrained.digits import Digits, DigitsError, read_digits


@pytest.fixture
def few_digits(monkeypatch):
    """Two hundred images that are not hard to tell apart, in the place of the fetched ones."""
    labels = torch.arange(200) % 10
    images = 0.1 * torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 + 2 * label : 4 + 2 * label] = 1
    data = Digits(images, labels)
    monkeypatch.setattr(digits, "bundled_digits", lambda cache_dir, progress: data)
    # Twenty steps are too few to warm up: at the rates of the real run a network this small amplifies every rounding.
    monkeypatch.setattr(_demo_training, "_PEAK_RATE", 1e-4)
    return data


SMALL = ["--epochs", "2", "--batch-size", "16", "--width-multiplier", "0.1", "--threads", "1"]


def test_the_demo_trains_both(few_digits, training_calls, tmp_path, capsys):
    picture, results = tmp_path / "curves.png", tmp_path / "results.json"
    assert main(["demo", "--train", *SMALL, "--output", str(picture), "--json", str(results)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(results.read_text())
    assert document["settings"] == {"epochs": 2, "batch_size": 16, "width_multiplier": 0.1, "seed": 0}
    assert document["summary"]["steps"] == 20
    assert [len(document["curves"][name]["losses"]) for name in TWINS] == [20, 20]
    assert [len(document["curves"][name]["accuracies"]) for name in TWINS] == [2, 2]
    # One step more than those of training: the bytes are counted by a copy.
    assert len(training_calls) == 13 * 21
    shown = capsys.readouterr().out
    assert "test accuracy" in shown
    assert shown.count("pass") == 2


def test_the_twins_see_the_same_and_the_fused_one_saves_less(few_digits):
    settings = Settings(epochs=2, batch_size=16, width_multiplier=0.1, seed=3)
    results = [summarise(train(few_digits, settings, lambda twins: None)) for _ in range(2)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["largest_difference_of_first_losses"] < _demo_training.LOSS_TOLERANCE
    saved = results[0]["saved_bytes"]
    assert 0 < saved["fused"] < 0.75 * saved["unfused"]


@pytest.mark.parametrize("tolerance", ["LOSS_TOLERANCE", "ACCURACY_TOLERANCE"])
def test_a_difference_beyond_the_tolerance_fails(few_digits, monkeypatch, tolerance, tmp_path, capsys):
    monkeypatch.setattr(_demo_training, tolerance, 0.0)
    assert main(["demo", "--train", *SMALL, "--output", str(tmp_path / "curves.png")]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_ends_the_training(few_digits, capsys):
    few_digits.images[7] = float("nan")
    assert main(["demo", "--train", *SMALL]) == 2
    assert "the loss of the unfused network is nan in step 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "--photos", "x.jpg"], "--photos is for photographs"),
        (["--train", "--weights", "x.pt"], "--weights is for photographs"),
        (["--epochs", "3"], "--epochs is for --train"),
        (["--width-multiplier", "0.5"], "--width-multiplier is for --train"),
        (["--train", "--epochs", "1", "--batch-size", "150"], "makes 1 steps, at least 10 are wanted"),
    ],
)
def test_arguments_that_do_not_go_together(few_digits, capsys, arguments, message):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--batch-size", "x"], ["--width-multiplier", "-1"]])
def test_a_wrong_value_names_the_option(capsys, arguments):
    with pytest.raises(SystemExit):
        main(["demo", "--train", *arguments])
    assert arguments[0] in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- digits


def csv(*rows):
    return gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())


def test_digits_are_read():
    data = read_digits(csv([0] * 783 + [255, 7], [51] * 784 + [0]))
    assert data.images.shape == (2, 1, 28, 28)
    assert data.images[0, 0, 27, 27] == 1
    torch.testing.assert_close(data.images[1], torch.full((1, 28, 28), 0.2))
    assert data.labels.tolist() == [7, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not gzip", "not a gzipped CSV"),
        (gzip.compress(b"a,b"), "not a gzipped CSV"),
        (csv([0, 1, 2]), "784 grey values and a label from 0 to 9, got 3"),
        (csv([0] * 784 + [10]), "a label from 0 to 9"),
    ],
    ids=["no gzip", "no numbers", "few numbers", "no digit"],  # compressed bytes hold the time
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(DigitsError, match=message):
        read_digits(data)
