"""What is installed: every registered objective, with what it takes and which estimators it allows."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from mcobjectives import plugins
from mcobjectives.messages import one_line
from mcobjectives.objective import Objective


@dataclass(frozen=True)
class Entry:
    """A registered objective; `error` says why it cannot be used, empty if it can."""

    name: str
    package: str
    parameters: str = ""
    estimators: tuple[str, ...] = ()
    error: str = ""


def catalogue() -> list[Entry]:
    """All registered objectives, the broken ones with what is wrong with them."""
    return [_entry(name) for name in plugins.objective_names()]


def broken_estimators() -> list[str]:
    """What is wrong with registered estimators, a line for each that cannot be used."""
    problems = []
    for name in plugins.estimator_names():
        try:
            plugins.get_estimator(name)
        except plugins.PluginError as error:
            problems.append(one_line(error))
    return problems


def _entry(name: str) -> Entry:
    package = " and ".join(plugins.claims(plugins.OBJECTIVES, name))
    base = {f.name for f in fields(Objective)}
    try:
        cls: Any = plugins.get_objective(name)
        own = [f for f in fields(cls) if f.name not in base]
        if any(f.init and f.default is f.default_factory is MISSING for f in own):
            return Entry(name, package, ", ".join(f.name for f in own))  # what it allows depends on what is given
        objective = cls()
    except Exception as error:  # whatever a third party's code raises is its own entry's error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Entry(name, package, error=one_line(f"{kind}{error}"))
    parameters = ", ".join(f"{f.name}={getattr(objective, f.name)!r}" for f in own)
    return Entry(name, package, parameters, tuple(e for e in plugins.estimator_names() if _allows(objective, e)))


def _allows(objective: Any, estimator: str) -> bool:
    for changes in ({}, {"k": 2}):  # VIMCO needs two samples, and VAE's default is one
        try:
            with warnings.catch_warnings(action="ignore"):
                replace(objective, gradient=estimator, **changes)
            return True
        except Exception:
            continue
    return False
