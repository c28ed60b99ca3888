"""Cells one after the other; with `stack` those that differ in seed or binarisation alone are trained together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from mcobjectives.specs import parse_objective
from mcobjectives_examples.cells import Place, cell_lock, passes, run_cell, trainer_of
from mcobjectives_examples.config import Config
from mcobjectives_examples.logs import tensorboard_log
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.stacking import pays, stacks, train_together


def run_in_turn(
    configs: Sequence[Config],
    dataset: Dataset,
    place: Place,
    *,
    stack: bool = False,
    on_progress: Callable[[Config, str, float, float], None],
    on_done: Callable[[Config], None],
    stop: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    """Record all cells; raises `Interrupted`, the one that was at work with a checkpoint, once `stop()` is true."""
    for group in _groups(configs, place.device, note) if stack else _each(configs):
        with ExitStack() as held:
            for config in group:
                held.enter_context(cell_lock(place.out, config))
            logs = {c: held.enter_context(tensorboard_log(place.tensorboard, c.name)) for c in group}
            if len(group) > 1:
                trainers = [trainer_of(c, dataset, place, log=logs[c], note=note) for c in group]
                train_together(trainers, passes(partial(on_progress, group[0])), stop)
            for config in group:
                update = partial(on_progress, config)
                run_cell(config, dataset, place, on_progress=update, stop=stop, log=logs[config], note=note)
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
