"""Files that are whole or not there: checkpoints of tensors and plain values, and JSON results."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not this run's. The file is left as it is."""


class OutputError(RuntimeError):
    """The output folder cannot be written."""


def require_writable(path: Path) -> None:
    """Raise `OutputError` where a file could not be written: before the work on what it is to hold."""
    if os.path.isdir(path):  # which is no error where the name or its folder cannot be
        raise OutputError(f"cannot write {path}: it is a folder: name a file")
    probe = path.with_name(".probe")
    try:
        write_atomically(probe, lambda file: None)
    except OutputError as error:
        raise OutputError(str(error).replace(str(probe), str(path))) from error
    probe.unlink()


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside `path`, force it to disk, then rename over it: a reader never sees a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}: choose another folder with --out, or free space") from error
    finally:
        with contextlib.suppress(OSError):  # gone, or in a folder that is not there
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}: move it away to run that cell again") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts."""
    content = io.BytesIO()  # torch.save itself would report a full disk as a fault of its format
    torch.save({"format": FORMAT, **state}, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(path: Path, config: dict[str, Any] | None, device: torch.device | str) -> dict[str, Any]:
    """Read a checkpoint of this very configuration; nothing but tensors and plain values is ever unpickled."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({first}): move it away or choose another --out"
        ) from error
    try:
        theirs = json.loads(state["config"])
        known = state["format"] == FORMAT and isinstance(theirs, dict)
    except (KeyError, TypeError, ValueError, IndexError):
        known = False
    if not known:
        raise CheckpointError(f"{path} is not a checkpoint of this format: move it away or choose another --out")
    if config is not None and theirs != config:
        differing = sorted(key for key in config.keys() | theirs.keys() if config.get(key) != theirs.get(key))
        raise CheckpointError(
            f"{path} belongs to another run (differs in {', '.join(differing)}): move it away or choose another --out"
        )
    return state


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What a checkpoint's content does not allow is a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} lacks or mismatches what a run needs ({first}): move it away") from error
