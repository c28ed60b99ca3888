"""What is installed: every registered objective, with what it takes and which estimators it allows."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import MISSING, dataclass, replace
from typing import Any

from mcobjectives import plugins
from mcobjectives.messages import one_line
from mcobjectives.objective import own_fields


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
    objectives = []
    for name in plugins.objective_names():
        with suppress(Exception):  # the catalogue says what is wrong with it
            objectives.append(plugins.get_objective(name)())
    problems = [_problem(name, objectives) for name in plugins.estimator_names()]
    return [problem for problem in problems if problem]


def _problem(estimator: str, objectives: list[Any]) -> str:
    """What is wrong with an estimator, empty if it can be used."""
    try:
        plugins.get_estimator(estimator)
    except plugins.PluginError as error:
        return one_line(error)
    refusals = [_refusal(objective, estimator) for objective in objectives]
    if refusals and all(refusals):
        return f"{plugins.whose(plugins.ESTIMATORS, estimator)} works with no objective at its defaults: {refusals[0]}"
    return ""


def _entry(name: str) -> Entry:
    package = " and ".join(plugins.claims(plugins.OBJECTIVES, name))
    try:
        cls: Any = plugins.get_objective(name)
        own, _ = own_fields(cls)
        if any(f.init and f.default is f.default_factory is MISSING for f in own):
            return Entry(name, package, ", ".join(f.name for f in own))  # what it allows depends on what is given
        objective = cls()
    except Exception as error:  # whatever a third party's code raises is its own entry's error
        return Entry(name, package, error=_said(error))
    parameters = ", ".join(f"{f.name}={getattr(objective, f.name)!r}" for f in own)
    return Entry(name, package, parameters, tuple(e for e in plugins.estimator_names() if not _refusal(objective, e)))


def _refusal(objective: Any, estimator: str) -> str:
    """Why an objective does not allow an estimator, empty if it does."""
    reasons = []
    for changes in ({}, {"k": 2}):  # VIMCO needs two samples, and VAE's default is one
        try:
            with warnings.catch_warnings(action="ignore"):
                replace(objective, gradient=estimator, **changes)
            return ""
        except Exception as error:
            reasons.append(_said(error.__cause__ or error))
    return reasons[0]


def _said(error: BaseException) -> str:
    return one_line(error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
