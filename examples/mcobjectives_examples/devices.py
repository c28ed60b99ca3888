"""Which device to work on, and how long work takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mcobjectives.messages import first_line


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one; raises `ValueError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # of "meta" there is none
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        why = first_line(error).partition(". ")[0]
        raise ValueError(f"device {name!r} cannot be used: {why}: choose auto, cpu or cuda") from None
    return device


def fastest(run: Callable[[], Any], times: int) -> float:
    """The least seconds that a run takes, of so many."""
    elapsed = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - began)
    return min(elapsed)
