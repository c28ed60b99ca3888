"""Small training runs that several test files make."""

from __future__ import annotations

import dataclasses

import torch

from mcobjectives_examples.presets import get_preset

CPU = torch.device("cpu")
# 1500 images in batches of 400: three whole ones and one of 300.
TINY = dataclasses.replace(get_preset("smoke"), stages=((3, 2e-3),), batch_size=400, nll_k=20)


def until(steps):
    """Arguments of `run` that stop it after so many steps."""
    taken = []
    return taken.append, lambda: len(taken) >= steps


def same(a, b):
    """Whether two trainers hold the same bits."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    moments = zip(a.optimiser.state.values(), b.optimiser.state.values(), strict=True)
    return (
        all(torch.equal(x, y) for x, y in pairs)
        and all(torch.equal(x[key], y[key]) for x, y in moments for key in x)
        and a.history == b.history
    )
