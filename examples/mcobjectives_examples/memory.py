"""Memory of a training step: what no device has, and what is better kept than given back."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

import torch
from torch import Tensor

from mcobjectives.objective import Objective

# M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h.
_NEVER_TO_THE_SYSTEM = ((-1, 2**31 - 1), (-4, 0))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees, for the next one, until the process ends.

    It hands large blocks back to the system and takes them anew, empty, at every step: up to a third of a step's time.
    Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _NEVER_TO_THE_SYSTEM:
            mallopt(parameter, value)


def require_memory(objective: Objective, x: Tensor) -> None:
    """Raise `ValueError` if all samples of a batch, pixels alone, are more than the device has memory."""
    size = _memory_of(x.device)
    needed = (objective.chunk_size or objective.k) * x.numel() * 4
    if size is not None and needed > size:
        raise ValueError(
            f"k={objective.k} needs over {needed / 1e9:,.0f} GB a step, of {size / 1e9:,.0f} GB on {x.device}: "
            "take fewer samples or a smaller batch"
        )


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError):  # where the system does not say
        return None
