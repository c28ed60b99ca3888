"""Cells one after the other; with `stack` those that differ in seed or binarisation alone are trained together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from mcobjectives.specs import parse_objective
from mcobjectives_examples.cells import Place, cell_lock, run_cell, trainer_of
from mcobjectives_examples.config import Config
from mcobjectives_examples.hooks import Hooks, OnProgress
from mcobjectives_examples.logs import tensorboard_log
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.stacking import pays, stacks, train_together


def run_in_turn(
    configs: Sequence[Config],
    dataset: Dataset,
    place: Place,
    hooks: Hooks,
    *,
    progress_of: Callable[[Config], OnProgress],
    on_done: Callable[[Config], None],
    stack: bool = False,
) -> None:
    """Record all cells; raises `Interrupted`, the one that was at work with a checkpoint, once `stop()` is true.

    Each tells its progress to its own `progress_of`, and those that are trained together to the first one's.
    """
    for group in _groups(configs, place.device, hooks.note) if stack else _each(configs):
        with ExitStack() as held:
            for config in group:
                held.enter_context(cell_lock(place.out, config))
            logs = {c: held.enter_context(tensorboard_log(place.tensorboard, c.name)) for c in group}
            if len(group) > 1:
                first = progress_of(group[0])
                together = [replace(hooks, on_progress=first, log=logs[c]) for c in group]
                train_together([trainer_of(c, dataset, place, h) for c, h in zip(group, together, strict=True)])
            for config in group:
                own = replace(hooks, on_progress=progress_of(config), log=logs[config])
                run_cell(config, dataset, place, own)
                on_done(config)


def _groups(configs: Sequence[Config], device: torch.device, note: Callable[[str], None]) -> list[list[Config]]:
    """Those to be trained together, in groups, and the others one by one."""
    groups = stacks(configs)
    several = [group for group in groups if len(group) > 1]
    if configs and not several:
        note("nothing to stack: no two cells differ in seed or binarisation alone; try --seeds 3")
    paying = [group for group in several if pays(parse_objective(group[0].objective).k, device)]
    if len(paying) < len(several):
        note("on a CPU only cells of k = 1 are stacked: the others are trained one by one")
    return [part for group in groups for part in ([group] if group in paying else _each(group))]


def _each(configs: Sequence[Config]) -> list[list[Config]]:
    return [[config] for config in configs]
