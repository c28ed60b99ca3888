"""Findings, and the one exception that reports those that are bad."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """The verdict on one property: `passed` is None where it was not checked, and `message` says why."""

    property: str
    passed: bool | None
    message: str = ""


class ConformanceError(AssertionError):
    """An objective, estimator or model breaks its promises: each property with its numbers and the usual cause."""

    def __init__(self, subject: Any, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        bad = [f for f in self.findings if f.passed is False]
        self.properties = frozenset(f.property for f in bad)
        lines = [f"{subject} breaks {len(bad)} of {len(self.findings)} properties"]
        super().__init__("\n".join([*lines, *(f"  {f.property}: {f.message}" for f in bad)]))


class Broken(Exception):
    """Raised within a check: the numbers that show what is broken."""


class Unchecked(Exception):
    """Raised within a check: why it cannot be made."""


def find(name: str, cause: str, check: Callable[[], None]) -> Finding:
    """Run one check. Whatever else it raises is a finding too, never a crash of the kit."""
    try:
        check()
    except Broken as broken:
        return Finding(name, False, f"{broken}. Usual cause: {cause}")
    except Unchecked as why:
        return Finding(name, None, str(why))
    except Exception as error:
        return Finding(name, False, f"raised {type(error).__name__}: {error}. Usual cause: {cause}")
    return Finding(name, True)


def verdict(subject: Any, findings: list[Finding]) -> list[Finding]:
    """The findings, if none is bad."""
    if any(f.passed is False for f in findings):
        raise ConformanceError(subject, findings)
    return findings
