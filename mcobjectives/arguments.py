"""Checks of arguments, with messages that name the argument, its value and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable
from numbers import Integral, Real
from typing import Any


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` unless the value is an integer, of whatever type, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def require_number(name: str, value: Any, allowed: Callable[[float], bool], expected: str) -> None:
    """Raise `ValueError` unless the value is a finite real number in the allowed range."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not allowed(float(value)):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_choice(what: str, value: Any, choices: Collection[Any], error: type[Exception] = ValueError) -> None:
    """Raise `ValueError`, or another error, unless the value is one of the choices."""
    if value not in choices:
        raise error(unknown(what, value, choices))


def unknown(what: str, value: Any, choices: Iterable[Any]) -> str:
    """What to say of a value that is none of the choices, with the nearest one; a number has no nearest.

    Example:
        >>> unknown("preset", "smoek", ["paper", "smoke"])
        "unknown preset 'smoek': did you mean 'smoke'? choose from paper, smoke"
    """
    names = list(map(str, choices))
    close = difflib.get_close_matches(str(value).lower(), [name for name in names if not name.isdecimal()], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {value!r}: {hint}choose from {', '.join(names)}"
