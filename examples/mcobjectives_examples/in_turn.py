"""Cells one after the other; with `stack` those that differ in seed or binarisation alone are trained together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from mcobjectives.specs import parse_objective
from mcobjectives_examples.cells import Place, passes, run_cell, trainer_of
from mcobjectives_examples.config import Config
from mcobjectives_examples.logs import Log, tensorboard_log
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
    together = _groups(configs, place.device, note) if stack else {}
    for config in configs:
        update = partial(on_progress, config)
        with ExitStack() as logs:

            def log_of(config: Config) -> Log | None:
                return logs.enter_context(tensorboard_log(place.tensorboard, config.name))

            if config in together:
                trainers = [trainer_of(c, dataset, place, log=log_of(c), note=note) for c in together[config]]
                train_together(trainers, passes(update), stop)
            run_cell(config, dataset, place, on_progress=update, stop=stop, log=log_of(config), note=note)
        on_done(config)


def _groups(configs: Sequence[Config], device: torch.device, note: Callable[[str], None]) -> dict[Config, list[Config]]:
    """Those to be trained together, each group by its first configuration."""
    groups = [group for group in stacks(configs) if len(group) > 1]
    if configs and not groups:
        note("nothing to stack: no two cells differ in seed or binarisation alone; try --seeds 3")
    paying = [group for group in groups if pays(parse_objective(group[0].objective).k, device)]
    if len(paying) < len(groups):
        note("on a CPU only cells of k = 1 are stacked: the others are trained one by one")
    return {group[0]: group for group in paying}
