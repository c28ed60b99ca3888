"""Data files on disk: where they live, how they get there whole, the .amat text and its compact cache."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np

ATTEMPTS = 3
TIMEOUT_S = 30.0
PAUSE_S = 1.0

_DROPPED = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError)


class DataError(ValueError):
    """A data set that cannot be used: one line that says what is wrong, with which value, and the mend."""


class MissingDataError(DataError):
    """A data set whose files are not there."""


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


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `target` only when the block ends well; until then `target` is untouched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def fetch(url: str, target: Path, check: Callable[[Path], object] | None = None) -> None:
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
                raise DataError(f"{url}: {_one_line(error)} ({ATTEMPTS} attempts); {_ELSEWHERE}") from error
        except OSError as error:
            raise DataError(f"cannot write {target}: {error.strerror or error}; choose another --data-dir") from error
        time.sleep(PAUSE_S * attempt)


_ELSEWHERE = "try again later, or get the file elsewhere and point --data-dir or MCOBJECTIVES_DATA at its folder"


def _fetch_once(url: str, target: Path, check: Callable[[Path], object] | None) -> None:
    request = Request(url, headers={"User-Agent": "mcobjectives"})
    with urlopen(request, timeout=TIMEOUT_S) as response, whole_file(target) as file:
        # http.client returns short reads at a dropped connection without raising, hence the count.
        expected = response.headers.get("Content-Length")
        _copy(response, file, int(expected) if expected else None, target.name)
        if expected and file.tell() != int(expected):
            raise ConnectionError(f"connection dropped after {file.tell()} of {expected} bytes")
        file.flush()
        if check:
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
                        raise DataError(f"{class_name}: torchvision: {_one_line(error)}; {_ELSEWHERE}") from error
                    time.sleep(PAUSE_S * attempt)
            for file in sorted(Path(temporary, class_name, "raw").iterdir()):
                if not (raw / file.name).exists():
                    os.replace(file, raw / file.name)
    except OSError as error:
        raise DataError(f"cannot write {raw}: {error.strerror or error}; choose another --data-dir") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_amat(path: Path, rows: int, columns: int) -> np.ndarray:
    """The 0/1 numbers of an .amat text as `(rows, columns)` uint8, from its compact cache after the first time.

    The cache is keyed by the text's sha256, so that it is never served for a text that has changed.
    """
    digest = file_digest(path)
    packed = _read_cache(path, digest, (rows, math.ceil(columns / 8)))
    if packed is None:
        packed = parse_amat(path, rows, columns)
        _write_cache(path, digest, packed)
    return np.unpackbits(packed, axis=1, count=columns)


def _read_cache(source: Path, digest: str, shape: tuple[int, int]) -> np.ndarray | None:
    for path in _cache_paths(source):
        try:
            with np.load(path, allow_pickle=False) as cache:
                packed = cache["packed"]
                if str(cache["sha256"]) == digest and packed.dtype == np.uint8 and packed.shape == shape:
                    return packed
        except Exception:  # however a cache is broken, it is rebuilt from its source
            continue
    return None


def _write_cache(source: Path, digest: str, packed: np.ndarray) -> None:
    # Beside the source, else in the user's cache folder, else nowhere: a cache is never worth failing for.
    for path in _cache_paths(source):
        try:
            if _may_write(path.parent):
                with whole_file(path) as file:
                    np.savez(file, packed=packed, sha256=np.array(digest))
                return
        except OSError:
            continue


def _cache_paths(source: Path) -> tuple[Path, Path]:
    name = f"{source.stem}.npz"
    return source.with_name(name), user_cache() / source.parent.name / name


def _may_write(folder: Path) -> bool:
    # Root may write anywhere, but a folder without any write bit is meant to be left alone.
    return not folder.exists() or (os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222))


def parse_amat(path: Path, rows: int, columns: int) -> np.ndarray:
    """The 0/1 numbers of an .amat text, one image a line, as bits packed along the row: `(rows, ceil(columns / 8))`."""
    blocks, seen = [], 0
    with path.open("rb") as file:
        while lines := file.readlines(1 << 24):
            blocks.append(np.packbits(_parse_lines(lines, columns, path, seen), axis=1))
            seen += len(lines)
    if seen != rows:
        raise DataError(f"{path} has {seen} lines, not {rows}: truncated, or another file; move it away")
    return np.concatenate(blocks)


def _parse_lines(lines: list[bytes], columns: int, path: Path, before: int) -> np.ndarray:
    text = np.frombuffer(b"".join(lines), np.uint8)
    digit = text > ord(" ")
    values = text[digit] - ord("0")
    starts = np.cumsum([0, *(len(line) for line in lines[:-1])])
    counts = np.add.reduceat(digit, starts, dtype=np.int64)
    if (values > 1).any() or (counts != columns).any() or (digit[1:] & digit[:-1]).any():
        _explain_lines(lines, columns, path, before)
    return values.reshape(len(lines), columns)


def _explain_lines(lines: list[bytes], columns: int, path: Path, before: int) -> None:
    for number, line in enumerate(lines, before + 1):
        tokens = line.split()
        wrong = next((token for token in tokens if token not in (b"0", b"1")), None)
        if wrong is not None:
            raise DataError(f"{path}, line {number}: {wrong[:20]!r} is not 0 or 1: another file; move it away")
        if len(tokens) != columns:
            raise DataError(f"{path}, line {number}: {len(tokens)} numbers, not {columns}: truncated; move it away")
    raise DataError(f"{path}: not plain 0 and 1 separated by spaces; move it away")
