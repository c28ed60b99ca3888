"""Objectives and estimators by name, found through entry points: the built-ins exactly as a third party's."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeAlias

OBJECTIVES = "mcobjectives.objectives"
ESTIMATORS = "mcobjectives.estimators"
if TYPE_CHECKING:
    from torch import Tensor

    Estimator: TypeAlias = Callable[[Any, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]
else:
    Estimator = Callable[..., Any]
"""A function (objective, log_weights) -> (a, c, s)."""

_METHODS = ("reduce", "bound", "surrogate", "bind")  # of an Objective, which this module does not import


class PluginError(ValueError):
    """A plugin is unknown, claimed twice, or cannot be loaded.

    Example:
        >>> try:
        ...     get_estimator("nonesuch")
        ... except PluginError as error:
        ...     print(str(error).partition(":")[0])
        unknown estimator 'nonesuch'
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # it quotes what others' code raised


@cache
def registered(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """All entry points of a group by name; more than one for a name is a clash between distributions."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=group):
        # One distribution seen twice on the path (an editable install beside its sources) is no clash.
        found.setdefault(point.name, {}).setdefault(distribution(point), point)
    return {name: tuple(points.values()) for name, points in sorted(found.items())}


def distribution(point: EntryPoint) -> str:
    return (point.dist and point.dist.name) or f"an unknown distribution ({point.value})"


def claims(group: str, name: str) -> list[str]:
    """The distributions that claim a registered name: more than one is a clash."""
    found = [distribution(point) for point in registered(group)[name]]
    if (group, name) == (OBJECTIVES, "split"):  # specs read it, but it has no defaults to be registered with
        found.append("mcobjectives")
    return sorted(found)


def load(group: str, name: str) -> Any:
    """The object that a plugin's entry point names; raises `PluginError` with the distribution that is at fault."""
    if not isinstance(name, str) or name not in registered(group):
        hint = "parse_objective reads options; " if group == OBJECTIVES and "(" in str(name) else ""
        choice = ", ".join(registered(group)) or "none installed"
        raise PluginError(f"unknown {_kind(group)} {name!r}: {hint}choose from {choice}")
    return _loaded(group, name)


@cache
def _loaded(group: str, name: str) -> Any:
    kind, point = _kind(group), registered(group)[name][0]
    if group == OBJECTIVES and name != _spelt(name):
        raise PluginError(f"{whose(group, name)} has a name that no spec can spell: register it as {_spelt(name)}")
    if len(claims(group, name)) > 1:
        raise PluginError(f"{kind} {name!r} is claimed by {' and '.join(claims(group, name))}: uninstall one of them")
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever its import does, a program that starts and leaves included
        raise PluginError(
            f"{kind} {name!r} of {distribution(point)} ({point.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def objective_names() -> list[str]:
    """The names of all installed objectives, sorted.

    Example:
        >>> "iwae" in objective_names()
        True
    """
    return list(registered(OBJECTIVES))


def estimator_names() -> list[str]:
    """The names of all installed gradient estimators, sorted.

    Example:
        >>> "dreg" in estimator_names()
        True
    """
    return list(registered(ESTIMATORS))


def get_objective(name: str) -> Callable[..., Any]:
    """The objective class registered under a name.

    Raises:
        PluginError: if the name is not installed, claimed twice, broken, or not that of an objective.

    Example:
        >>> get_objective("iwae")(k=5)
        IWAE(k=5)
    """
    found = load(OBJECTIVES, name)
    if not (isinstance(found, type) and all(callable(getattr(found, method, None)) for method in _METHODS)):
        raise PluginError(
            f"{whose(OBJECTIVES, name)} is {found!r}, not an Objective class with a reduce method: "
            "make it a subclass of mcobjectives.Objective"
        )
    return found


def get_estimator(name: str) -> Estimator:
    """The estimator registered under a name: a function (objective, log_weights) -> (a, c, s).

    Raises:
        PluginError: if the name is not installed, claimed twice, broken, or not that of a function.

    Example:
        >>> get_estimator("dreg").__name__
        'dreg'
    """
    found = load(ESTIMATORS, name)
    if not callable(found):
        raise PluginError(
            f"{whose(ESTIMATORS, name)} is {found!r}, not a function (objective, log_weights) -> (a, c, s)"
        )
    return found


def _spelt(name: str) -> str:
    """The nearest name that a spec can spell; itself if it can."""
    normal = unicodedata.normalize("NFKC", name)  # as Python reads names
    spelt = "".join(c if f"_{c}".isidentifier() else "_" for c in normal)
    return spelt if spelt.isidentifier() and not keyword.iskeyword(spelt) else f"_{spelt}"


def _kind(group: str) -> str:
    return group.rsplit(".", 1)[-1].removesuffix("s")


def whose(group: str, name: Any) -> str:
    """A plugin with the distribution that it is of, for messages; it may be the object itself."""
    if not isinstance(name, str):
        return f"{_kind(group)} {getattr(name, '__name__', name)}"
    return f"{_kind(group)} {name!r} of {distribution(registered(group)[name][0])}"
