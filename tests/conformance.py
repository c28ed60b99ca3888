"""What the tests of the kit share."""

from __future__ import annotations

from collections.abc import Iterable

from mcobjectives.testing import Finding


def broken(findings: Iterable[Finding]) -> set[str]:
    """The properties that do not hold."""
    return {f.property for f in findings if f.passed is False}
