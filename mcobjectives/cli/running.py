"""Long work on the terminal: how long it will take, bars, and what Ctrl-C does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import Progress

from mcobjectives.cli.show import CellBar, duration, errors, interruptible, progress
from mcobjectives_examples.cells import Place, passes_done, recorded
from mcobjectives_examples.config import Config
from mcobjectives_examples.estimates import estimate_seconds
from mcobjectives_examples.hooks import Hooks, Interrupted, OnProgress
from mcobjectives_examples.in_turn import run_in_turn
from mcobjectives_examples.logs import require_tensorboard
from mcobjectives_examples.side_by_side import run_side_by_side
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.words import counted


@contextmanager
def running(
    afterwards: str = "", how: str = "after this step, with a checkpoint"
) -> Iterator[tuple[Callable[[], bool], Progress]]:
    """Whether to stop, and bars: for work that Ctrl-C stops, which then says how to go on and exits with 130."""
    with interruptible(how) as stop, progress() as bars:
        try:
            yield stop, bars
        except Interrupted:
            if afterwards:
                errors.print(f"interrupted: {afterwards}", markup=False)
            raise typer.Exit(130) from None


def run_all(
    configs: Sequence[Config], dataset: Dataset, place: Place, *, jobs: int = 1, stack: bool = False
) -> list[dict[str, Any]]:
    """The results of all configurations, with bars; Ctrl-C writes a checkpoint and exits with 130.

    With `stack`, those that differ in seed or binarisation alone are trained together, where that pays. With `jobs`
    above one, so many are at work at once.
    """
    require_tensorboard(place.tensorboard)
    absent = missing(configs, dataset, place.out)
    if absent:
        announce(passes_done(place.out, absent, dataset.checksum), dataset, place.device)
    noted: set[str] = set()

    def note(text: str) -> None:
        if text not in noted:
            errors.print(text, markup=False, highlight=False)
        noted.add(text)

    with running(f"the checkpoint is in {place.out}; the same command goes on from there") as (stop, bars):
        whole = bars.add_task("cells", total=len(configs), completed=len(configs) - len(absent), unit="cells")
        cells = {config: CellBar(bars, f"{config.layers}L {config.objective} seed {config.seed}") for config in absent}

        def on_done(config: Config) -> None:
            cells[config].close()
            bars.advance(whole)

        def progress_of(config: Config) -> OnProgress:
            return cells[config].update

        hooks = Hooks(stop=stop, note=note)
        if jobs > 1:
            run_side_by_side(absent, place, jobs, hooks, progress_of=progress_of, on_done=on_done)
        else:
            run_in_turn(absent, dataset, place, hooks, progress_of=progress_of, on_done=on_done, stack=stack)
    return [result for config in configs if (result := recorded(place.out, config, dataset.checksum)) is not None]


def missing(configs: Sequence[Config], dataset: Dataset, out: Path) -> list[Config]:
    return [config for config in configs if recorded(out, config, dataset.checksum) is None]


def announce(done: Mapping[Config, int], dataset: Dataset, device: torch.device) -> None:
    with errors.status("timing a few steps"):
        seconds = estimate_seconds(done, dataset, device)
    preset = next(iter(done)).preset
    begun = sum(passes > 0 for passes in done.values())
    going_on = f", {begun} begun" if begun else ""
    most = "at most about" if device.type == "cpu" else "about"  # these steps were not compiled
    advice = "" if seconds < 600 or preset.name == "smoke" else "; --preset smoke would take minutes"
    errors.print(
        f"{counted(len(done), 'cell')} to run with preset {preset.name} "
        f"({counted(preset.passes, 'pass')}) on {device}{going_on}: {most} {duration(seconds)}{advice}"
    )
