"""How exactly networks multiply: float32 products, or cheaper ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mcobjectives.arguments import require_choice

PRECISIONS = {
    "highest": "float32 products",
    "medium": "TF32 (GPU) or bfloat16 (CPU) inside float32 products, accumulated in float32",
    "mixed": "medium, and bfloat16 where no gradient is taken (the choice of samples to back-propagate)",
    "bf16": "bfloat16 products in all networks; log-weights, their sums and the parameters stay float32",
}


def require_precision(precision: str) -> None:
    """Raise `ValueError` unless it is one of `PRECISIONS`."""
    require_choice("precision", precision, PRECISIONS)


def set_precision(precision: str) -> None:
    """Set torch's float32 matrix products as `PRECISIONS` says; raises `ValueError` for another name."""
    require_precision(precision)
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "medium")


_precision = "highest"


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Inside, networks multiply in bfloat16 where `PRECISIONS` says so; the rest is float32."""
    global _precision
    before, _precision = _precision, precision
    try:
        yield
    finally:
        _precision = before


def in_bfloat16() -> bool:
    return _precision == "bf16" or (_precision == "mixed" and not torch.is_grad_enabled())
