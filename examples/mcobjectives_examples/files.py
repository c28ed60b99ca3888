"""Files that are whole or not there: written beside their place, forced to disk, then renamed over it."""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]


class OutputError(RuntimeError):
    """The output folder cannot be written."""


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
        _force_to_disk(target.parent)
    finally:
        with suppress(OSError):  # gone, or in a folder that is not there
            part.unlink()


def _force_to_disk(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all; raises `OutputError` where it cannot be written."""
    try:
        with whole_file(path) as file:
            write(file)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error}: choose another folder with --out, or free space")


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def require_writable(path: Path) -> None:
    """Raise `OutputError` where a file could not be written: before the work on what it is to hold."""
    if os.path.isdir(path):  # which is no error where the name or its folder cannot be
        raise OutputError(f"cannot write {path}: it is a folder: name a file")
    probe = path.with_name(".probe")
    try:
        with whole_file(probe):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error
    probe.unlink(missing_ok=True)  # somebody else may look at the same time


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Until the block or the process ends, no other process writes the files of this name, whatever their suffixes.

    What a killed one left half-written is removed. Raises `OutputError` where another process is at work on them.
    """
    if fcntl is None:
        yield
        return
    lock = _lock_file(path)
    with _held(lock, path):
        try:
            for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                part.unlink(missing_ok=True)
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def require_unlocked(path: Path) -> None:
    """Raise `OutputError` where another process is at work on the files of this name."""
    if _lock_file(path).exists():
        with locked(path):
            pass


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _held(lock: Path, path: Path) -> BinaryIO:
    """The lock file, which is locked until it is closed."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("wb")
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise OutputError(
                f"another process is at work on {path}: wait for its end, or choose another folder"
            ) from error
        except OSError:
            return file  # on a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()  # its owner has removed it meanwhile: what counts is the one that has the name
