"""Findings, and the one exception that reports those that are bad."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from mcobjectives import messages
from mcobjectives.messages import one_line
from mcobjectives.model import ModelError


class Finding(NamedTuple):
    """The verdict on one property: `passed` is None if it was not checked, and `message` says why."""

    property: str
    passed: bool | None
    message: str = ""


class Findings(list[Finding]):
    """The findings of one check, shown one to a line."""

    def __repr__(self) -> str:
        width = max((len(f.property) for f in self), default=0)
        return "\n".join(f"{f.property.ljust(width)}  {_described(f)}" for f in self)


def _described(finding: Finding) -> str:
    words = {True: "passed", False: "broken", None: "not checked"}[finding.passed]
    return f"{words}: {finding.message}" if finding.message else words


class ConformanceError(AssertionError):
    """An objective, estimator or model breaks its promises; lists each property, its numbers and the usual cause."""

    def __init__(self, subject: Any, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        bad = [f for f in self.findings if f.passed is False]
        self.properties = frozenset(f.property for f in bad)
        lines = [f"{subject} breaks {len(bad)} of {len(self.findings)} properties"]
        super().__init__("\n".join([*lines, *(f"  {f.property}: {f.message}" for f in bad)]))


class Broken(Exception):
    """Raised within a check: the numbers that show what is broken, and the cause where it is another than usual."""

    def __init__(self, numbers: str, cause: str | None = None) -> None:
        super().__init__(numbers)
        self.cause = cause


class Unchecked(Exception):
    """Raised within a check: why it cannot be made."""


def find(name: str, cause: str, check: Callable[[], None]) -> Finding:
    """Run one check. Whatever else it raises is a finding too, never a crash of the kit."""
    try:
        check()
    except Broken as broken:
        return Finding(name, False, f"{broken}. Usual cause: {broken.cause or cause}")
    except Unchecked as why:
        return Finding(name, None, str(why))
    except Exception as error:
        # Only what the library says of a model has the check's usual cause: of any other error it would be a guess.
        usual = f". Usual cause: {cause}" if isinstance(error, ModelError) else ""
        return Finding(name, False, f"raised {type(error).__name__}: {one_line(error)}{usual}")
    return Finding(name, True)


def verdict(subject: Any, findings: list[Finding]) -> Findings:
    """The findings, if none is bad."""
    if any(f.passed is False for f in findings):
        raise ConformanceError(subject, findings)
    return Findings(findings)


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings, even where they are errors; those that are given once are still to come afterwards."""
    given = set(messages.warned)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.warned.clear()
        messages.warned.update(given)
