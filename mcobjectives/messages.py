"""Messages to users: warnings that are given once, and an error's text, shortened for use in another message."""

from __future__ import annotations

import sys
import warnings

warned: set[str] = set()

_NOT_THE_CALLER = ("mcobjectives", "torch", "functools")


def one_line(error: object) -> str:
    """All of it on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: object) -> str:
    """Its first line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warn_once(message: str) -> None:
    """Warn of each message once, at the line that called the library."""
    import torch  # which the command line's --help does without

    if message in warned or torch.compiler.is_compiling():  # a traced graph has no place for it
        return
    warned.add(message)
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
