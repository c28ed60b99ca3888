"""Data files on disk: where they live, and how they get there whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from mcobjectives.messages import one_line
from mcobjectives_examples.errors import DataError
from mcobjectives_examples.files import whole_file

ATTEMPTS = 3
TIMEOUT_S = 30.0
PAUSE_S = 1.0

_DROPPED = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError)


def user_cache() -> Path:
    """The per-user cache folder of this platform, `~/.cache/mcobjectives` on Linux."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mcobjectives"


def data_dir(explicit: str | Path | None = None) -> Path:
    """The data folder: `explicit` if given, else `$MCOBJECTIVES_DATA`, else the user's cache folder."""
    return Path(explicit or os.environ.get("MCOBJECTIVES_DATA") or user_cache()).expanduser()


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file; `algorithm` is one of hashlib's, or `git-blob` for git's object id of the content."""

    def start() -> Any:
        if algorithm == "git-blob":
            return hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.new(algorithm, usedforsecurity=False)

    with path.open("rb") as file:
        return hashlib.file_digest(file, start).hexdigest()


def matches(path: Path, official: str) -> bool:
    """Whether the file has the official checksum, written `algorithm:hex`."""
    algorithm, _, expected = official.partition(":")
    return file_digest(path, algorithm) == expected


def fetch(url: str, target: Path, check: Callable[[Path], object]) -> None:
    """Download `url` to `target`, which appears only when it is whole.

    The length is held against Content-Length, and `check` may refuse the content by raising DataError. A dropped
    connection is tried again, `ATTEMPTS` times in all; an answer such as 404 is final.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _fetch_once(url, target, check)
        except HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise DataError(f"{url}: the server answers {error.code} {error.reason}; {_ELSEWHERE}") from error
        except _DROPPED as error:
            if attempt == ATTEMPTS:
                raise DataError(f"{url}: {one_line(error)} ({ATTEMPTS} attempts); {_ELSEWHERE}") from error
        except OSError as error:
            raise DataError(f"cannot write {target}: {error.strerror or error}; choose another --data-dir") from error
        time.sleep(PAUSE_S * attempt)


_ELSEWHERE = "try again later, or get the file elsewhere and point --data-dir or MCOBJECTIVES_DATA at its folder"


def _fetch_once(url: str, target: Path, check: Callable[[Path], object]) -> None:
    request = Request(url, headers={"User-Agent": "mcobjectives"})
    with urlopen(request, timeout=TIMEOUT_S) as response, whole_file(target) as file:
        # http.client returns short reads at a dropped connection without raising, hence the count.
        expected = response.headers.get("Content-Length")
        _copy(response, file, int(expected) if expected else None, target.name)
        if expected and file.tell() != int(expected):
            raise ConnectionError(f"connection dropped after {file.tell()} of {expected} bytes")
        file.flush()
        check(Path(file.name))


def _copy(response: Any, file: BinaryIO, total: int | None, label: str) -> None:
    from rich.console import Console
    from rich.progress import wrap_file

    if total is None:
        shutil.copyfileobj(response, file)
        return
    # On stderr, so that a command's --json on stdout stays clean.
    with wrap_file(response, total, description=label, console=Console(stderr=True), transient=True) as stream:
        shutil.copyfileobj(stream, file, 1 << 16)


def fetch_torchvision(class_name: str, folder: Path) -> None:
    """Download MNIST or FashionMNIST with torchvision into `folder`, each file appearing only when it is whole.

    torchvision unpacks in place, so that a killed download looks complete to it; hence a folder of its own first.
    Files that are already there are kept.
    """
    import torchvision.datasets

    raw = folder / class_name / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    getattr(torchvision.datasets, class_name)(temporary, download=True)
                    break
                except Exception as error:  # torchvision lets whatever urllib raises through
                    if attempt == ATTEMPTS:
                        raise DataError(f"{class_name}: torchvision: {one_line(error)}; {_ELSEWHERE}") from error
                    time.sleep(PAUSE_S * attempt)
            for file in sorted(Path(temporary, class_name, "raw").iterdir()):
                if not (raw / file.name).exists():
                    os.replace(file, raw / file.name)
    except OSError as error:
        raise DataError(f"cannot write {raw}: {error.strerror or error}; choose another --data-dir") from error
