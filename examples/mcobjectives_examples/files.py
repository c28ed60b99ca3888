"""Files that are whole or not there: written beside their place, forced to disk, then renamed over it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


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
        raise OutputError(f"cannot write {path}: {error}: choose another folder with --out, or free space") from error


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def require_writable(path: Path) -> None:
    """Raise `OutputError` where a file could not be written: before the work on what it is to hold."""
    if os.path.isdir(path):  # which is no error where the name or its folder cannot be
        raise OutputError(f"cannot write {path}: it is a folder: name a file")
    probe = path.with_name(".probe")
    try:
        write_atomically(probe, lambda file: None)
    except OutputError as error:
        raise OutputError(str(error).replace(str(probe), str(path))) from error
    probe.unlink(missing_ok=True)  # somebody else may look at the same time
