"""Numbers in words."""

from __future__ import annotations


def counted(n: int, what: str) -> str:
    """ "1 pass", "2 passes"."""
    return f"{n} {what}" + ("" if n == 1 else "es" if what.endswith("s") else "s")
