"""An error's text, shortened for use in another message."""

from __future__ import annotations


def one_line(error: object) -> str:
    """All of it on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: object) -> str:
    """Its first line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
