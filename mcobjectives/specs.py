"""Objectives as text, such as `power(k=50, p=3)`: parsed with `ast` as literals only, never evaluated, and written."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
import warnings
from contextlib import suppress
from dataclasses import MISSING, Field, is_dataclass
from numbers import Integral, Real
from typing import Any

from mcobjectives.arguments import unknown
from mcobjectives.messages import one_line
from mcobjectives.objective import Objective, own_fields
from mcobjectives.objectives import Split
from mcobjectives.plugins import OBJECTIVES, PluginError, get_objective, objective_names, whose

_LONGEST = 2000


def parse_objective(spec: str) -> Objective:
    """The objective that a spec describes: a registered name, with options as Python literals.

    Options are keywords whose values are numbers, strings, True, False or None. `split` takes its two parts as specs.

    Raises:
        ValueError: if anything is wrong with the spec; the one-line message has the spec and how to correct it.

    Example:
        >>> parse_objective("iwae")
        IWAE(k=50)
        >>> parse_objective("power(k=8, p=3, gradient='dreg')")
        Power(k=8, p=3, gradient='dreg')
        >>> parse_objective("split(generative=iwae(k=6), inference=miwae(k1=3, k2=2))").k
        6
    """
    name, node = _parse(spec, spec)
    return _build(spec, spec, name, _registered(spec, name), node)


def import_objective(spec: str) -> Objective:
    """The objective of a spec that names the module of its class: `mypackage.module:MyObjective(k=3)`.

    This imports `mypackage.module`. Use it for your own code (`mcobj check`), not for specs from elsewhere.

    Example:
        >>> import_objective("mcobjectives.objectives:IWAE(k=3)")
        IWAE(k=3)
    """
    module_name, separator, rest = spec.partition(":")
    module_name = module_name.strip()
    if not separator or not all(part.isidentifier() for part in module_name.split(".")):
        raise _error(spec, "say where the class is, as in 'mypackage.module:MyObjective(k=3)'")
    name, node = _parse(spec, rest)
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _error(spec, f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        known = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, Objective)]
        what = f"has no {name}" if found is None else f"has {name}, which is not a subclass of mcobjectives.Objective"
        raise _error(spec, f"{module_name} {what}: its objectives are {', '.join(known) or 'none'}")
    return _build(spec, rest, name, found, node)


def format_objective(objective: Objective) -> str:
    """The shortest spec of an objective: `parse_objective(format_objective(objective)) == objective`.

    An objective that is not registered becomes `module:Class(...)`, which `import_objective` reads.

    Example:
        >>> from mcobjectives import IWAE, Power
        >>> format_objective(IWAE(k=50))
        'iwae'
        >>> format_objective(Power(k=8, chunk_size=4))
        'power(k=8, chunk_size=4)'
    """
    if not is_dataclass(objective):
        raise ValueError(f"{objective!r} is not a dataclass: its options cannot be written as a spec")
    own, of_all = own_fields(objective)
    changed = [f for f in (*own, *of_all) if f.init and not _is_default(f, getattr(objective, f.name))]
    options = ", ".join(f"{f.name}={_format_value(f.name, getattr(objective, f.name))}" for f in changed)
    name = _name_of(type(objective))
    return f"{name}({options})" if options else name


# Reading.


def _error(spec: str, problem: str) -> ValueError:
    return ValueError(" ".join(f"objective spec {_shorten(spec)!r}: {problem}".split()))


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parse(spec: str, text: str) -> tuple[str, ast.Call | None]:
    """The name and, where there are options, the call node of `name` or `name(option=literal, ...)`."""
    usage = "write a name, or a name with options, as in 'iwae' or 'power(k=50, p=3)'"
    if len(text) > _LONGEST:
        raise _error(spec, f"is longer than {_LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about the caller's text
            body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        if re.match(r"\s*[\w.]+:\w", text):
            reason = "only installed objectives have names here, module:name is for mcobj check"
        raise _error(spec, f"cannot be read ({reason}): {usage}") from None
    return _name_and_call(spec, body, usage)


def _name_and_call(spec: str, node: ast.expr, usage: str) -> tuple[str, ast.Call | None]:
    if isinstance(node, ast.Name):
        return node.id, None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id, node
    raise _error(spec, f"is not an objective: {usage}")


def _names() -> list[str]:
    return sorted({*objective_names(), "split"})


def _registered(spec: str, name: str) -> Any:
    names = _names()
    if name not in names:
        raise _error(spec, unknown("objective", name, names))
    if name not in objective_names():
        return Split
    try:
        return get_objective(name)
    except PluginError as error:
        raise _error(spec, str(error)) from error


def _build(spec: str, text: str, name: str, cls: Any, node: ast.Call | None) -> Objective:
    parameters = inspect.signature(cls).parameters
    takes = f"{name} takes {', '.join(parameters)}"
    options: dict[str, Any] = {}
    if node is not None and node.args:
        shown = _source(text, node.args[0]).lstrip("*")
        raise _error(spec, f"options go by name: write {next(iter(parameters), 'option')}={shown}; {takes}")
    for keyword in node.keywords if node is not None else ():
        if keyword.arg is None:
            raise _error(spec, f"** is not allowed; {takes}")
        if keyword.arg not in parameters:
            raise _error(spec, f"unknown option {keyword.arg!r}: {takes}")
        if keyword.arg in options:
            raise _error(spec, f"option {keyword.arg!r} is given twice")
        options[keyword.arg] = _value(spec, text, keyword.arg, keyword.value)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
    if missing:
        raise _error(spec, f"{name} needs {' and '.join(missing)}; {takes}")
    try:
        return cls(**options)
    except Exception as error:
        if isinstance(error, ValueError):
            raise _error(spec, str(error)) from error
        who = whose(OBJECTIVES, name) if name in objective_names() else cls.__qualname__
        raise _error(spec, f"{who} cannot be made: {type(error).__name__}: {error}") from error


def _source(text: str, node: ast.expr) -> str:
    return _shorten(ast.get_source_segment(text.strip(), node) or "it")


def _value(spec: str, text: str, option: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _names():
        return _build(spec, text, node.func.id, _registered(spec, node.func.id), node)
    with suppress(ValueError):
        value = ast.literal_eval(node)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
    shown = _source(text, node)
    if isinstance(node, ast.Name) and shown.lower() in ("nan", "inf"):
        raise _error(spec, f"{option}={shown}: write a number (1e999 is infinite)")
    if isinstance(node, ast.Name):
        python = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(shown.lower())
        nested = f" (or {option}={shown}() for the objective)" if shown in _names() else ""
        raise _error(spec, f"{option}={shown} is not a literal: write {option}={python or repr(shown)}{nested}")
    raise _error(spec, f"{option}={shown} is not a number, a string, True, False or None")


# Writing.


def _name_of(cls: type) -> str:
    if cls is Split and "split" not in objective_names():  # a plugin may claim it
        return "split"
    for name in objective_names():
        try:
            if get_objective(name) is cls:
                return name
        except PluginError:  # a broken plugin is none of this objective's business
            continue
    if "." in cls.__qualname__:
        raise ValueError(
            f"{cls.__qualname__} of {cls.__module__} is inside a class or a function, where no spec finds it: "
            "define it at the top of its module, or register it"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_default(field: Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    try:
        return value is default or bool(value == default)
    except Exception:  # several numbers, such as a tensor's, are not one truth value
        return False


def _format_value(option: str, value: Any) -> str:
    if isinstance(value, Objective):
        spec = format_objective(value)
        if ":" in spec.partition("(")[0]:
            raise ValueError(f"{option}={value!r}: {type(value).__name__} is not registered, so it cannot be nested")
        return spec if spec.endswith(")") else f"{spec}()"
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return repr(str.__str__(value))  # an enumeration's has a repr of its own
    if isinstance(value, Integral):
        return repr(int(value))
    if isinstance(value, Real) and not math.isnan(value):
        return repr(float(value)).replace("inf", "1e999")
    raise ValueError(one_line(f"{option}={value!r} cannot be written as a number, a string, True, False or None"))
