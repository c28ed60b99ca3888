"""Checks of arguments, with messages that name the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
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
