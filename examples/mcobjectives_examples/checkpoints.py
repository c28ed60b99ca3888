"""Checkpoints of tensors and plain values: read with care, refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mcobjectives.messages import first_line
from mcobjectives_examples.config import differing
from mcobjectives_examples.files import write_atomically

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not this run's. The file is left as it is."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts."""
    content = io.BytesIO()  # torch.save itself would report a full disk as a fault of its format
    torch.save({"format": FORMAT, **state}, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(
    path: Path, config: dict[str, Any] | None, device: torch.device | str, option: str = "--out"
) -> dict[str, Any]:
    """Read a checkpoint of this very configuration; nothing but tensors and plain values is ever unpickled.

    `option` is the one that chooses its folder, for messages.
    """
    mend = "give the .pt file of a run" if config is None else f"move it away or choose another {option}"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # whose message says how to load it unsafely
        why = "it is no file of torch.save, or holds more than tensors and plain values"
        raise CheckpointError(f"{path} is not a readable checkpoint ({why}): {mend}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({first_line(error)}): {mend}") from error
    theirs: Any = None
    written = state.get("format") if isinstance(state, dict) else None
    if isinstance(written, int) and written == FORMAT:  # it may be anybody's
        with contextlib.suppress(KeyError, TypeError, ValueError):
            theirs = json.loads(state["config"])
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{path} is not a checkpoint of this format: {mend}")
    if config is not None and (found := differing(theirs, config)):
        raise CheckpointError(f"{path} belongs to another run (differs in {found}): {mend}")
    return state


def passes_of(state: dict[str, Any], passes: int) -> int:
    """How many whole passes a checkpoint holds, of so many; raises `ValueError` for what is no such number."""
    return whole_number("epoch", state["position"]["epoch"], passes)


def whole_number(name: str, value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} must be an integer from 0 to {most}, got {value!r}")
    return value


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What a checkpoint's content does not allow is a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, ArithmeticError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        why = f"lacks or mismatches what a run needs ({first_line(error)})"
        raise CheckpointError(f"{path} {why}: move it away") from error
