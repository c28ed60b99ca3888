"""Small training runs that several test files make, in this process and as `mcobj`."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import torch

from mcobjectives_examples.hooks import Hooks
from mcobjectives_examples.presets import get_preset

CPU = torch.device("cpu")
# 1500 images in batches of 400: three whole ones and one of 300.
TINY = dataclasses.replace(get_preset("smoke"), stages=((3, 2e-3),), batch_size=400, nll_k=20)


MCOBJ = "import sys; from mcobjectives.cli import main; sys.argv[0] = 'mcobj'; main()"
"""`mcobj` in a process of its own, as code for `python -c`."""

EVERY_STEP = "import mcobjectives_examples.training as t; t.SECONDS_BETWEEN_CHECKPOINTS = -1.0"
"""Code to run before: a checkpoint after each step."""


def wait_for(process, path, writes=2):
    """Until a file was written so many times."""
    inode = None
    while writes and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if (now := path.stat().st_ino) != inode:
                inode, writes = now, writes - 1
        time.sleep(0.0005)


def until(steps):
    """Hooks that stop a run after so many steps."""
    taken = []
    return Hooks(on_progress=lambda *progress: taken.append(progress), stop=lambda: len(taken) >= steps)


def same(a, b):
    """Whether two trainers hold the same bits."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    moments = zip(a.optimiser.state.values(), b.optimiser.state.values(), strict=True)
    return (
        all(torch.equal(x, y) for x, y in pairs)
        and all(torch.equal(x[key], y[key]) for x, y in moments for key in x)
        and a.history == b.history
    )
