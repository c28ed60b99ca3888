"""Data with one row for each data point: how many rows, on which device, a few at a time; and sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def in_float64(value: Tensor) -> Tensor:
    return (value.cpu() if value.device.type == "mps" else value).double()  # mps has no float64


def rows_and_device(x: Any) -> tuple[int, torch.device]:
    leaves = pytree.tree_leaves(x)
    lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    strange = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)}
    if strange:
        mend = "of a loader evaluate each batch, and join them by Evaluation.concatenate"
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            mend = "what all data points share belongs into the model"
        if "ndarray" in strange:
            mend += "; of an array use torch.from_numpy"
        raise ValueError(
            f"x must be a tensor, or a tuple, list or dict of tensors, with one row for each data point, got "
            f"{', '.join(sorted(strange))}: {mend}"
        )
    if len(lengths) != 1 or None in lengths:
        found = ", ".join("none" if n is None else str(n) for n in lengths) or "nothing"
        raise ValueError(f"the tensors of x must have one row for each data point, all of them, got rows of {found}")
    if not len(leaves[0]):
        raise ValueError("x has no data points")
    return len(leaves[0]), leaves[0].device


def batches(x: Any, size: int) -> Iterator[Any]:
    for start in range(0, rows_and_device(x)[0], size):
        yield pytree.tree_map(lambda part, i=start: part[i : i + size], x)
