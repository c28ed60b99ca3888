"""Contestants that take turns, so that whatever else the machine does slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def in_turns(contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each contestant's runs after those that warm up; every other round in reverse order."""
    ms: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(warm_up + rounds):
        for name in names if i % 2 else reversed(names):
            began = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warm_up:
                ms[name].append(1e3 * (time.perf_counter() - began))
    return ms
