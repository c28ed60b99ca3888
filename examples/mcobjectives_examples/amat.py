"""The .amat text of binary images, and its compact cache."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from mcobjectives_examples.downloads import file_digest, user_cache
from mcobjectives_examples.errors import DataError
from mcobjectives_examples.files import whole_file


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
            if _may_write(path.parent) and not _somebody_elses(path):
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


def _somebody_elses(path: Path) -> bool:
    """Whether there are arrays, but no cache; what cannot be read is a broken one."""
    try:
        content = np.load(path, allow_pickle=False)
    except Exception:
        return False
    if isinstance(content, np.ndarray):
        return True
    with content:
        return set(content.files) != {"packed", "sha256"}


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
