"""The same objective with another number of samples, however its fields spell that number."""

from __future__ import annotations

import dataclasses
from typing import Any

from mcobjectives.objective import Objective

PLAIN: dict[str, Any] = {"chunk_size": None, "backward_samples": None}


def resized(objective: Objective, k: int, **changes: Any) -> Objective:
    """The objective with k samples and plain options; raises `ValueError` where it cannot have that k.

    Fields k1 and k2 become two groups (k even) or one (k odd); parts that are objectives are resized themselves.
    """
    names = {f.name for f in dataclasses.fields(objective) if f.init}
    parts = {n: getattr(objective, n) for n in names if isinstance(getattr(objective, n), Objective)}
    if "k" in names:
        sizes: dict[str, Any] = {"k": k}
    elif {"k1", "k2"} <= names:
        groups = 2 if k % 2 == 0 else 1
        sizes = {"k1": k // groups, "k2": groups}
    elif parts:
        sizes = {name: resized(part, k, **changes) for name, part in parts.items()}
    else:
        raise ValueError(f"{type(objective).__name__} has no field k, so it cannot be made with k = {k}")
    other = dataclasses.replace(objective, **PLAIN, **sizes, **changes)
    if other.k != k:
        raise ValueError(f"{type(objective).__name__} made with k = {k} has k = {other.k}")
    return other


def first_possible(objective: Objective, sizes: tuple[int, ...], **changes: Any) -> Objective | None:
    """The objective with the first of these sizes that it accepts, or with its own if that is no larger than them."""
    for k in sizes:
        try:
            return resized(objective, k, **changes)
        except (ValueError, TypeError):
            continue
    return dataclasses.replace(objective, **PLAIN, **changes) if objective.k <= max(sizes) else None


def plainly(objective: Objective) -> dict[str, Any]:
    """The gradient with which it differentiates F itself, unless it has weights of its own."""
    return {} if objective.weighs_itself else {"gradient": "reparam"}
